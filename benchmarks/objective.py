"""τ on held-out prompts for different training objectives, at equal steps, conversations and given learning rates.

    python benchmarks/objective.py BASE TRAIN.parquet PROMPTS.parquet [--recipes ce,kl,lk] [--lr 1e-3,3e-3] [--seeds 1]
        [--regenerated TRAIN_BASE.parquet] [--steps 300] [--jobs 2]
    python benchmarks/objective.py --summary

A row of the CSV is one training run, through the launcher, and its evaluation. A recipe is a loss, or several joined by
+, followed by options separated by commas:

    own        the base model's answers (--regenerated) instead of those in TRAIN
    base       embedding and heads start from the base model's
    decay0.4   depth k has weight 0.4^k
    reach, gain    pairs are weighted by the acceptance of their row
    scale      model.speculator.scale_input=true
    beta0.95   Adam's second beta

`recommended` is verl_speculator/config/recipes/acceptance.txt, on the base model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from common import append_rows, environment
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
K = 5
RECOMMENDED = ROOT / "verl_speculator" / "config" / "recipes" / "acceptance.txt"
LOCK = threading.Lock()


def recipe(name: str) -> tuple[list[str], bool]:
    """Overrides of a recipe such as `kl+lk,own,decay0.4`, and whether it trains on the base model's answers."""
    if name == "recommended":
        lines = RECOMMENDED.read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")], True
    loss, *parts = name.split(",")
    mix = ", ".join(f"{one}: 1.0" for one in loss.split("+"))
    overrides = [f"model.speculator.loss={{{mix}}}"]
    for part in parts:
        if part == "base":
            overrides.append("model.speculator.init=base")
        elif part == "scale":
            overrides.append("model.speculator.scale_input=true")
        elif part.startswith("beta"):
            overrides.append(f"optim.betas=[0.9,{part.removeprefix('beta')}]")
        elif part in ("reach", "gain"):
            overrides.append(f"model.speculator.depth_weights={part}")
        elif part.startswith("decay"):
            weights = [float(part.removeprefix("decay")) ** k for k in range(K)]
            overrides.append(f"model.speculator.depth_weights=[{','.join(f'{weight:.4g}' for weight in weights)}]")
        elif part != "own":
            raise SystemExit(
                f"recipe {name}: unknown part {part}; expected own, base, scale, reach, gain, decay…, beta…"
            )
    return overrides, "own" in parts


def run(args: argparse.Namespace, name: str, lr: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one recipe."""
    overrides, use_regenerated = recipe(name)
    threads = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        dims = [f"model.speculator.{which}_dim=256" for which in ("inner", "emb", "proj")]
        start = time.monotonic()
        subprocess.run(
            [
                *(
                    str(ROOT / "run_speculator_training.sh"),
                    "1",
                    f"{folder}/run",
                    f"model.partial_pretrain={args.base}",
                ),
                f"data.train_files={args.regenerated if use_regenerated else args.train}",
                *("data.train_batch_size=8", "data.micro_batch_size_per_gpu=8", *dims, *overrides),
                *([] if lr == "own" else [f"optim.lr={lr}"]),
                *(f"trainer.total_training_steps={args.steps}", f"trainer.seed={seed}", "trainer.logger=file"),
                *(f"model.speculator.n_predict={K}", f"model.speculator.method={args.method}", "trainer.test_freq=-1"),
            ],
            check=True,
            env=threads | {"VERL_FILE_LOGGER_PATH": str(log)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wall = time.monotonic() - start
        subprocess.run(
            [
                *(sys.executable, "-m", "verl_speculator", "evaluate", "--base", args.base, "--out", f"{folder}/out"),
                *("--speculator", f"{folder}/run", "--prompts", args.prompts, "--num-prompts", str(args.num_prompts)),
                *("--baselines", "", "--no-plots", "--max-new-tokens", "96"),
            ],
            check=True,
            env=threads,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        evaluation = pd.read_csv(f"{folder}/out/results.csv").iloc[0]
        steps = [json.loads(line)["data"] for line in log.read_text().splitlines()]
        last = steps[-1]
        speed = statistics.median(step["perf/tokens_per_second"] for step in steps)
    figures = ("tau", "tau_lo", "tau_hi", "accept_rate", *(f"accept_depth_{k}" for k in range(K)), "speedup")
    return {
        "recipe": name,
        "method": args.method,
        "lr": max(step["train/lr"] for step in steps),
        "seed": seed,
        "steps": args.steps,
        "batch": 8,
        **{figure: round(float(evaluation[figure]), 4) for figure in figures},
        "train_loss": round(last["train/loss"], 4),
        "train_seconds": round(wall, 1),
        "tokens_per_second": round(speed, 1),
        "prompts": int(evaluation["prompts_used"]),
    }


def summarise(path: Path) -> None:
    """τ by recipe and learning rate, from the CSV."""
    rows = pd.read_csv(path)
    table = Table(title=f"{path.name}: E[accepted] = τ − 1, means over seeds")
    for name in ("family", "recipe", "lr", "steps", "seeds", "τ", "τ − 1 against ce at its best", "depth 0", "depth 4"):
        table.add_column(name, justify="left" if name in ("family", "recipe") else "right", overflow="fold")
    means = rows.groupby(["method", "recipe", "lr", "steps"], sort=False).agg(
        tau=("tau", "mean"),
        seeds=("seed", "nunique"),
        first=("accept_depth_0", "mean"),
        last=("accept_depth_4", "mean"),
    )
    means = means.sort_index()
    plain = means.query("recipe == 'ce'").tau.max() - 1
    for (method, name, lr, steps), row in means.sort_values("tau").iterrows():
        cells = (f"{row.tau:.3f}", f"{(row.tau - 1) / plain - 1:+.1%}", f"{row['first']:.1%}", f"{row['last']:.1%}")
        table.add_row(method, name, f"{lr:g}", f"{steps}", f"{row.seeds:.0f}", *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("train", nargs="?")
    parser.add_argument("prompts", nargs="?")
    parser.add_argument("--regenerated")
    parser.add_argument("--recipes", default="ce kl lk", help="separated by spaces")
    parser.add_argument("--method", default="sum_rnn")
    parser.add_argument("--lr", default="1e-3,3e-3", help="separated by commas; own for the recipe's learning rate")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-prompts", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "objective.csv")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        where = environment()
        points = list(product(args.recipes.split(), args.lr.split(","), map(int, args.seeds.split(","))))

        def one(point: tuple[str, str, int]) -> None:
            row = run(args, *point)
            with LOCK:
                append_rows(args.out, [row | where])
                Console().print({name: row[name] for name in ("recipe", "lr", "seed", "tau", "train_seconds")})

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, points))
    summarise(args.out)


if __name__ == "__main__":
    main()
