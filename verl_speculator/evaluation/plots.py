"""The plots, one function each. Each returns None where the tables have nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.evaluation.plot_data import INK, PlotRow, PlotStyle, read_tables
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Box = tuple[float, float, float, float]  # left, bottom, right, top


def label_points(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Put each point's name beside it, with a thin line to a name that found room only further off."""
    renderer, unit = axis.figure.canvas.get_renderer(), axis.figure.dpi / 72
    pixels = {name: tuple(axis.transData.transform(point)) for name, point in points.items()}
    # Strokes of lines and intervals run along an axis, so that each of them is a thin box.
    strokes = [line.get_transform().transform(line.get_xydata()) for line in axis.lines]
    strokes += [axis.transData.transform(stroke) for bars in axis.collections for stroke in bars.get_segments()]
    taken = [_box(ends, 2 * unit) for stroke in strokes for ends in pairwise(stroke)]
    taken += [_box([pixel], 5 * unit) for pixel in pixels.values()]
    for name, (x, y) in sorted(pixels.items(), key=lambda item: -item[1][1]):
        text = axis.text(0, 0, name, fontsize=7.5)
        size = text.get_window_extent(renderer)
        text.remove()
        others = [pixel for other, pixel in pixels.items() if other != name]
        panel = tuple(axis.bbox.extents)
        box, is_far = _free_place((x, y), (size.width, size.height), unit, others, taken, panel)
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": INK, "shrinkA": 0, "shrinkB": 3}
        axis.annotate(
            name,
            points[name],
            (((box[0] + box[2]) / 2 - x) / unit, ((box[1] + box[3]) / 2 - y) / unit),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=INK,
            arrowprops=line if is_far else None,
        )


def _free_place(
    point: tuple[float, float],
    size: tuple[float, float],
    unit: float,
    others: list[tuple[float, float]],
    taken: list[Box],
    panel: Box,
) -> tuple[Box, bool]:
    """Of the places around a point, nearest first, the one that covers least; is it far off?

    Args:
        point: in pixels, as all that follows.
        size: of the name.
        unit: pixels in a point of type.
        others: points that a name should not seem to belong to.
        taken: what a name should not cover.
        panel: what it should not leave.
    """
    (width, height), sides = size, (1, -1, 0.5, -0.5, 0)
    around = [(x, y) for x in sides for y in sides if 1 in (abs(x), abs(y))]
    best: tuple[float, Box, bool] | None = None
    for distance in (6, 10, 18, 28, 40, 54):
        for right, up in around:
            x = point[0] + right * (distance * unit + width / 2)
            y = point[1] + up * (distance * unit + height / 2)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            # To cover a line is bad, to leave the panel worse, and each step away must gain a little more.
            cost = 3 * sum(_overlap(box, other) for other in taken) + 9 * (width * height - _overlap(box, panel))
            cost += distance * unit * height / 4
            if any(_gap(box, other) < _gap(box, point) for other in others):
                cost += 10 * unit * height
            if best is None or cost < best[0]:
                best = (cost, box, distance > 6)
    return best[1:]


def _box(points: Iterable[Sequence[float]], margin: float) -> Box:
    """Around all the points."""
    xs, ys = zip(*points, strict=True)
    return (min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin)


def _gap(box: Box, point: tuple[float, float]) -> float:
    """How far a point is from a box."""
    return math.hypot(
        max(box[0] - point[0], 0.0, point[0] - box[2]),
        max(box[1] - point[1], 0.0, point[1] - box[3]),
    )


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


AXIS = {
    "tau": "tokens per target call, τ",
    "accept_rate": "acceptance rate, share of draft tokens",
    "speedup": "speedup over the base alone, ×",
    "kl": "KL from the base, nats/token",
    "ce": "cross-entropy, nats/token",
    "top1": "top-1 accuracy (share)",
}
FRONT = "#A8A8A8"


def every_figure(results: list[PlotRow], categories: list[PlotRow]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of every plot for which there is data."""
    figures = [
        ("acceptance_per_depth", acceptance_per_depth(results)),
        ("accepted_length_histogram", accepted_length_histogram(results)),
        ("speedup_against_quality", speedup_against_quality(results)),
        *((f"categories_{metric}", by_category(categories, metric)) for metric in ("tau", "accept_rate", "speedup")),
        ("quality_per_depth", quality_per_depth(results)),
    ]
    return ((name, figure) for name, figure in figures if figure is not None)


def acceptance_per_depth(rows: list[PlotRow]) -> Figure | None:
    """How often the token at a depth was accepted, of the rounds in which all earlier ones were."""
    rows = [row for row in rows if row.series("accept_depth_")]
    if not rows:
        return None
    figure, panels = panel_sheet(by_panel(rows), sharey=True)
    for axis, mine in panels:
        draw_per_depth(axis, mine, "accept_depth_")
        axis.set_ylim(0, 1.02)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("acceptance rate at this depth")
    add_legend(figure, line_handles(looks_of(rows)))
    return figure


def accepted_length_histogram(rows: list[PlotRow]) -> Figure | None:
    """In which share of the verification rounds so many draft tokens were accepted."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if sum(row.value(name) for name in row.series("hist_").values()) > 0]
    if not rows:
        return None
    # Many bars need the whole width of a page.
    figure, panels = panel_sheet(by_panel(rows), most=2 if len(looks_of(rows)) <= CROWD else 1, sharey=True)
    for axis, mine in panels:
        width = 0.84 / len(mine)
        for i, row in enumerate(mine):
            columns = row.series("hist_")
            rounds = sum(row.value(name) for name in columns.values())
            places = [length + (i - (len(mine) - 1) / 2) * width for length in columns]
            axis.bar(places, [row.value(n) / rounds for n in columns.values()], width, **bar_style(row.look))
        axis.set_xlabel("draft tokens accepted in a round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(visible=False, axis="x")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of rounds")
    add_legend(figure, bar_handles(looks_of(rows)))
    return figure


def by_category(rows: list[PlotRow], metric: str) -> Figure | None:
    """Bars of one metric for each category and speculator, of the prompts files with more than one category."""
    from matplotlib.patheffects import withStroke

    rows = [row for row in rows if row.category and row.has(metric)]
    panels = {panel: mine for panel, mine in by_panel(rows).items() if len({row.category for row in mine}) > 1}
    rows = [row for mine in panels.values() for row in mine]
    if not rows:
        return None
    thick = 0.1 if len(looks_of(rows)) <= CROWD else 0.05
    groups = max(len({r.category for r in mine}) * (len(looks_of(mine)) * thick + 0.08) for mine in panels.values())
    same = len({tuple(dict.fromkeys(row.category for row in mine)) for mine in panels.values()}) == 1
    figure, drawn = panel_sheet(panels, height=groups + 0.7, most=3 if same else 2, sharey=same, sharex=True)
    for axis, mine in drawn:
        places = {category: i for i, category in enumerate(dict.fromkeys(row.category for row in mine))}
        looks = looks_of(mine)
        width = 0.84 / len(looks)
        for row in mine:
            axis.barh(
                places[row.category] + (looks.index(row.look) - (len(looks) - 1) / 2) * width,
                row.value(metric),
                width,
                xerr=interval([row], [metric]),
                error_kw={
                    "ecolor": INK,
                    "elinewidth": 0.8,
                    "path_effects": [withStroke(linewidth=2, foreground="white")],
                },
                **bar_style(row.look),
            )
        axis.set_yticks(list(places.values()), list(places))
        axis.set_ylim(len(places) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(AXIS[metric])
        axis.set_xlim(left=0)
        if metric != "accept_rate":
            axis.axvline(1, color=INK, linewidth=0.8, linestyle="--")
    add_legend(figure, bar_handles(looks_of(rows)))
    return figure


def quality_per_depth(rows: list[PlotRow]) -> Figure | None:
    """Cross-entropy, KL divergence and top-1 accuracy at each depth: a line of panels for each prompts file.

    An untrained one, at chance, would press the trained ones together; it is drawn only where there are none.
    """
    rows = [row for row in rows if row.series("ce_depth_")]
    rows = [row for row in rows if row.is_trained] or rows
    metrics = [name for name in ("ce", "kl", "top1") if any(row.series(f"{name}_depth_") for row in rows)]
    if not rows:
        return None
    panels, _, _ = arrange(by_panel(_without_policy(rows, [f"{name}_depth_" for name in metrics])), most=3)
    figure, axes = sheet(len(panels), len(metrics), {1: 5.0, 2: 3.6, 3: 3.0}[len(metrics)], 2.5)
    grid = [axes[i : i + len(metrics)] for i in range(0, len(axes), len(metrics))]
    for line, (panel, mine) in zip(grid, panels.items(), strict=True):
        line[0].set_title(", ".join(filter(None, panel)), loc="left")
        for axis, name in zip(line, metrics, strict=True):
            having = [row for row in mine if row.series(f"{name}_depth_")]
            if not having:
                axis.remove()
                continue
            draw_per_depth(axis, having, f"{name}_depth_")
            axis.set_ylabel(AXIS[name])
            if name == "top1":
                axis.set_ylim(bottom=0)
    add_legend(figure, line_handles(looks_of(rows)))
    return figure


def _without_policy(rows: list[PlotRow], prefixes: Sequence[str]) -> list[PlotRow]:
    """Each speculator once where its values are the same under every policy and beside every prompts file: they are of
    the held-out text, and have no panel of their own then."""
    for panel in (lambda row: ("", ""), lambda row: (row.panel[0], "")):
        merged: dict[Any, PlotRow] = {}
        for row in rows:
            values = tuple((n, row.value(n)) for prefix in prefixes for n in row.series(prefix).values())
            merged.setdefault((row.look, panel(row), values), replace(row, panel=panel(row)))
        if len({key[:2] for key in merged}) == len(merged):
            return list(merged.values())
    return rows


def speedup_against_quality(rows: list[PlotRow]) -> Figure | None:
    """Speedup by KL divergence, by cross-entropy where there is none, else by acceptance rate; with the Pareto front.

    Quality is of the trained speculators; prompt lookup has none and is a line in their panels.
    """
    from matplotlib.ticker import MaxNLocator

    panels = by_panel(row for row in rows if row.has("speedup"))
    panels = {panel: mine for panel, mine in panels.items() if _quality(mine)[1]}
    if not panels:
        return None
    figure, drawn = panel_sheet(panels, height=3.0, most=2)
    looks = looks_of(row for mine in panels.values() for row in _quality(mine)[1])
    tags = {look: look.label for look in looks}
    names: dict[str, Artist] = {}
    if len(looks) > CROWD or max(map(len, tags.values())) > 30:
        tags = {look: str(i) for i, look in enumerate(looks, start=1)}
        numbered = [replace(look, label=f"{tags[look]}  {look.label}", line="") for look in looks]
        names = {handle.get_label(): handle for handle in line_handles(numbered)}
    for axis, mine in drawn:
        metric, points = _quality(mine)
        larger = metric == "accept_rate"
        lines = [(1.0, {"color": INK, "linestyle": "--", "linewidth": 0.9, "label": "base alone"})]
        for row in mine:
            if row.is_lookup and row not in points:
                style = {"color": row.look.colour, "linestyle": ":", "linewidth": 1.2, "label": row.look.label}
                lines.append((row.value("speedup"), style))
        for row in points:
            x, y = row.value(metric), row.value("speedup")
            axis.plot(x, y, markersize=6.5, zorder=3, **marker_style(row.look))
            reach = {"xerr": interval([row], [metric]), "yerr": interval([row], ["speedup"])}
            draw_intervals(axis, row.look, [x], [y], **reach)
        handles = [axis.axhline(y, **style) for y, style in lines]
        axis.margins(0.15, 0.12)
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        handles.append(_draw_front(axis, [(row.value(metric), row.value("speedup")) for row in points], larger))
        names |= {handle.get_label(): handle for handle in handles}
        axis.set_xlabel(AXIS[metric] + (" (better →)" if larger else " (← better)"))
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(AXIS["speedup"])
    add_legend(figure, list(names.values()))
    # Where there is room for a name depends on where the layout has put the panel.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, mine in drawn:
        metric, points = _quality(mine)
        label_points(axis, {tags[row.look]: (row.value(metric), row.value("speedup")) for row in points})
    return figure


def _quality(rows: list[PlotRow]) -> tuple[str, list[PlotRow]]:
    """What stands for quality in a panel, and the rows that have it."""
    trained = [row for row in rows if row.is_trained]
    for metric in ("kl", "ce"):
        if trained and all(row.has(metric) for row in trained):
            return metric, trained
    return "accept_rate", [row for row in rows if row.has("accept_rate")]


def _draw_front(axis: Axes, points: list[tuple[float, float]], larger_is_better: bool) -> Artist:
    """The staircase on which no speculator is beaten by another one in both quality and speedup."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0] if larger_is_better else point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    worst = left if larger_is_better else right
    xs = [x for x, _ in front for _ in range(2)] + [worst]
    ys = [bottom] + [y for _, y in front for _ in range(2)]
    (line,) = axis.plot(xs, ys, color=FRONT, linewidth=1.2, zorder=1, label="Pareto front")
    axis.set(xlim=(left, right), ylim=(bottom, top))
    return line


CROWD = 8  # speculators in a panel: with more, bars want width and points want numbers

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 6,
    "pdf.fonttype": 42,
    # A dollar in a path or a category is a dollar.
    "text.parse_math": False,
}

Panels = dict[tuple[str, str], list[PlotRow]]  # by prompts and policy


def by_panel(rows: Iterable[PlotRow]) -> Panels:
    """The rows of each panel, in the order of the rows."""
    panels: Panels = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    return panels


def looks_of(rows: Iterable[PlotRow]) -> list[PlotStyle]:
    """Each look once, in the order of the rows."""
    return list(dict.fromkeys(row.look for row in rows))


def arrange(panels: Panels, most: int) -> tuple[Panels, int, int]:
    """Panels in the order in which they are read, in lines and columns: prompts against policies where that fits."""
    axes = [list(dict.fromkeys(panel[i] for panel in panels)) for i in (0, 1)]
    down, across = (1, 0) if len(axes[1]) > most else (0, 1)
    order = sorted(panels, key=lambda panel: (axes[down].index(panel[down]), axes[across].index(panel[across])))
    columns = len(axes[across])
    if len(axes[down]) * columns != len(panels) or not 1 < columns <= most:
        lines = math.ceil(len(panels) / most)
        columns = math.ceil(len(panels) / lines)
    return {panel: panels[panel] for panel in order}, math.ceil(len(panels) / columns), columns


def sheet(lines: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of its own canvas, so that pyplot never hears of it; sizes are a panel's, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False, **options).flat)


def panel_sheet(
    panels: Panels, height: float = 2.6, most: int = 3, **options: Any
) -> tuple[Figure, list[tuple[Axes, list[PlotRow]]]]:
    """A figure with one titled panel for each prompts file and policy."""
    panels, lines, columns = arrange(panels, most)
    crowded = len(looks_of(row for mine in panels.values() for row in mine)) > CROWD
    width = {1: 7.2 if crowded else 5.0, 2: 3.6}.get(columns, 3.0)
    figure, axes = sheet(lines, columns, width, height, **options)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(_title(panel, round(width * 12)))
    return figure, list(zip(axes, panels.values(), strict=False))


def _title(panel: tuple[str, str], width: int) -> str:
    text = ", ".join(filter(None, panel))
    return text if len(text) <= width else "\n".join(filter(None, panel))


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Below the panels, in as many columns as fit; the figure grows by as much, so that the panels keep their size."""
    for columns in range(min(len(handles), 6), 0, -1):
        # No emptier last line than need be.
        columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        options = {"ncols": columns, "frameon": False, "fontsize": 8 if len(handles) <= 12 else 7}
        legend = figure.legend(handles=handles, loc="outside lower center", columnspacing=1.6, **options)
        box = legend.get_window_extent(figure.canvas.get_renderer())
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def line_handles(looks: Iterable[PlotStyle]) -> list[Artist]:
    """What stands for each look in a legend of lines."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], linestyle=x.line, label=x.label, **marker_style(x)) for x in looks]


def bar_handles(looks: Iterable[PlotStyle]) -> list[Artist]:
    """What stands for each look in a legend of bars."""
    from matplotlib.patches import Patch

    return [Patch(label=x.label, **bar_style(x)) for x in looks]


def bar_style(look: PlotStyle) -> dict[str, Any]:
    """A bar's colour, hatch and edge."""
    return {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.3}


def interval(rows: Sequence[PlotRow], names: Sequence[str]) -> list[list[float]]:
    """How far down and up the intervals of `names` reach, NaN where a row has none."""
    reach: list[list[float]] = [[], []]
    for row, name in zip(rows, names, strict=True):
        value, low, high = (row.value(name + end) for end in ("", "_lo", "_hi"))
        # A bootstrap interval may miss its own estimate by a hair; an error bar may not.
        reach[0].append(max(value - low, 0.0) if math.isfinite(low) else math.nan)
        reach[1].append(max(high - value, 0.0) if math.isfinite(high) else math.nan)
    return reach


def marker_style(look: PlotStyle) -> dict[str, Any]:
    """A marker's colour, shape and edge."""
    return {"color": look.colour, "marker": look.marker, "markeredgecolor": "white", "markeredgewidth": 0.4}


def draw_intervals(axis: Axes, look: PlotStyle, xs: Sequence[float], ys: Sequence[float], **reach: Any) -> None:
    """Error bars without their points; `reach` holds xerr, yerr or both."""
    axis.errorbar(xs, ys, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2, capthick=0.8, zorder=2.5, **reach)


def draw_per_depth(axis: Axes, rows: list[PlotRow], prefix: str) -> None:
    """A line for each row, side by side by a little so that no interval hides another."""
    from matplotlib.ticker import MaxNLocator

    looks = looks_of(rows)
    shift = min(0.06, 0.4 / len(looks))
    for row in rows:
        columns, place = row.series(prefix), (looks.index(row.look) - (len(looks) - 1) / 2) * shift
        xs, ys = [depth + place for depth in columns], [row.value(name) for name in columns.values()]
        axis.plot(xs, ys, linestyle=row.look.line, **marker_style(row.look))
        draw_intervals(axis, row.look, xs, ys, yerr=interval([row] * len(columns), list(columns.values())))
    axis.set_xlabel("draft depth")
    axis.set_xlim(-0.4, max(depth for row in rows for depth in row.series(prefix)) + 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


__all__ = ["draw", "plot"]

PLOTS = "plots"


def plot(directory: Path) -> list[Path]:
    """Draw every plot for which the tables have data. Error bars are the tables' own intervals.

    Args:
        directory: holds `results.csv` and perhaps `categories.csv`; nothing else in it is read.

    Returns:
        The files written, `plots/<name>.png` and `plots/<name>.pdf` for each plot.

    Raises:
        UserError: if a table is missing, empty or has other columns, or if the directory cannot be written.
    """
    directory = Path(directory)
    results, categories = read_tables(directory)
    return draw(directory / PLOTS, lambda: every_figure(results, categories))


def draw(folder: Path, figures: Callable[[], Iterable[tuple[str, Figure]]]) -> list[Path]:
    """Write figures by name, as PNG and PDF; they are made in the house's style.

    Raises:
        UserError: if the folder cannot be written to.
    """
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures():
            for suffix in ("png", "pdf"):
                path = folder / f"{name}.{suffix}"
                try:
                    folder.mkdir(exist_ok=True)
                    with atomic_file(path) as temporary:
                        # Without a date the same tables give the same bytes.
                        metadata = {"CreationDate": None} if suffix == "pdf" else {}
                        figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
                except OSError as error:
                    raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
                written.append(path)
    return written
