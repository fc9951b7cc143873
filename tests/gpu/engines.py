"""A vLLM engine as the tests and the benchmark ask for it: a job in, results out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl_speculator.vllm_plugin.compat import KEY, PROPOSER

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXTENSION = "verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension"


def on_cuda() -> bool:
    """Whether there is a GPU for vLLM; a build of vLLM for CPUs runs without."""
    import torch

    return torch.cuda.is_available()


def drafting(checkpoint: Path, drafts: int, **settings: Any) -> dict[str, Any]:
    """What an engine is told, to draft with a checkpoint through our proposer."""
    return {
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": drafts},
        "additional_config": {KEY: {"path": str(checkpoint), **settings}},
        "worker_extension_cls": EXTENSION,
    }


def engine_settings(base: Path, **more: Any) -> dict[str, Any]:
    """An engine in float32, so that a near-tie between two tokens is not decided by the shape of a batch."""
    small = {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.4}
    return {"model": str(base), "dtype": "float32", "enforce_eager": True, **small, **more}


def start(folder: Path, engine: dict[str, Any], steps: list[dict[str, Any]]) -> subprocess.CompletedProcess:
    """Run a job; its result is `folder/result.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"engine": engine, "steps": steps}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tensors as arguments of collective_rpc
    }
    if not on_cuda():
        environment |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # what is mended is mended in this process
        }
    return subprocess.run(
        [sys.executable, HERE / "vllm_job.py", folder / "job.json", folder / "result.json"],
        env=environment,
        capture_output=True,
        text=True,
    )


def run(folder: Path, engine: dict[str, Any], steps: list[dict[str, Any]]) -> list[Any]:
    """The results of a job's steps."""
    done = start(folder, engine, steps)
    if done.returncode:
        raise AssertionError(f"vLLM ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads((folder / "result.json").read_text())["results"]
