"""What the plots share: panels on a sheet, legends, marks and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from verl_speculator.evaluation.plotting.tables import Look, Row

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

Panels = dict[tuple[str, str], list[Row]]  # by prompts and policy


def by_panel(rows: Iterable[Row]) -> Panels:
    """The rows of each panel, in the order of the rows."""
    panels: Panels = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    return panels


def looks_of(rows: Iterable[Row]) -> list[Look]:
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
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
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


def line_handles(looks: Iterable[Look]) -> list[Artist]:
    """What stands for each look in a legend of lines."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], linestyle=x.line, label=x.label, **marker_style(x)) for x in looks]


def bar_handles(looks: Iterable[Look]) -> list[Artist]:
    """What stands for each look in a legend of bars."""
    from matplotlib.patches import Patch

    return [Patch(label=x.label, **bar_style(x)) for x in looks]


def bar_style(look: Look) -> dict[str, Any]:
    """A bar's colour, hatch and edge."""
    return {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.3}


def interval(rows: Sequence[Row], names: Sequence[str]) -> list[list[float]]:
    """How far down and up the intervals of `names` reach, NaN where a row has none."""
    reach: list[list[float]] = [[], []]
    for row, name in zip(rows, names, strict=True):
        value, low, high = (row.value(name + end) for end in ("", "_lo", "_hi"))
        # A bootstrap interval may miss its own estimate by a hair; an error bar may not.
        reach[0].append(max(value - low, 0.0) if math.isfinite(low) else math.nan)
        reach[1].append(max(high - value, 0.0) if math.isfinite(high) else math.nan)
    return reach


def marker_style(look: Look) -> dict[str, Any]:
    """A marker's colour, shape and edge."""
    return {"color": look.colour, "marker": look.marker, "markeredgecolor": "white", "markeredgewidth": 0.4}


def draw_intervals(axis: Axes, look: Look, xs: Sequence[float], ys: Sequence[float], **reach: Any) -> None:
    """Error bars without their points; `reach` holds xerr, yerr or both."""
    axis.errorbar(xs, ys, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2, capthick=0.8, zorder=2.5, **reach)


def draw_per_depth(axis: Axes, rows: list[Row], prefix: str) -> None:
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
