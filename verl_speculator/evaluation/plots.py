"""The plots of an evaluation, drawn from its tables. Importing it loads no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.evaluation.plot_data import INK, PlotRow, PlotStyle, read_tables
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = "plots"
AXIS = {
    "tau": "tokens per target call, τ",
    "accept_rate": "acceptance rate, share of draft tokens",
    "speedup": "speedup over the base alone, ×",
    "kl": "KL from the base, nats/token",
    "ce": "cross-entropy, nats/token",
    "top1": "top-1 accuracy (share)",
}
FRONT = "#A8A8A8"
CROWD = 8  # speculators in a panel: with more, bars need more width and points need numbers
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,
    # A dollar in a path or a category is a dollar.
    "text.parse_math": False,
}


def plot(directory: Path) -> list[Path]:
    """Draw every plot for which the tables have data, with their intervals as error bars, and return the files written:
    `plots/<name>.png` and `plots/<name>.pdf` for each. Raises UserError if a table is missing, empty or lacks columns,
    or if the directory cannot be written."""
    results, categories = read_tables(directory)
    return draw(directory / PLOTS, lambda: every_figure(results, categories))


def draw(folder: Path, figures: Callable[[], Iterable[tuple[str, Figure]]]) -> list[Path]:
    """Write figures under their names, as PNG and PDF; `figures` makes them, within STYLE. Raises UserError if the
    folder cannot be written to."""
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures():
            # Without a date the same tables give the same bytes.
            for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                path = folder / f"{name}.{suffix}"
                try:
                    folder.mkdir(exist_ok=True)
                    with atomic_file(path) as temporary:
                        figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
                except OSError as error:
                    raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
                written.append(path)
    return written


def every_figure(results: list[PlotRow], categories: list[PlotRow]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of every plot for which there is data."""
    figures = {
        "acceptance_per_depth": acceptance_per_depth(results),
        "accepted_length_histogram": accepted_length_histogram(results),
        "speedup_against_quality": speedup_against_quality(results),
        **{f"categories_{metric}": by_category(categories, metric) for metric in ("tau", "accept_rate", "speedup")},
        "quality_per_depth": quality_per_depth(results),
    }
    return ((name, figure) for name, figure in figures.items() if figure is not None)


# The plots: each function returns None where the rows have no data for it.


def acceptance_per_depth(rows: list[PlotRow]) -> Figure | None:
    """Share of the rounds that accepted the token at a depth, of those that accepted all earlier ones."""
    rows = [row for row in rows if row.series("accept_depth_")]
    if not rows:
        return None
    figure, panels = panel_sheet(rows, ylabel="acceptance rate at this depth", sharey=True)
    for axis, panel_rows in panels:
        draw_per_depth(axis, panel_rows, "accept_depth_")
        axis.set_ylim(0, 1.02)
    return add_legend(figure, line_handles(styles_of(rows)))


def accepted_length_histogram(rows: list[PlotRow]) -> Figure | None:
    """Share of the verification rounds by the number of draft tokens that they accepted."""
    rows = [row for row in rows if sum(row.series("hist_").values()) > 0]
    if not rows:
        return None
    # Many bars need the whole width of a page.
    most = 2 if len(styles_of(rows)) <= CROWD else 1
    figure, panels = panel_sheet(rows, ylabel="share of rounds", most=most, sharey=True)
    for axis, panel_rows in panels:
        width = 0.84 / len(panel_rows)
        for i, row in enumerate(panel_rows):
            counts, shift = row.series("hist_"), (i - (len(panel_rows) - 1) / 2) * width
            shares = [count / sum(counts.values()) for count in counts.values()]
            axis.bar([length + shift for length in counts], shares, width, **bar_style(row.style))
        label_integers(axis, "draft tokens accepted in a round")
        axis.grid(visible=False, axis="x")
    return add_legend(figure, bar_handles(styles_of(rows)))


def by_category(rows: list[PlotRow], metric: str) -> Figure | None:
    """Bars of one metric for each category and speculator, of the prompts files with more than one category."""
    from matplotlib.patheffects import withStroke

    rows = [row for row in rows if row.category and row.has(metric)]
    orders = {panel: list(dict.fromkeys(row.category for row in part)) for panel, part in by_panel(rows).items()}
    rows = [row for row in rows if len(orders[row.panel]) > 1]
    if not rows:
        return None
    styles, panels = styles_of(rows), by_panel(rows)
    thick = 0.1 if len(styles) <= CROWD else 0.05
    height = max(len(orders[panel]) * (len(styles_of(part)) * thick + 0.08) for panel, part in panels.items())
    is_same = len({tuple(orders[panel]) for panel in panels}) == 1
    figure, drawn = panel_sheet(rows, height=height + 0.7, most=3 if is_same else 2, sharey=is_same, sharex=True)
    outline = {"ecolor": INK, "elinewidth": 0.8, "path_effects": [withStroke(linewidth=2, foreground="white")]}
    for axis, panel_rows in drawn:
        order, panel_styles = orders[panel_rows[0].panel], styles_of(panel_rows)
        width = 0.84 / len(panel_styles)
        for row in panel_rows:
            place = order.index(row.category) + (panel_styles.index(row.style) - (len(panel_styles) - 1) / 2) * width
            options = {"xerr": interval(row, [metric]), "error_kw": outline}
            axis.barh(place, row.value(metric), width, **options, **bar_style(row.style))
        axis.set_yticks(range(len(order)), order)
        axis.set(ylim=(len(order) - 0.5, -0.5), xlabel=AXIS[metric], xlim=(0, None))
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        if metric != "accept_rate":
            axis.axvline(1, color=INK, linewidth=0.8, linestyle="--")
    return add_legend(figure, bar_handles(styles))


def quality_per_depth(rows: list[PlotRow]) -> Figure | None:
    """Cross-entropy, KL divergence and top-1 accuracy at each depth, which depend on neither prompts nor policy: a line
    of panels for each base model. Untrained speculators stretch the axes, and are drawn only without trained ones."""
    rows = [row for row in rows if row.series("ce_depth_")]
    rows = [row for row in rows if row.is_trained] or rows
    metrics = [name for name in ("ce", "kl", "top1") if any(row.series(f"{name}_depth_") for row in rows)]
    if not rows:
        return None
    panels = by_panel({(row.style, row.base): replace(row, panel=(row.base, "")) for row in rows}.values())
    figure, axes = sheet(len(panels), len(metrics), {1: 5.0, 2: 3.6, 3: 3.0}[len(metrics)], 2.5)
    for i, (panel, panel_rows) in enumerate(panels.items()):
        line = axes[i * len(metrics) : (i + 1) * len(metrics)]
        line[0].set_title(panel[0], loc="left")
        for axis, name in zip(line, metrics, strict=True):
            with_metric = [row for row in panel_rows if row.series(f"{name}_depth_")]
            if not with_metric:
                axis.remove()
                continue
            draw_per_depth(axis, with_metric, f"{name}_depth_")
            axis.set(ylabel=AXIS[name], **({"ylim": (0, None)} if name == "top1" else {}))
    return add_legend(figure, line_handles(styles_of(rows)))


def speedup_against_quality(rows: list[PlotRow]) -> Figure | None:
    """Speedup by KL divergence, by cross-entropy where there is none, else by acceptance rate; with the Pareto front.
    Quality is of the trained speculators; prompt lookup has none and is a line in their panels."""
    panels = [part for part in by_panel(row for row in rows if row.has("speedup")).values() if _quality(part)[1]]
    if not panels:
        return None
    figure, drawn = panel_sheet(list(chain(*panels)), ylabel=AXIS["speedup"], height=3.0, most=2)
    styles = styles_of(row for part in panels for row in _quality(part)[1])
    numbers = {style: str(i) for i, style in enumerate(styles, 1)} if len(styles) > CROWD else {}
    labelled = [replace(style, label=f"{numbers.get(style, '')}  {style.label}".strip(), line="") for style in styles]
    handles = line_handles(labelled)
    for axis, panel_rows in drawn:
        metric, members = _quality(panel_rows)
        handles.append(axis.axhline(1, color=INK, linestyle="--", linewidth=0.9, label="base alone"))
        for row in panel_rows:
            if row.is_lookup and row not in members:
                options = {"color": row.style.colour, "linestyle": ":", "linewidth": 1.2, "label": row.style.label}
                handles.append(axis.axhline(row.value("speedup"), **options))
        points = [(row.value(metric), row.value("speedup")) for row in members]
        for row, (x, y) in zip(members, points, strict=True):
            axis.plot(x, y, markersize=6.5, zorder=3, **marker_style(row.style))
            reach = {"xerr": interval(row, [metric]), "yerr": interval(row, ["speedup"])}
            draw_intervals(axis, row.style, [x], [y], **reach)
            if numbers:
                axis.annotate(numbers[row.style], (x, y), (4, 4), textcoords="offset points", fontsize=7.5)
        axis.margins(0.15, 0.12)
        axis.locator_params(axis="x", nbins=6)
        is_larger_better = metric == "accept_rate"
        handles.append(_draw_front(axis, points, is_larger_better))
        axis.set_xlabel(AXIS[metric] + (" (better →)" if is_larger_better else " (← better)"))
    return add_legend(figure, list({handle.get_label(): handle for handle in handles}.values()))


def _quality(rows: list[PlotRow]) -> tuple[str, list[PlotRow]]:
    """The metric that stands for quality in a panel, and the rows that have it."""
    trained = [row for row in rows if row.is_trained]
    for metric in ("kl", "ce"):
        if trained and all(row.has(metric) for row in trained):
            return metric, trained
    return "accept_rate", [row for row in rows if row.has("accept_rate")]


def _draw_front(axis: Axes, points: list[tuple[float, float]], is_larger_better: bool) -> Artist:
    """The staircase of the points that no other point beats in both quality and speedup."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0] if is_larger_better else point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    limits = {"xlim": axis.get_xlim(), "ylim": axis.get_ylim()}
    end = limits["xlim"][0 if is_larger_better else 1]
    corners = [(front[0][0], limits["ylim"][0]), *front, (end, front[-1][1])]
    style = {"color": FRONT, "linewidth": 1.2, "zorder": 1, "drawstyle": "steps-post", "label": "Pareto front"}
    (line,) = axis.plot(*zip(*corners, strict=True), **style)
    axis.set(**limits)
    return line


# Panels and legends.


def by_panel(rows: Iterable[PlotRow]) -> dict[tuple[str, str], list[PlotRow]]:
    """The rows of each panel, by prompts and policy, in the order of the rows."""
    panels: dict[tuple[str, str], list[PlotRow]] = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    return panels


def styles_of(rows: Iterable[PlotRow]) -> list[PlotStyle]:
    """Each style once, in the order of the rows."""
    return list(dict.fromkeys(row.style for row in rows))


def sheet(lines: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure that pyplot does not manage; sizes are those of a panel, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **options).flat)


def panel_sheet(
    rows: list[PlotRow], height: float = 2.6, most: int = 3, ylabel: str = "", **options: Any
) -> tuple[Figure, list[tuple[Axes, list[PlotRow]]]]:
    """A figure with one titled panel for each prompts file and policy; `ylabel` is that of the first column."""
    panels = by_panel(rows)
    # Prompts against policies, or the other way round, where that fits into `most` columns.
    names = [list(dict.fromkeys(panel[i] for panel in panels)) for i in (0, 1)]
    down, across = (1, 0) if len(names[1]) > most else (0, 1)
    order = sorted(panels, key=lambda panel: (names[down].index(panel[down]), names[across].index(panel[across])))
    columns = len(names[across])
    if len(names[down]) * columns != len(panels) or not 1 < columns <= most:
        columns = math.ceil(len(panels) / math.ceil(len(panels) / most))
    width = {1: 7.2 if len(styles_of(rows)) > CROWD else 5.0, 2: 3.6}.get(columns, 3.0)
    figure, axes = sheet(math.ceil(len(panels) / columns), columns, width, height, **options)
    for axis in axes[len(panels) :]:
        axis.remove()
    for i, (axis, panel) in enumerate(zip(axes, order, strict=False)):
        title = ", ".join(filter(None, panel))
        axis.set_title(title if len(title) <= round(width * 12) else "\n".join(filter(None, panel)))
        axis.set_ylabel(ylabel if i % columns == 0 else "")
    return figure, [(axis, panels[panel]) for axis, panel in zip(axes, order, strict=False)]


def add_legend(figure: Figure, handles: Sequence[Artist]) -> Figure:
    """A legend below the panels, in as many columns as fit; the figure grows, so that the panels keep their size."""
    for columns in range(min(len(handles), 6), 0, -1):
        # As many columns as the same number of lines needs at least.
        columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        options = {"ncols": columns, "frameon": False, "fontsize": 8 if len(handles) <= 12 else 7}
        legend = figure.legend(handles=handles, loc="outside lower center", columnspacing=1.6, **options)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
    return figure


def line_handles(styles: Iterable[PlotStyle]) -> list[Artist]:
    """Handles for a legend of lines."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], linestyle=style.line, label=style.label, **marker_style(style)) for style in styles]


def bar_handles(styles: Iterable[PlotStyle]) -> list[Artist]:
    """Handles for a legend of bars."""
    from matplotlib.patches import Patch

    return [Patch(label=style.label, **bar_style(style)) for style in styles]


def bar_style(style: PlotStyle) -> dict[str, Any]:
    """A bar's colour, hatch and edge."""
    return {"facecolor": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.3}


def marker_style(style: PlotStyle) -> dict[str, Any]:
    """A marker's colour, shape and edge."""
    return {"color": style.colour, "marker": style.marker, "markeredgecolor": "white", "markeredgewidth": 0.4}


def interval(row: PlotRow, names: Iterable[str]) -> list[list[float]]:
    """How far down and up the intervals of `names` reach, NaN where there is none."""
    ends = [[row.value(name + end) for end in ("", "_lo", "_hi")] for name in names]
    # A bootstrap interval may miss its own estimate by a hair; an error bar may not. `max` keeps NaN in first place.
    return [[max(value - low, 0.0) for value, low, _ in ends], [max(high - value, 0.0) for value, _, high in ends]]


def draw_intervals(axis: Axes, style: PlotStyle, xs: Sequence[float], ys: Sequence[float], **reach: Any) -> None:
    """Error bars without their points; `reach` holds xerr, yerr or both."""
    axis.errorbar(xs, ys, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2, capthick=0.8, zorder=2.5, **reach)


def draw_per_depth(axis: Axes, rows: list[PlotRow], prefix: str) -> None:
    """A line over the depths for each row, shifted a little so that no interval hides another one."""
    styles = styles_of(rows)
    shift = min(0.06, 0.4 / len(styles))
    for row in rows:
        values, place = row.series(prefix), (styles.index(row.style) - (len(styles) - 1) / 2) * shift
        xs, ys = [depth + place for depth in values], list(values.values())
        axis.plot(xs, ys, linestyle=row.style.line, **marker_style(row.style))
        draw_intervals(axis, row.style, xs, ys, yerr=interval(row, (f"{prefix}{depth}" for depth in values)))
    axis.set_xlim(-0.4, max(depth for row in rows for depth in row.series(prefix)) + 0.4)
    label_integers(axis, "draft depth")


def label_integers(axis: Axes, label: str) -> None:
    """Label the horizontal axis, which has ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
