"""A comparison as a table, a CSV file and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_speculator.diagnose.comparison import LAYER, Comparison
from verl_speculator.diagnose.module_matching import CallPair, TensorPair
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

if TYPE_CHECKING:
    from rich.console import Console

METRICS = ("mean", "std", "absmax")
CSV_METRICS = (*METRICS, "norm", "nan", "inf")
FILES = ("comparison.csv", "divergence.png", "divergence.pdf")
# Calls before and after the culprit that the table shows.
NEIGHBOURS = 2
# The picture's logarithmic axis draws smaller differences here, and larger ones at the top.
FLOOR, TOP = 1e-17, 10.0


def main_output(call: CallPair) -> TensorPair | None:
    """The output that stands for a call: the first floating point one that is not the cache."""
    pairs = call.output_pairs()
    floats = [pair for pair in pairs if pair[0].is_float and not pair[0].name.startswith("cache.")]
    return next(iter(floats or pairs), None)


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One CSV row for each call that both runs have, in execution order."""
    table = []
    for order, call in enumerate(comparison.traces.calls):
        layer = LAYER.search(call.name)
        row = {
            "order": order,
            "module": call.name,
            "class": call.a.kind,
            "call": call.a.index,
            "layer": layer.group(1) if layer else "",
            "input_difference": call.inputs,
            "output_difference": call.outputs,
            "weights": "differ" if call.weights else "same" if comparison.traces.count_weights(call.name) else "none",
            "culprit": call.name == comparison.verdict.module,
        }
        for letter, stats in zip("ab", main_output(call) or (None, None), strict=True):
            row[f"shape_{letter}"] = "x".join(map(str, stats.shape)) if stats else ""
            row[f"dtype_{letter}"] = stats.dtype if stats else ""
            row |= {f"{metric}_{letter}": getattr(stats, metric, math.nan) for metric in CSV_METRICS}
        table.append(row)
    return table


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `comparison.csv`, `divergence.png` and `divergence.pdf`, and return their paths.

    Raises:
        UserError: if they cannot be written.
    """
    import pandas as pd

    csv, png, pdf = (folder / name for name in FILES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(csv) as path:
            pd.DataFrame(rows(comparison)).to_csv(path, index=False)
        figure = draw(comparison)
        for file, metadata in ((png, {}), (pdf, {"CreationDate": None})):
            with atomic_file(file) as path:
                figure.savefig(path, format=file.suffix[1:], dpi=150, metadata=metadata)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written: {error.strerror or error}") from None
    return [csv, png, pdf]


def draw(comparison: Comparison) -> Any:
    """A figure of the differences of inputs and outputs over the calls, with the tolerance and the culprit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # In the order of their ends, so that no call before the culprit differs.
    calls = sorted(comparison.traces.calls, key=lambda call: call.a.end)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    inputs, outputs = np.clip([[c.inputs for c in calls], [c.outputs for c in calls]], FLOOR, TOP)
    style = {"markersize": 3, "linewidth": 0.8}
    axis.plot(inputs, ".", color="#9A9A9A", label="inputs of a module", **style)
    axis.plot(outputs, "o-", color="#0072B2", label="its outputs", **style)
    axis.axhline(comparison.tolerance, color="#333333", linestyle="--", linewidth=0.8, label="tolerance")
    places = [i for i, call in enumerate(calls) if call.name == comparison.verdict.module]
    if places:
        first = next((i for i in places if calls[i].outputs > comparison.tolerance), places[0])
        axis.plot([first], [outputs[first]], "D", color="#D55E00", label=calls[first].name or "the model")
    ticks = [(i, layer.group(1)) for i, call in enumerate(calls) if (layer := LAYER.search(call.name))]
    ticks = ticks[:: max(1, len(ticks) // 16)]
    axis.set(yscale="log", ylim=(FLOOR / 2, TOP * 3), ylabel="relative difference (floor: none)")
    axis.set_xticks([i for i, _ in ticks], [layer for _, layer in ticks])
    axis.set_xlabel("calls in the order in which they end; numbers are layers")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def show(comparison: Comparison, console: Console, *, everything: bool = False) -> None:
    """Print the verdict, its evidence, and metric | A | B | difference, layer by layer."""
    from rich.table import Table

    verdict = comparison.verdict
    text = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(verdict.sentence, **text)
    for line in (*verdict.evidence, *comparison.notes):
        console.print(f"  · {line}", **text)
    table = Table(box=None, pad_edge=False)
    for name in ("module", "call", "metric", "A", "B", "difference"):
        table.add_column(name, justify="left" if name in ("module", "metric") else "right", no_wrap=True)
    for call in _shown(comparison, everything):
        mark = " ←" if call.name == verdict.module else ""
        table.add_row(f"{call.name or call.a.kind}{mark}", str(call.a.index), "input", "", "", f"{call.inputs:.1e}")
        for metric in METRICS:
            if pair := main_output(call):
                x, y = (getattr(stats, metric) for stats in pair)
                table.add_row("", "", metric, f"{x:.6g}", f"{y:.6g}", f"{y - x:.1e}")
        table.add_row("", "", "output", "", "", f"{call.outputs:.1e}")
    console.print()
    console.print(table)
    tops = (comparison.traces.a.top, comparison.traces.b.top)
    if all(tops):
        top_a, top_b = (", ".join(f"{token} ({logit:.3f})" for token, logit in top) for top in tops)
        console.print(f"\ntop tokens: {top_a} in A; {top_b} in B", **text)


def _shown(comparison: Comparison, everything: bool) -> list[CallPair]:
    """All calls, or the first call of each layer and the calls around the culprit."""
    calls = comparison.traces.calls
    if everything:
        return calls
    culprit = next((i for i, call in enumerate(calls) if call.name == comparison.verdict.module), None)
    near = range(culprit - NEIGHBOURS, culprit + NEIGHBOURS + 1) if culprit is not None else ()
    return [call for i, call in enumerate(calls) if i in near or (LAYER.search(call.name) and call.a.index == 0)]
