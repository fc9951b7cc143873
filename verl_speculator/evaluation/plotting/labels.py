"""Placing the names of points where they cover neither each other nor anything else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from verl_speculator.evaluation.plotting.tables import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
