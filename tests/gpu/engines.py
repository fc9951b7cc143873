"""A vLLM engine as the tests and the benchmarks ask for it: a job in, results out.

A job runs in a process of its own, and in the environment of its route: `VLLM_V1_PYTHON` and `VLLM_V2_PYTHON` name the
interpreters; by default both are this one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.export import export_speculator
from verl_speculator.vllm_plugin.compat import KEY, PROPOSER, minor_version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXTENSION = "verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension"
V1, V2 = "custom_class", "mtp"  # the routes, by vLLM's method of speculation
PYTHON = {V1: os.environ.get("VLLM_V1_PYTHON", sys.executable), V2: os.environ.get("VLLM_V2_PYTHON", sys.executable)}
VERSION = "from verl_speculator.vllm_plugin.compat import installed_vllm; print(installed_vllm() or '')"


@functools.cache
def on_cuda() -> bool:
    """Whether there is a GPU for vLLM; a build of vLLM for CPUs runs without."""
    import torch

    return torch.cuda.is_available()


@functools.cache
def vllm_version(route: str) -> str | None:
    """The version of vLLM in the environment of a route, None without."""
    if not Path(PYTHON[route]).exists():
        return None
    command, environment = [PYTHON[route], "-c", VERSION], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() or None


def missing(route: str) -> str | None:
    """Why no job of a route can run here, None if it can."""
    version = vllm_version(route)
    if version is None:
        return f"{PYTHON[route]} has no vLLM (docs/rollout.md)"
    if route == V2 and minor_version(version) < (0, 28):
        return f"vLLM {version} has no V2 runner that serves {route}"
    return None


def chat_prompts(base: Path, data: Path, *, longest: int | None = None) -> list[list[int]]:
    """The first turn of every prompt of a file, as the base model reads it, if it has at most `longest` tokens."""
    from transformers import AutoTokenizer

    from verl_speculator.evaluation.prompts import prompt_ids, read_prompts

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [prompt_ids(prompt, tokenizer) for prompt in read_prompts(data)]
    return [prompt for prompt in prompts if longest is None or len(prompt) <= longest]


def draft_counts(answers: list[Any], drafts: int) -> dict[str, Any]:
    """Drafts in answers of our decoder and those that were accepted, in all and by position, as vLLM counts them: with
    the last round of an answer, where a draft that the limit of tokens cuts off counts as accepted."""
    rounds = [each for answer in answers for each in answer.rounds[1:]]
    return {
        "rounds": len(rounds),
        "drafted": sum(each.drafted for each in rounds),
        "accepted": sum(each.accepted for each in rounds),
        "accepted_per_position": [sum(each.accepted > k for each in rounds) for k in range(drafts)],
    }


def eagle3_drafting(checkpoint: Path, drafts: int, **settings: Any) -> dict[str, Any]:
    """Settings of an engine that drafts with an EAGLE-3 checkpoint in vLLM's own drafter, on either route.

    Args:
        checkpoint: as training wrote it; exported beside it.
        drafts: draft length.
        settings: of `speculative_config`.
    """
    exported = Path(f"{checkpoint}_export")
    if not exported.exists():
        export_speculator(read_checkpoint_info(checkpoint), "vllm-eagle3", exported)
    speculation = {"method": "eagle3", "model": str(exported), "num_speculative_tokens": drafts}
    return {"disable_log_stats": False, "speculative_config": speculation | settings}


def drafting(
    route: str, checkpoint: Path, drafts: int, *, sampled: bool = False, export_to: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Settings of an engine that drafts with a checkpoint.

    Args:
        route: V1 or V2; for V2 the checkpoint is exported.
        checkpoint: as training wrote it.
        drafts: draft length.
        sampled: draw drafts from the speculator's distribution where a request samples.
        export_to: directory of the export, by default beside the checkpoint.
        settings: of our proposer on V1, of `speculative_config` on V2.
    """
    speculation: dict[str, Any] = {"method": route, "num_speculative_tokens": drafts}
    if sampled:
        speculation["draft_sample_method"] = "probabilistic"
    engine: dict[str, Any] = {"worker_extension_cls": EXTENSION, "disable_log_stats": False}
    if route == V1:
        speculation["model"] = PROPOSER
        return engine | {
            "speculative_config": speculation,
            "additional_config": {KEY: {"path": str(checkpoint), **settings}},
        }
    exported = export_to or Path(f"{checkpoint}_vllm")
    if not exported.exists():
        export_speculator(read_checkpoint_info(checkpoint), "vllm", exported)
    return engine | {"speculative_config": speculation | {"model": str(exported), **settings}}


def engine_settings(base: Path, **more: Any) -> dict[str, Any]:
    """An engine in float32, so that a near-tie between two tokens is not decided by the shape of a batch."""
    small = {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.4}
    return {"model": str(base), "dtype": "float32", "enforce_eager": True, **small, **more}


def environment(route: str) -> dict[str, str]:
    """The environment of a job."""
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if route == V2 else "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tensors as arguments of collective_rpc
    }
    if on_cuda():
        return variables
    return variables | {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # what is mended is mended in this process
        # V2 runs in Triton's interpreter; V1 must not see the backend that makes it possible.
        **({"TRITON_INTERPRET": "1"} if route == V2 else {"TRITON_BACKENDS_IN_TREE": "1"}),
    }


def start(
    route: str, folder: Path, engine: dict[str, Any], steps: list[dict[str, Any]], **variables: str
) -> subprocess.CompletedProcess:
    """Run a job, with more variables in its environment; its result is `folder/result.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"engine": engine, "steps": steps}))
    return subprocess.run(
        [PYTHON[route], HERE / "vllm_job.py", folder / "job.json", folder / "result.json"],
        env=environment(route) | variables,
        capture_output=True,
        text=True,
    )


def run(route: str, folder: Path, engine: dict[str, Any], steps: list[dict[str, Any]]) -> list[Any]:
    """The results of a job's steps."""
    done = start(route, folder, engine, steps)
    if done.returncode:
        raise AssertionError(f"vLLM ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads((folder / "result.json").read_text())["results"]
