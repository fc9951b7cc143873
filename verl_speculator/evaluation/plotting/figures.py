"""The plots, one function each. Each returns None where the tables have nothing for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from verl_speculator.evaluation.plotting.labels import label_points
from verl_speculator.evaluation.plotting.sheets import (
    CROWD,
    add_legend,
    arrange,
    bar_handles,
    bar_style,
    by_panel,
    draw_intervals,
    draw_per_depth,
    interval,
    line_handles,
    looks_of,
    marker_style,
    panel_sheet,
    sheet,
)
from verl_speculator.evaluation.plotting.tables import INK, Row

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS = {
    "tau": "tokens per target call, τ",
    "accept_rate": "acceptance rate, share of draft tokens",
    "speedup": "speedup over the base alone, ×",
    "kl": "KL from the base, nats/token",
    "ce": "cross-entropy, nats/token",
    "top1": "top-1 accuracy (share)",
}
FRONT = "#A8A8A8"


def every_figure(results: list[Row], categories: list[Row]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of every plot for which there is data."""
    figures = [
        ("acceptance_per_depth", acceptance_per_depth(results)),
        ("accepted_length_histogram", accepted_length_histogram(results)),
        ("speedup_against_quality", speedup_against_quality(results)),
        *((f"categories_{metric}", by_category(categories, metric)) for metric in ("tau", "accept_rate", "speedup")),
        ("quality_per_depth", quality_per_depth(results)),
    ]
    return ((name, figure) for name, figure in figures if figure is not None)


def acceptance_per_depth(rows: list[Row]) -> Figure | None:
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


def accepted_length_histogram(rows: list[Row]) -> Figure | None:
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


def by_category(rows: list[Row], metric: str) -> Figure | None:
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


def quality_per_depth(rows: list[Row]) -> Figure | None:
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


def _without_policy(rows: list[Row], prefixes: Sequence[str]) -> list[Row]:
    """Each speculator once where its values are the same under every policy and beside every prompts file: they are of
    the held-out text, and have no panel of their own then."""
    for panel in (lambda row: ("", ""), lambda row: (row.panel[0], "")):
        merged: dict[Any, Row] = {}
        for row in rows:
            values = tuple((n, row.value(n)) for prefix in prefixes for n in row.series(prefix).values())
            merged.setdefault((row.look, panel(row), values), replace(row, panel=panel(row)))
        if len({key[:2] for key in merged}) == len(merged):
            return list(merged.values())
    return rows


def speedup_against_quality(rows: list[Row]) -> Figure | None:
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


def _quality(rows: list[Row]) -> tuple[str, list[Row]]:
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
