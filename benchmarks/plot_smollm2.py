"""Plot docs/img/smollm2.png: speed and tokens per pass of a real chat model, and tokens per pass over training time.

python benchmarks/plot_smollm2.py [--evaluation results.csv …] [--minutes training_minutes.csv] [--runs NAME …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def label(row: pd.Series) -> str:
    """Name of a row of `evaluate`'s results."""
    if row["method"] in ("none", "generate"):
        return {"none": "base model alone", "generate": "transformers' generate"}[row["method"]]
    name = row["speculator"].replace("_", " ") if row["method"] == "prompt_lookup" else row["speculator"]
    return f"{name}, {row['draft_shape']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = ROOT / "benchmarks"
    evaluations = [folder / "evaluation_smollm2" / f"bf16_threads_1{name}.csv" for name in ("", "_auto")]
    parser.add_argument("--evaluation", type=Path, nargs="+", default=evaluations)
    parser.add_argument("--runs", nargs="+", default=["recipe small", "default tables"])
    parser.add_argument("--minutes", type=Path, default=folder / "training_minutes.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "smollm2.png")
    args = parser.parse_args()
    # The base model alone belongs to every evaluation; the first one's is shown.
    rows = pd.concat(map(pd.read_csv, args.evaluation)).drop_duplicates(["speculator", "draft_shape"])
    minutes = pd.read_csv(args.minutes)
    figure, (speed, training) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True, width_ratios=[3, 2])
    rows = rows[::-1]
    rate = rows["speculative_tokens_per_s"]
    error = [rate - rows["speculative_tokens_per_s_lo"], rows["speculative_tokens_per_s_hi"] - rate]
    colours = ["tab:gray" if name in ("none", "generate", "prompt_lookup") else "tab:blue" for name in rows["method"]]
    speed.barh(rows.apply(label, axis=1), rate, xerr=error, color=colours, height=0.7, ecolor="0.4")
    for place, (_, row) in enumerate(rows.iterrows()):
        text = f"τ {row['tau']:.2f}, × {row['speedup']:.2f}"
        speed.text(0.3, place, text, va="center", color="white", fontsize=8)
    speed.set(xlabel="tokens per second", title="SmolLM2-135M in bf16 on a CPU core, batch 1")
    for name, group in minutes[minutes["name"].isin(args.runs)].groupby("name", sort=False):
        training.plot(group["minutes_of_step"], group["tau"], "o-", label=name)
    training.set(xlabel="minutes of training on one core", ylabel="tokens per pass (τ)", title="chain of five drafts")
    training.legend(fontsize=8, frameon=False)
    for axis in (speed, training):
        axis.grid(alpha=0.3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
