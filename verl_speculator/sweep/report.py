"""From the points' records to `results.csv`, and the tables that a person reads. A plot needs no more than the CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.config.schema import DIM_KEYS
from verl_speculator.evaluation.plot_data import COLOURS, MARKERS, PlotRow, PlotStyle, read_tables
from verl_speculator.evaluation.plots import (
    AXIS,
    PLOTS,
    add_legend,
    draw,
    draw_intervals,
    every_figure,
    interval,
    line_handles,
    marker_style,
)
from verl_speculator.evaluation.plots import sheet as make_sheet
from verl_speculator.sweep.grid import columns_of, labels_of, short_names, shown
from verl_speculator.sweep.trial import DONE, WAITING, Trial
from verl_speculator.utils.atomic_io import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RESULTS = "results.csv"
# The axes stand between the first of these and the others.
FIRST = "point"
FOLLOWING = ("status", "reason", "training_seconds", "steps", "final_loss", "checkpoint", "parameters", "log")
# How much worse than the best is as good.
NEAR = 0.02
Row = dict[str, Any]


def write_results(out: Path, trials: Sequence[Trial]) -> list[Row]:
    """Write and return a row for each point, the ones that still wait too."""
    axes = columns_of([trial.values for trial in trials])
    rows = [_row(trial, axes) for trial in trials]
    columns = list(dict.fromkeys([FIRST, *axes, *FOLLOWING, *(name for row in rows for name in row)]))
    with atomic_file(out / RESULTS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _row(trial: Trial, axes: Sequence[str]) -> Row:
    training, figures = trial.training(), trial.evaluation().get("figures", {})
    row = {FIRST: trial.label} | {name: shown(trial.values[name]) for name in axes if name in trial.values}
    row |= {name: training.get(name) for name in FOLLOWING} | {"status": trial.status, "reason": trial.reason}
    row["log"] = trial.evaluation().get("log") or training.get("log")
    # For the plots of the evaluation a point is a speculator.
    base, prompts = trial.measurements[0].arguments[1], next(iter(trial.measurements[0].behaviour))
    return {**row, "base": base, "prompts": prompts} | figures | {"speculator": trial.label}


def number(row: Row, name: str) -> float:
    """A figure of a row, NaN where it has none."""
    try:
        return float(row.get(name) if row.get(name) is not None else math.nan)
    except ValueError:
        return math.nan


def answers(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Which point to take: for τ and for the speedup the best, and the smallest one that is hardly worse."""
    found = []
    for name, called in (("tau", "τ"), ("speedup", "speedup")):
        known = [row for row in rows if row["status"] == DONE and math.isfinite(number(row, name))]
        if not known:
            continue
        best = max(known, key=lambda row: number(row, name))
        near = [row for row in known if number(row, name) >= (1 - NEAR) * number(best, name)]
        found.append((f"best {called}", best))
        smallest = min(near, key=lambda row: (number(row, "parameters"), -number(row, name)))
        found.append((f"smallest within {NEAR:.0%} of it", smallest))
    return found


def print_points(trials: Sequence[Trial], console: Any) -> None:
    """What a sweep would do."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{len(trials)} points, {sum(trial.status != DONE for trial in trials)} to be trained or measured"
    )
    for name in ("#", "point", "status", "directory"):
        table.add_column(name, overflow="fold")
    for i, trial in enumerate(trials, 1):
        table.add_row(str(i), escape(trial.label), trial.status, escape(str(trial.directory)))
    console.print(table)


def print_results(rows: Sequence[Row], console: Any) -> None:
    """All points, best τ first, then which one to take, then what failed."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, first: Sequence[str], lines: Sequence[tuple[Sequence[str], Row]]) -> None:
        made = Table(title=title)
        figures = [name for name in _FIGURES if any(_FIGURES[name](row) != "–" for _, row in lines)]
        for name in first:
            made.add_column(name, overflow="fold")
        for name in figures:
            made.add_column(name, justify="right", no_wrap=True)
        for cells, row in lines:
            made.add_row(*map(escape, cells), *(_FIGURES[name](row) for name in figures))
        console.print(made)

    done = sorted((row for row in rows if row["status"] == DONE), key=lambda row: -_or_least(number(row, "tau")))
    if done:
        table("Points", ("point",), [((row[FIRST],), row) for row in done])
        table("Which one to train", ("", "point"), [((what, row[FIRST]), row) for what, row in answers(done)])
    for row in rows:
        if row["status"] not in (DONE, WAITING):
            told = f"{row['status']}: {row[FIRST]}: {row['reason']} ({row['log']})"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _cell(name: str, form: str, interval: bool = False) -> Any:
    def text(row: Row) -> str:
        value, low, high = (number(row, name + end) for end in ("", "_lo", "_hi"))
        if not math.isfinite(value):
            return "–"
        around = f" [{form.format(low)}, {form.format(high)}]" if interval and math.isfinite(low) else ""
        return form.format(value) + around

    return text


def _same_text(row: Row) -> str:
    """How many greedy texts are the base's own; sampled ones differ from run to run."""
    if number(row, "temperature") != 0 or not number(row, "runs") > 0:
        return "–"
    return f"{number(row, 'identical'):.0f} of {number(row, 'runs'):.0f}"


_FIGURES = {
    "τ": _cell("tau", "{:.2f}", interval=True),
    "accepted": _cell("accept_rate", "{:.1%}"),
    "speedup": _cell("speedup", "{:.2f}", interval=True),
    "same text": _same_text,
    "KL": _cell("kl", "{:.3f}"),
    "CE": _cell("ce", "{:.2f}"),
    "top-1": _cell("top1", "{:.1%}"),
    "parameters": _cell("parameters", "{:,.0f}"),
    "training": _cell("training_seconds", "{:,.1f} s"),
}

QUALITY, ACCEPTANCE = ("kl", "ce", "top1"), ("accepted", "accept_rate", "tv")
NAMES = AXIS | {
    "accepted": "drafts accepted per round",
    "accept_rate": "acceptance rate",
    "tv": "total variation, 1 − overlap",
}
# Values that reach further than this want a logarithmic axis.
FAR = 20.0
LINES = 10
# With more points than this, the pictures that have a bar or a line for each point and depth can't be read.
CROWD = 20
OF_A_CROWD = ("speedup_against_quality",)


@dataclass(frozen=True)
class Table:
    """Rows of the points that are done, and the names of their axes."""

    axes: tuple[str, ...]
    rows: tuple[dict[str, str], ...]


def is_sweep(directory: Path) -> bool:
    """Whether the table in a directory is a sweep's."""
    try:
        with (directory / RESULTS).open(newline="") as file:
            return FIRST in next(csv.reader(file), [])[:1]
    except OSError:
        return False


def read_table(directory: Path) -> Table:
    """The table of a sweep; its axes stand between the label and the status."""
    with (directory / RESULTS).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = tuple(row for row in reader if row["status"] == DONE)
        names = list(reader.fieldnames or [])
    return Table(tuple(names[1 : names.index(FOLLOWING[0])]), rows)


def plot_sweep(directory: Path) -> list[Path]:
    """Draw every plot for which the table has data; nothing where no point is done.

    Returns:
        The files written, `plots/<name>.png` and `plots/<name>.pdf` for each plot.

    Raises:
        UserError: if the table has other columns, or the directory cannot be written.
    """
    table = read_table(directory)
    if not table.rows:
        return []
    results, _ = read_tables(directory)

    def figures() -> Iterator[tuple[str, Figure]]:
        drawn = every_figure(results, [])
        crowd = len(table.rows) > CROWD
        yield from (each for each in drawn if not crowd or each[0] in OF_A_CROWD)
        yield from axis_figures(table)

    return draw(directory / PLOTS, figures)


def axis_figures(table: Table) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each numeric axis against quality, acceptance, and the histogram of accepted lengths."""
    for name in table.axes:
        if not _is_numeric(table, name):
            continue
        short = short_names(table.axes)[name].replace(".", "_")
        for kind, metrics in (("quality", QUALITY), ("acceptance", ACCEPTANCE)):
            figure = against(table, name, metrics)
            if figure is not None:
                yield f"{short}_{kind}", figure
        figure = histograms(table, name)
        if figure is not None:
            yield f"{short}_histogram", figure


def _is_numeric(table: Table, name: str) -> bool:
    """Whether an axis has several values, all of them numbers; a width of several layers is none."""
    values = {row[name] for row in table.rows if row[name]}
    layers = name.rsplit(".", 1)[-1] in DIM_KEYS and any("." in value for value in values)
    return len(values) > 1 and not layers and all(math.isfinite(number({name: value}, name)) for value in values)


def _lines(table: Table, name: str) -> dict[str, list[dict[str, str]]]:
    """The rows along an axis: one line for each combination of the other axes, under its name, in order of the axis."""
    others = [{axis: row[axis] for axis in table.axes if axis != name and row[axis]} for row in table.rows]
    labels = labels_of(others) if any(others) else [""] * len(others)
    lines: dict[str, list[dict[str, str]]] = {}
    for label, row in zip(labels, table.rows, strict=True):
        if row[name]:
            lines.setdefault(label, []).append(row)
    return {label: sorted(rows, key=lambda row: number(row, name)) for label, rows in lines.items()}


def _sets(table: Table, metrics: Sequence[str], first: str) -> dict[str, str]:
    """What follows a figure's name in the columns of each prompt set or text, with the set's own name."""
    ends = [name.partition("@")[2] for name in table.rows[0] if name.partition("@")[0] in metrics and "@" in name]
    return {"": Path(table.rows[0].get(first) or "").stem} | {f"@{end}": end for end in ends}


def against(table: Table, name: str, metrics: Sequence[str]) -> Figure | None:
    """A panel for each figure, a row of them for each prompt set or text, a line for each of the other axes' values."""
    sets = _sets(table, metrics, "text" if metrics == QUALITY else "prompts")
    shown = [metric for metric in metrics if any(math.isfinite(number(row, metric)) for row in table.rows)]
    lines = _lines(table, name)
    if not shown:
        return None
    figure, axes = make_sheet(len(sets), len(shown), {1: 5.0, 2: 3.6}.get(len(shown), 3.0), 2.5)
    looks = _looks(lines)
    for i, (end, called) in enumerate(sets.items()):
        for j, metric in enumerate(shown):
            axis = axes[i * len(shown) + j]
            for label, rows in lines.items():
                _draw_line(axis, looks[label], rows, name, metric + end)
            _arrange(axis, table, name)
            axis.set_ylabel(NAMES[metric])
            if j == 0 and called:
                axis.set_title(called, loc="left")
    if any(lines):
        add_legend(figure, line_handles(looks.values()))
    return figure


def _draw_line(axis: Any, look: PlotStyle, rows: Sequence[dict[str, str]], name: str, metric: str) -> None:
    ends = ("", "_lo", "_hi")
    figure, _, of = metric.partition("@")
    columns = {f"y{end}": f"{figure}{end}" + (f"@{of}" if of else "") for end in ends}
    found = [
        PlotRow(look, ("", ""), False, True, "", {key: number(row, column) for key, column in columns.items()})
        for row in rows
    ]
    xs, ys = [number(row, name) for row in rows], [row.value("y") for row in found]
    axis.plot(xs, ys, linestyle=look.line, **marker_style(look))
    draw_intervals(axis, look, xs, ys, yerr=interval(found, ["y"] * len(found)))


def histograms(table: Table, name: str) -> Figure | None:
    """The shares of rounds that accepted so many drafts, as stacked bars along an axis; a panel for each line."""
    import matplotlib

    counted = [row for row in table.rows if number(row, "rounds") > 0]
    lines = _lines(Table(table.axes, tuple(counted)), name) if counted else {}
    if not lines or len(lines) > LINES:
        return None
    most = max(_most(row) for row in counted)
    colours = matplotlib.colormaps["viridis"].resampled(most + 1)
    columns = min(len(lines), 2)
    figure, axes = make_sheet(math.ceil(len(lines) / columns), columns, 5.0 if columns == 1 else 3.6, 2.6, sharey=True)
    for axis in axes[len(lines) :]:
        axis.remove()
    for axis, (label, rows) in zip(axes, lines.items(), strict=False):
        below = [0.0] * len(rows)
        for length in range(most + 1):
            shares = [_or_zero(number(row, f"hist_{length}")) / number(row, "rounds") for row in rows]
            style = {"color": colours(length), "edgecolor": "white", "linewidth": 0.3}
            axis.bar(range(len(rows)), shares, bottom=below, width=0.8, label=str(length), **style)
            below = [a + b for a, b in zip(below, shares, strict=True)]
        axis.set_xticks(range(len(rows)), [row[name] for row in rows])
        axis.set_xlabel(short_names(table.axes)[name])
        axis.grid(visible=False, axis="x")
        axis.set_title(label, loc="left")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of rounds")
    handles = axes[0].get_legend_handles_labels()[0]
    for handle in handles[:1]:
        handle.set_label("0 drafts accepted")
    add_legend(figure, handles)
    return figure


def _most(row: dict[str, str]) -> int:
    """The largest number of drafts that a round can accept."""
    lengths = [int(column[5:]) for column in row if column.startswith("hist_") and column[5:].isdigit()]
    return max((length for length in lengths if math.isfinite(number(row, f"hist_{length}"))), default=0)


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _looks(labels: Sequence[str] | dict[str, Any]) -> dict[str, PlotStyle]:
    return {
        label: PlotStyle(label, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(labels)
    }


def _arrange(axis: Any, table: Table, name: str) -> None:
    """Ticks where the values are, on a logarithmic scale where they reach far."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    values = sorted({number(row, name) for row in table.rows if row[name]})
    if values[0] > 0 and values[-1] / values[0] >= FAR:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
    elif len(values) <= LINES:
        axis.set_xticks(values, [f"{value:g}" for value in values])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=all(value.is_integer() for value in values)))
    axis.set_xlabel(short_names(table.axes)[name])
