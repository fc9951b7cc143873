"""Plot docs/img/gsm8k_epoch.png from benchmarks/gsm8k_epoch.csv."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SMOOTH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "gsm8k_epoch.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "gsm8k_epoch.png")
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for style, (method, rows) in zip(("-", "--"), table.groupby("method", sort=False), strict=False):
        rows = rows[rows["commit"] == rows["commit"].iloc[-1]].sort_values("step")
        smooth = rows.select_dtypes("number").rolling(SMOOTH, min_periods=1).mean()
        axes[0].plot(rows["step"], smooth["speculator_loss"], "k" + style, label=method)
        for k, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
            accuracy = 100 * smooth[f"depth{k}_accuracy"]
            axes[1].plot(rows["step"], accuracy, style, color=colour, label=f"{method}, depth {k}")
    axes[0].set(xlabel="step", ylabel="cross-entropy, mean over depths", title="loss")
    axes[1].set(xlabel="step", ylabel="top-1 accuracy, %", title="accuracy per depth")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
