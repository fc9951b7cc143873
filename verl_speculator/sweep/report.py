"""From the trials' records to `results.csv`, the printed tables and the plots. A plot reads the CSV alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_speculator.config.schema import DIM_KEYS
from verl_speculator.evaluation.metrics import verdict
from verl_speculator.evaluation.plot_data import COLOURS, MARKERS, PlotStyle, read_tables
from verl_speculator.evaluation.plots import (
    AXIS,
    PLOTS,
    add_legend,
    draw,
    draw_intervals,
    every_figure,
    line_handles,
    marker_style,
)
from verl_speculator.evaluation.plots import sheet as make_sheet
from verl_speculator.sweep.settings import columns_of, labels_of, short_names, unquoted
from verl_speculator.sweep.trial import DONE, WAITING, Trial
from verl_speculator.utils.atomic_io import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.csv"
# The axes stand between the first of these and the others.
FIRST = "point"
FOLLOWING = ("status", "reason", "training_seconds", "steps", "final_loss", "checkpoint", "parameters", "log")
# A point this close to the best one counts as equally good.
TOLERANCE = 0.02
QUALITY, ACCEPTANCE = ("kl", "ce", "top1"), ("accepted", "accept_rate", "tv")
NAMES = AXIS | {
    "accepted": "drafts accepted per round",
    "accept_rate": "acceptance rate",
    "tv": "total variation, 1 − overlap",
}
# Ratio of the largest to the smallest value from which an axis is logarithmic.
LOGARITHMIC_FROM = 20.0
# Most ticks of an axis with one for each value, and most panels of a figure.
MOST_TICKS = 10
# With more points, a bar or a line for each point and depth is unreadable: this evaluation plot alone is drawn.
MANY_POINTS, PLOT_OF_MANY_POINTS = 20, "speedup_against_quality"

Row = dict[str, Any]


def write_results(out: Path, trials: Sequence[Trial]) -> list[Row]:
    """Write and return a row for each trial, done or not."""
    axes = columns_of([trial.values for trial in trials])
    rows = []
    for trial in trials:
        training, evaluation = trial.training(), trial.evaluation()
        row = {FIRST: trial.label} | {name: unquoted(trial.values[name]) for name in axes if name in trial.values}
        row |= {name: training.get(name) for name in FOLLOWING} | {"status": trial.status, "reason": trial.reason}
        row["log"] = evaluation.get("log") or training.get("log")
        measurement = trial.measurements[0]
        row |= {"base": measurement.arguments[1], "prompts": next(iter(measurement.prompt_sets))}
        # In the evaluation's plots a point is a speculator.
        rows.append(row | evaluation.get("figures", {}) | {"speculator": trial.label})
    columns = list(dict.fromkeys([FIRST, *axes, *FOLLOWING, *columns_of(rows)]))
    with atomic_file(out / RESULTS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def number(row: Row, name: str, missing: float = math.nan) -> float:
    """A finite number of a row, else `missing`."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        return missing
    return value if math.isfinite(value) else missing


def recommendations(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Which point to take: the best τ and the best speedup, and for each the smallest point that is about as good."""
    recommended = []
    for name, symbol in (("tau", "τ"), ("speedup", "speedup")):
        known = [row for row in rows if row["status"] == DONE and math.isfinite(number(row, name))]
        if known:
            best = max(known, key=lambda row: number(row, name))
            close = [row for row in known if number(row, name) >= (1 - TOLERANCE) * number(best, name)]
            smallest = min(close, key=lambda row: (number(row, "parameters"), -number(row, name)))
            slower = name == "speedup" and number(best, name) < 1
            symbol += " (slower than the base model alone)" if slower else ""
            recommended += [(f"best {symbol}", best), (f"smallest within {TOLERANCE:.0%} of it", smallest)]
    return recommended


def _print_table(
    console: Any, title: str, headers: Sequence[str], figures: Sequence[str], lines: Iterable[Sequence[str]]
) -> None:
    """A table of texts under `headers`, followed by right-aligned `figures`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for name in headers:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in lines:
        table.add_row(*map(escape, cells))
    console.print(table)


def print_trials(trials: Sequence[Trial], console: Any) -> None:
    """What a sweep would do."""
    due = sum(trial.status != DONE for trial in trials)
    lines = [(str(i), trial.label, trial.status, str(trial.directory)) for i, trial in enumerate(trials, 1)]
    title = f"{len(trials)} points, {due} to be trained or measured"
    _print_table(console, title, ("#", "point", "status", "directory"), (), lines)


def print_results(rows: Sequence[Row], console: Any) -> None:
    """All points, best τ first, then which one to take, then the failed ones."""

    def print_table(title: str, headers: Sequence[str], lines: Sequence[tuple[Sequence[str], Row]]) -> None:
        figures = {name: text for name, text in FIGURES.items() if any(text(row) != "–" for _, row in lines)}
        cells = [[*texts, *(text(row) for text in figures.values())] for texts, row in lines]
        _print_table(console, title, headers, list(figures), cells)

    done = sorted((row for row in rows if row["status"] == DONE), key=lambda row: -number(row, "tau", -math.inf))
    if done:
        print_table("Points", ("point",), [((row[FIRST],), row) for row in done])
        lines = [((reason, row[FIRST]), row) for reason, row in recommendations(done)]
        print_table("Which one to train", ("", "point"), lines)
        for reason, row in recommendations(done):
            if reason.startswith("best speedup"):
                line = f"{row[FIRST]}: {verdict(number(row, 'tau'), number(row, 'speedup'))}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    for row in rows:
        if row["status"] not in (DONE, WAITING):
            line = f"{row['status']}: {row[FIRST]}: {row['reason']} ({row['log']})"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figure(name: str, form: str, with_interval: bool = False) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value, low, high = (number(row, name + end) for end in ("", "_lo", "_hi"))
        if math.isnan(value):
            return "–"
        interval = f" [{form.format(low)}, {form.format(high)}]" if with_interval and math.isfinite(low) else ""
        return form.format(value) + interval

    return text


def _same_text(row: Row) -> str:
    """Greedy texts that equal the base model's; sampled ones differ from run to run."""
    if number(row, "temperature") != 0 or not number(row, "runs") > 0:
        return "–"
    return f"{number(row, 'identical'):.0f} of {number(row, 'runs'):.0f}"


FIGURES = {
    "τ": _figure("tau", "{:.2f}", with_interval=True),
    "accepted": _figure("accept_rate", "{:.1%}"),
    "speedup": _figure("speedup", "{:.2f}", with_interval=True),
    "same text": _same_text,
    "KL": _figure("kl", "{:.3f}"),
    "CE": _figure("ce", "{:.2f}"),
    "top-1": _figure("top1", "{:.1%}"),
    "parameters": _figure("parameters", "{:,.0f}"),
    "training": _figure("training_seconds", "{:,.1f} s"),
}


class ResultsTable(NamedTuple):
    """The rows of the points that are done, and the settings that are the sweep's axes."""

    axes: Sequence[str]
    rows: Sequence[dict[str, str]]


def is_sweep(directory: Path) -> bool:
    """Whether the results in a directory are a sweep's."""
    try:
        with (directory / RESULTS).open(newline="") as file:
            return FIRST in next(csv.reader(file), [])[:1]
    except OSError:
        return False


def read_results(directory: Path) -> ResultsTable:
    """The results of a sweep."""
    with (directory / RESULTS).open(newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        return ResultsTable(names[1 : names.index(FOLLOWING[0])], [row for row in reader if row["status"] == DONE])


def plot_sweep(directory: Path) -> list[Path]:
    """Draw every plot for which the table has data; none where no point is done.

    Returns:
        `plots/<name>.png` and `plots/<name>.pdf` for each plot.

    Raises:
        UserError: if the table has other columns, or the directory cannot be written.
    """
    table = read_results(directory)
    if not table.rows:
        return []
    results, _ = read_tables(directory)

    def figures() -> Iterator[tuple[str, Figure]]:
        for name, figure in every_figure(results, []):
            if len(table.rows) <= MANY_POINTS or name == PLOT_OF_MANY_POINTS:
                yield name, figure
        yield from axis_figures(table)

    return draw(directory / PLOTS, figures)


def axis_figures(table: ResultsTable) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each numeric axis against quality, acceptance, and the histogram of accepted lengths."""
    for name in filter(lambda name: _is_numeric(table, name), table.axes):
        figures = {
            "quality": metrics_along_axis(table, name, QUALITY, "text"),
            "acceptance": metrics_along_axis(table, name, ACCEPTANCE, "prompts"),
            "histogram": histograms_along_axis(table, name),
        }
        short = short_names(table.axes)[name].replace(".", "_")
        yield from ((f"{short}_{kind}", figure) for kind, figure in figures.items() if figure is not None)


def _is_numeric(table: ResultsTable, name: str) -> bool:
    """Whether an axis has several values, all of them numbers; widths of several layers (`1024.2560`) are not."""
    values = {row[name] for row in table.rows if row[name]}
    layers = name.rsplit(".", 1)[-1] in DIM_KEYS and any("." in value for value in values)
    return len(values) > 1 and not layers and not any(math.isnan(number({name: value}, name)) for value in values)


def _lines(table: ResultsTable, name: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each combination of the other axes' values, by its label, in order of the axis."""
    others = [{axis: row[axis] for axis in table.axes if axis != name and row[axis]} for row in table.rows]
    labels = labels_of(others) if any(others) else [""] * len(others)
    lines: dict[str, list[dict[str, str]]] = {}
    for label, row in sorted(zip(labels, table.rows, strict=True), key=lambda line: number(line[1], name)):
        if row[name]:
            lines.setdefault(label, []).append(row)
    return {label: lines[label] for label in dict.fromkeys(labels) if label in lines}


def metrics_along_axis(table: ResultsTable, name: str, metrics: Sequence[str], file_column: str) -> Figure | None:
    """A panel for each metric and prompt set or text, with a line for each combination of the other axes' values.

    `file_column` names the first prompt set or text, whose columns have no suffix.
    """
    metrics = [metric for metric in metrics if any(math.isfinite(number(row, metric)) for row in table.rows)]
    if not metrics:
        return None
    columns = [column.partition("@") for column in table.rows[0]]
    titles = {"": Path(table.rows[0].get(file_column) or "").stem}
    titles |= {at + suffix: suffix for metric, at, suffix in columns if at and metric in metrics}
    lines = _lines(table, name)
    styles = {
        label: PlotStyle(label, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(lines)
    }
    panels = [(suffix, metric) for suffix in titles for metric in metrics]
    figure, axes = make_sheet(len(titles), len(metrics), {1: 5.0, 2: 3.6}.get(len(metrics), 3.0), 2.5)
    for axis, (suffix, metric) in zip(axes, panels, strict=True):
        for label, rows in lines.items():
            xs = [number(row, name) for row in rows]
            ys, lows, highs = ([number(row, metric + end + suffix) for row in rows] for end in ("", "_lo", "_hi"))
            axis.plot(xs, ys, linestyle=styles[label].line, **marker_style(styles[label]))
            # A bootstrap interval may miss its own estimate by a hair; an error bar may not.
            below = [max(y - low, 0.0) for y, low in zip(ys, lows, strict=True)]
            above = [max(high - y, 0.0) for y, high in zip(ys, highs, strict=True)]
            draw_intervals(axis, styles[label], xs, ys, yerr=[below, above])
        _set_ticks(axis, table, name)
        axis.set_ylabel(NAMES[metric])
        if metric == metrics[0]:
            axis.set_title(titles[suffix], loc="left")
    if any(lines):
        add_legend(figure, line_handles(styles.values()))
    return figure


def histograms_along_axis(table: ResultsTable, name: str) -> Figure | None:
    """Stacked shares of rounds by number of accepted drafts along an axis, in a panel for each line."""
    import matplotlib

    counted = tuple(row for row in table.rows if number(row, "rounds") > 0)
    lines = _lines(ResultsTable(table.axes, counted), name)
    if not 0 < len(lines) <= MOST_TICKS:
        return None
    lengths = [column[5:] for column in table.rows[0] if column.startswith("hist_") and column[5:].isdigit()]
    most = max((int(n) for n in lengths for row in counted if math.isfinite(number(row, f"hist_{n}"))), default=0)
    colours = matplotlib.colormaps["viridis"].resampled(most + 1)
    columns = min(len(lines), 2)
    figure, axes = make_sheet(math.ceil(len(lines) / columns), columns, 5.0 if columns == 1 else 3.6, 2.6, sharey=True)
    for axis in axes[len(lines) :]:
        axis.remove()
    for axis, (label, rows) in zip(axes, lines.items(), strict=False):
        bottom = [0.0] * len(rows)
        for length in range(most + 1):
            shares = [number(row, f"hist_{length}", 0.0) / number(row, "rounds") for row in rows]
            style = {"color": colours(length), "edgecolor": "white", "linewidth": 0.3}
            axis.bar(range(len(rows)), shares, bottom=bottom, width=0.8, label=str(length), **style)
            bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
        axis.set_xticks(range(len(rows)), [row[name] for row in rows])
        axis.set_xlabel(short_names(table.axes)[name])
        axis.grid(visible=False, axis="x")
        axis.set_title(label, loc="left")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of rounds")
    handles = axes[0].get_legend_handles_labels()[0]
    handles[0].set_label("0 drafts accepted")
    add_legend(figure, handles)
    return figure


def _set_ticks(axis: Any, table: ResultsTable, name: str) -> None:
    """Ticks at the values, on a logarithmic scale where they reach far."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    values = sorted({number(row, name) for row in table.rows if row[name]})
    is_logarithmic = values[0] > 0 and values[-1] / values[0] >= LOGARITHMIC_FROM
    if is_logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    if is_logarithmic or len(values) <= MOST_TICKS:
        axis.set_xticks(values, [f"{value:g}" for value in values])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=all(value.is_integer() for value in values)))
    axis.set_xlabel(short_names(table.axes)[name])
