"""One epoch on GSM8K with a small base model, for sum_rnn and sum_lstm: the figures of docs/results.md.

    python benchmarks/gsm8k_epoch.py BASE TRAIN.parquet TEST.parquet [--out benchmarks/gsm8k_epoch.csv]

A row is one logged step of one run; rows of the last step hold the validation too. Runs start through the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import append_rows, environment
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
METRICS = [
    *("speculator_loss", "expected_accept_length"),
    *(f"depth{k}_{what}" for k in range(3) for what in ("loss", "accuracy")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gsm8k_epoch.csv")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    where = environment()
    for method in ("sum_rnn", "sum_lstm"):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.jsonl"
            dims = [f"model.speculator.{name}_dim=256" for name in ("inner", "emb", "proj")]
            command = [
                *(ROOT / "run_speculator_training.sh", 1, Path(folder) / "run", f"model.partial_pretrain={args.base}"),
                *(f"data.train_files={args.train}", f"data.val_files={args.test}", "data.train_batch_size=32"),
                *("optim.lr=1e-3", "model.speculator.n_predict=3", f"model.speculator.method={method}", *dims),
                *(f"trainer.seed={args.seed}", "trainer.logger=file"),
            ]
            start = time.monotonic()
            subprocess.run(
                list(map(str, command)),
                check=True,
                env=os.environ | {"PYTHON": sys.executable, "VERL_FILE_LOGGER_PATH": str(log)},
            )
            wall = time.monotonic() - start
            steps = [json.loads(line) for line in log.read_text().splitlines()]
        rows = []
        for entry in steps:
            data = entry["data"]
            row = {"method": method, "seed": args.seed, "step": entry["step"], "steps": len(steps)}
            row |= {name: round(data[f"train/{name}"], 6) for name in METRICS}
            row |= {f"val_{name}": round(data[f"val/{name}"], 6) if f"val/{name}" in data else "" for name in METRICS}
            row |= {
                "tokens_per_second": round(data["perf/tokens_per_second"], 1),
                "peak_memory_gb": round(data["perf/max_memory_allocated_gb"], 3),
                "wall_seconds": round(wall, 1),
            }
            rows.append(row | where)
        append_rows(args.out, rows)
        Console().print(rows[-1])


if __name__ == "__main__":
    main()
