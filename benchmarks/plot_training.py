"""Plots of memory, speed and objectives in docs/results.md, from the CSV files."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"ours": "tab:blue", "plain": "tab:grey"}


def memory(rows: pd.DataFrame) -> Figure:
    """Peak memory against K and against V, of our loss and of the plain loop."""
    rows = rows[rows["setting"].str.contains(",")].drop_duplicates(["setting", "impl"], keep="last")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    for axis, kind, column, label in zip(
        axes, ("K", "V"), ("depths", "vocab"), ("draft length K", "vocabulary"), strict=True
    ):
        for impl, name in (("plain", "plain loop"), ("ours", "speculator_loss")):
            points = rows[rows["setting"].str.contains(f"{kind}=") & (rows["impl"] == impl)].sort_values(column)
            axis.plot(points[column], points["peak_gb"], "o-", color=COLOURS[impl], label=name)
        axis.set(xlabel=label, ylabel="peak of the loss, GB", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def speed(rows: pd.DataFrame) -> Figure:
    """Tokens per second of a step by vocabulary and loss."""
    rows = rows[rows["contender"] != "base forward"]
    rows = rows.drop_duplicates(["vocab", "k", "method", "loss", "compile", "contender"], keep="last")
    groups = list(rows.groupby(["method", "vocab", "k", "loss", "compile"], sort=False))
    figure, axis = plt.subplots(figsize=(10, 3.4), constrained_layout=True)
    for i, (_, group) in enumerate(groups):
        for j, row in enumerate(group.itertuples()):
            colour = ("tab:grey", "tab:blue", "tab:cyan")[j]
            bar = axis.bar(
                i + 0.27 * (j - 1), row.against_plain, 0.25, color=colour, label=row.contender if i == 0 else ""
            )
            axis.bar_label(bar, [f"{row.tokens_per_second:,.0f}/s"], fontsize=8)
    names = [
        f"{method}, V={vocab // 1000}k, K={k}\n{loss}{', compiled' if compiled else ''}"
        for (method, vocab, k, loss, compiled), _ in groups
    ]
    axis.set(ylabel="speed of a step, plain loop = 1", xticks=range(len(groups)), xticklabels=names)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    return figure


def objective(rows: pd.DataFrame) -> Figure:
    """Accepted drafts per round of each recipe at the learning rate with the most seeds; a dot is a seed."""
    means = rows.groupby(["recipe", "steps", "lr"])["tau"].agg(["mean", "size"]).reset_index()
    best = means.sort_values(["size", "mean"]).drop_duplicates(["recipe", "steps"], keep="last")
    best = best.rename(columns={"mean": "tau"}).sort_values("tau")
    figure, axis = plt.subplots(figsize=(10, 0.4 * len(best) + 1), constrained_layout=True)
    for i, row in enumerate(best.itertuples()):
        seeds = rows[(rows["recipe"] == row.recipe) & (rows["steps"] == row.steps) & (rows["lr"] == row.lr)]
        axis.barh(i, row.tau - 1, color="tab:blue", alpha=0.5)
        axis.plot(seeds["tau"] - 1, [i] * len(seeds), "k.")
    names = [f"{row.recipe}, lr {row.lr:g}, {row.steps} steps" for row in best.itertuples()]
    axis.set(yticks=range(len(best)), yticklabels=names, xlabel="accepted drafts per round, E[accepted] = τ − 1")
    axis.grid(axis="x", alpha=0.3)
    return figure


PICTURES = {"training_memory": memory, "training_speed": speed, "objective": objective}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks", help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        if (args.folder / f"{name}.csv").exists():
            draw(pd.read_csv(args.folder / f"{name}.csv")).savefig(args.out / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
