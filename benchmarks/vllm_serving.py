"""Tokens per second of vLLM with speculators and without, by batch size.

    python benchmarks/vllm_serving.py BASE CHECKPOINT [CHECKPOINT ...] --prompts test.parquet --batch 1,4,16

Needs vLLM (docs/rollout.md), for CUDA or for CPUs, whose V2 runner is interpreted and says nothing about speed. Greedy,
first messages alone, without prefix caching. Each batch size and checkpoint has a process, in which vLLM with drafts
and vLLM alone take turns; a row holds the medians of the trials, each side by its own tokens, and the share of the time
that drafting takes in one more. On a CPU set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ as the launcher does.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import append_rows, environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import engines

from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.vllm_plugin.acceptance import engine_counts
from verl_speculator.vllm_plugin.compat import installed_vllm, minor_version

ROUTES = {"V1": engines.V1, "V2": engines.V2}


def generate(model: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    """Token ids of the answers, and the seconds taken."""
    from vllm import SamplingParams

    start = time.perf_counter()
    inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
    outputs = model.generate(inputs, SamplingParams(temperature=0, max_tokens=count, detokenize=False), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - start


def drafting_class(route: str, drafts: int) -> type:
    """The class whose `propose` makes the drafts of a step."""
    if route == engines.V1:
        from verl_speculator.vllm_plugin.proposer import SpeculatorProposer

        return SpeculatorProposer
    if drafts == 1:
        from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator

        return MTPSpeculator
    from vllm.v1.worker.gpu.spec_decode.multi_module_mtp.speculator import MultiModuleMTPSpeculator

    return MultiModuleMTPSpeculator


@contextmanager
def clocked(kind: type) -> Iterator[list[float]]:
    """The seconds of every call of a class's `propose`, with the device's work before it done."""
    import torch

    original, seconds = kind.propose, []

    def propose(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        drafts = original(self, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return drafts

    kind.propose = propose
    try:
        yield seconds
    finally:
        kind.propose = original


def measure(args: argparse.Namespace, version: str, runner: str, batch: int, checkpoint: Path) -> None:
    """The row of one batch size and checkpoint, in a process of its own, whose end frees both engines."""
    from vllm import LLM

    if not engines.on_cuda():
        import cpu_vllm

        cpu_vllm.mend()
    route, config = ROUTES[runner], read_checkpoint_info(checkpoint).config
    prompts = engines.chat_prompts(args.base, args.prompts, longest=args.max_model_len - args.max_new_tokens)
    prompts = prompts[-args.count :]
    common = {"model": str(args.base), "dtype": args.dtype, "max_model_len": args.max_model_len, "max_num_seqs": batch}
    common |= {"gpu_memory_utilization": 0.4, "disable_log_stats": False, "enforce_eager": not engines.on_cuda()}
    common |= {"enable_prefix_caching": False}  # every trial reads the same prompts
    gate = {"draft_up_to": batch} if route == engines.V1 else {}
    with tempfile.TemporaryDirectory() as folder:
        speculation = engines.drafting(
            route, checkpoint.resolve(), config.n_predict, export_to=Path(folder) / "export", **gate
        )
        engine = {"alone": LLM(**common), "drafting": LLM(**common | speculation)}
    drafting = engine["drafting"]
    for model in engine.values():
        generate(model, prompts, args.max_new_tokens)
    before = engine_counts(drafting.get_metrics())
    speeds: dict[str, list[float]] = {side: [] for side in engine}
    text: dict[str, list[list[int]]] = {}
    for _ in range(args.trials):
        for side, model in engine.items():
            text[side], took = generate(model, prompts, args.max_new_tokens)
            speeds[side].append(sum(map(len, text[side])) / took)
    after = engine_counts(drafting.get_metrics())
    with clocked(drafting_class(route, config.n_predict)) as drafting_seconds:
        _, took = generate(drafting, prompts, args.max_new_tokens)
    rounds = after["rounds"] - before["rounds"]
    accepted = [
        (late - early) / rounds
        for early, late in zip(before["accepted_per_position"], after["accepted_per_position"], strict=True)
    ]
    row = {
        "vllm": version,
        "runner": runner,
        "base": args.base.name,
        "method": config.method,
        "checkpoint": checkpoint.name,
        "n_predict": config.n_predict,
        "dtype": args.dtype,
        "prompts": len(prompts),
        "batch": batch,
        "same_text": sum(a == b for a, b in zip(text["alone"], text["drafting"], strict=True)),
        "accepted_length": round(1 + sum(accepted), 4),
        "accepted_per_position": "/".join(f"{share:.3f}" for share in accepted),
        **{f"tokens_per_s_{side}": round(statistics.median(values), 1) for side, values in speeds.items()},
        "speedup": round(statistics.median(b / a for a, b in zip(speeds["alone"], speeds["drafting"], strict=True)), 3),
        "drafting_share": round(sum(drafting_seconds) / took, 3),
        "trials": args.trials,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        **environment(),
    }
    sys.stdout.write(f"{row}\n")
    append_rows(args.out, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=16, help="prompts, the last of the file")
    parser.add_argument("--batch", default="1,4,16", help="requests at a time")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--dtype", default="float32" if not engines.on_cuda() else "bfloat16")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--route", choices=ROUTES, help="by default that of the installed vLLM")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("vllm_serving_by_batch.csv"))
    args = parser.parse_args()
    version = installed_vllm()
    if version is None:
        parser.error("vLLM is not installed in this environment (docs/rollout.md)")
    runner = args.route or ("V2" if minor_version(version) >= (0, 29) else "V1")
    # The engines run in the process that measures, where the drafter's clock is.
    os.environ.update(engines.environment(ROUTES[runner]) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    for batch, checkpoint in itertools.product(map(int, args.batch.split(",")), args.checkpoints):
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(args, version, runner, batch, checkpoint)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
