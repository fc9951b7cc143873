"""A comparison as a table, a CSV and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.diagnose.comparison import BLOCK, Comparison
from verl_speculator.diagnose.module_matching import Pair, tensor_pairs
from verl_speculator.diagnose.tensor_stats import TensorFacts
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

METRICS = ("mean", "std", "absmax", "norm")
CSV_FILE, PICTURE = "comparison.csv", "divergence"
NEIGHBOURS = 2
# Where a picture draws "no difference".
FLOOR = 1e-17


def main_output(pair: Pair) -> tuple[TensorFacts, TensorFacts] | None:
    """The output that stands for a call: its first floating point one that is not the cache."""
    found = tensor_pairs(pair.a.outputs, pair.b.outputs)
    numbers = [xy for xy in found if xy[0].is_float and not xy[0].name.startswith("cache.")]
    return (numbers or found or [None])[0]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A line for each call that both runs have, in execution order."""
    found = []
    for order, pair in enumerate(comparison.sides.pairs):
        block = BLOCK.search(pair.name)
        row = {
            "order": order,
            "module": pair.name,
            "class": pair.a.kind,
            "call": pair.a.index,
            "layer": block.group(1) if block else "",
            "input_difference": pair.inputs,
            "output_difference": pair.outputs,
            "weights": "differ" if pair.weights else "same" if comparison.sides.count_weights(pair.name) else "none",
            "culprit": pair.name == comparison.verdict.module,
        }
        both = main_output(pair)
        for letter, fact in zip("ab", both or (None, None), strict=True):
            shape = "" if fact is None else "x".join(map(str, fact.shape))
            row |= {f"shape_{letter}": shape, f"dtype_{letter}": fact.dtype if fact else ""}
            row |= {f"{m}_{letter}": getattr(fact, m) if fact else math.nan for m in (*METRICS, "nan", "inf")}
        found.append(row)
    return found


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """`comparison.csv` and `divergence.png` and `.pdf`.

    Returns:
        The files.

    Raises:
        UserError: if they cannot be written.
    """
    import pandas as pd

    written = [folder / CSV_FILE, *(folder / f"{PICTURE}.{suffix}" for suffix in ("png", "pdf"))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(written[0]) as path:
            pd.DataFrame(rows(comparison)).to_csv(path, index=False)
        figure = draw(comparison)
        for file in written[1:]:
            with atomic_file(file) as path:
                metadata = {"CreationDate": None} if file.suffix == ".pdf" else {}
                figure.savefig(path, format=file.suffix[1:], dpi=150, metadata=metadata)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written: {error.strerror or error}") from None
    return written


def draw(comparison: Comparison) -> Any:
    """Divergence of inputs and outputs against depth, with the tolerance and the culprit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Inner calls end before outer ones: so nothing that ends before the culprit differs.
    pairs = sorted(comparison.sides.pairs, key=lambda pair: pair.a.end)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = 10.0
    for key, style, colour, label in (
        ("inputs", ".", "#9A9A9A", "given to a module"),
        ("outputs", "o-", "#0072B2", "made by it"),
    ):
        values = [min(max(getattr(pair, key), FLOOR), top) for pair in pairs]
        axis.plot(range(len(pairs)), values, style, color=colour, label=label, markersize=3, linewidth=0.8)
    axis.axhline(comparison.tolerance, color="#333333", linestyle="--", linewidth=0.8, label="tolerance")
    places = [i for i, pair in enumerate(pairs) if pair.name == comparison.verdict.module]
    if places:
        first = next((i for i in places if pairs[i].outputs > comparison.tolerance), places[0])
        mark = min(max(pairs[first].outputs, FLOOR), top)
        axis.plot([first], [mark], "D", color="#D55E00", label=pairs[first].name or "the model")
    ticks = [i for i, pair in enumerate(pairs) if BLOCK.search(pair.name)]
    ticks = ticks[:: max(1, len(ticks) // 16)]
    labels = [f"{BLOCK.search(pairs[i].name).group(1)}" for i in ticks]
    axis.set(yscale="log", ylim=(FLOOR / 2, top * 3), ylabel="relative difference (floor: none)")
    axis.set_xticks(ticks, labels)
    axis.set_xlabel("calls in the order in which they end; numbers are layers")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def show(comparison: Comparison, console: Console, *, everything: bool = False) -> None:
    """The verdict, its evidence, and metric | A | B | difference, layer by layer."""
    from rich.table import Table

    verdict = comparison.verdict
    console.print(verdict.sentence, markup=False, highlight=False, soft_wrap=True)
    for line in (*verdict.evidence, *comparison.notes):
        console.print(f"  · {line}", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("module", "call", "metric", "A", "B", "difference"):
        table.add_column(name, justify="right" if name in ("A", "B", "difference", "call") else "left", no_wrap=True)
    for pair in _shown(comparison, everything):
        mark = " ←" if pair.name == verdict.module else ""
        table.add_row(f"{pair.name or pair.a.kind}{mark}", str(pair.a.index), "given", "", "", f"{pair.inputs:.1e}")
        for metric in METRICS[:3]:
            if both := main_output(pair):
                x, y = (getattr(fact, metric) for fact in both)
                table.add_row("", "", metric, f"{x:.6g}", f"{y:.6g}", f"{y - x:.1e}")
        table.add_row("", "", "made", "", "", f"{pair.outputs:.1e}")
    console.print()
    console.print(table)
    a, b = comparison.sides.a.top, comparison.sides.b.top
    if a and b:
        console.print(f"\ntop tokens: {_top(a)} in A; {_top(b)} in B", markup=False, highlight=False, soft_wrap=True)


def _shown(comparison: Comparison, everything: bool) -> list[Pair]:
    """All calls, or the layers and what lies around the culprit."""
    pairs = comparison.sides.pairs
    if everything:
        return pairs
    culprit = next((i for i, p in enumerate(pairs) if p.name == comparison.verdict.module), None)
    near = range(culprit - NEIGHBOURS, culprit + NEIGHBOURS + 1) if culprit is not None else ()
    return [p for i, p in enumerate(pairs) if i in near or (BLOCK.search(p.name) and p.a.index == 0)]


def _top(top: tuple[tuple[int, float], ...]) -> str:
    return ", ".join(f"{token} ({logit:.3f})" for token, logit in top)
