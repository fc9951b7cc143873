"""Training speed and memory with glibc's default allocator thresholds and with those that the launcher sets on a CPU.

    python benchmarks/allocator.py BASE TRAIN.parquet [--pairs 3] [--out benchmarks/allocator.csv]

A row is one short run: the median of tokens per second over its steps except the first, and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import append_rows, environment
from rich.console import Console

from verl_speculator.preflight.launch import torchrun_command
from verl_speculator.utils.process import CPU_ALLOCATOR

ROOT = Path(__file__).resolve().parents[1]


def run(base: Path, train: Path, steps: int, threads: int, setting: dict[str, str]) -> dict[str, float]:
    """One short training run with the given allocator setting."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        overrides = [
            *(f"model.partial_pretrain={base}", f"data.train_files={train}", "data.train_batch_size=32"),
            *(f"model.speculator.{name}_dim=256" for name in ("inner", "emb", "proj")),
            *("model.speculator.n_predict=3", f"trainer.total_training_steps={steps}", "trainer.logger=file"),
            *("trainer.device=cpu", f"trainer.default_local_dir={folder}/run"),
        ]
        clean = {name: value for name, value in os.environ.items() if name not in CPU_ALLOCATOR}
        more = {"VERL_FILE_LOGGER_PATH": str(log), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        subprocess.run(torchrun_command(1, overrides, {}), check=True, env=clean | more | setting, capture_output=True)
        data = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    return {
        "tokens_per_second": round(statistics.median(d["perf/tokens_per_second"] for d in data[1:]), 1),
        "peak_memory_gb": round(data[-1]["perf/max_memory_allocated_gb"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "allocator.csv")
    args = parser.parse_args()
    where, rows = environment(), []
    for pair in range(args.pairs):
        for name, setting in (("glibc's default", {}), ("launcher's", CPU_ALLOCATOR)):
            metrics = run(args.base, args.train, args.steps, args.threads, setting)
            rows.append({"pair": pair, "setting": name, "threads": args.threads, "steps": args.steps} | metrics | where)
    append_rows(args.out, rows)
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    Console(file=sys.stdout).print(
        f"tokens per second, launcher's over default: median {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
