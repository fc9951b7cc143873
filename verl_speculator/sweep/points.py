"""Which points a sweep has, and what each is called. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from verl_speculator.errors import UserError
from verl_speculator.sweep.values import Values, shown


@dataclass(frozen=True)
class Refinement:
    """An axis that is walked twice: first the coarse values, then all of them.

    Attributes:
        axis: the setting.
        coarse: values whose points come first.
        all: values whose points follow; those that are there already are not repeated.
    """

    axis: str
    coarse: tuple[str, ...]
    all: tuple[str, ...]


def make_points(
    axes: Mapping[str, Sequence[str]], listed: Sequence[Values] = (), refine: Refinement | None = None
) -> list[Values]:
    """Every listed point with every combination of the axes, each once, in the order in which they are trained.

    Raises:
        UserError: if a listed point sets an axis, or the refined axis is one of `axes` too.
    """
    if refine and refine.axis in axes:
        raise UserError(f"refine.axis={refine.axis}: is one of axes too, expected it in one place")
    for i, point in enumerate(listed):
        for name in point:
            if name in axes or (refine and name == refine.axis):
                raise UserError(f"points[{i}]: {name} is an axis too, expected it in one place")
    stages = [dict(axes)]
    if refine:
        stages = [dict(axes) | {refine.axis: values} for values in (refine.coarse, refine.all)]
    found: dict[frozenset[tuple[str, str]], Values] = {}
    for stage in stages:
        for point in listed or ({},):
            for values in product(*stage.values()):
                made = point | dict(zip(stage, values, strict=True))
                found.setdefault(frozenset(made.items()), made)
    return list(found.values())


def columns_of(points: Sequence[Values]) -> list[str]:
    """Every setting that a point names, in order."""
    return list(dict.fromkeys(name for point in points for name in point))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each setting's last part, or its whole name where another one ends alike."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)}


def labels_of(points: Sequence[Values]) -> list[str]:
    """A name for each point, of the settings that tell the points apart; a method needs no name of its setting's."""
    names = columns_of(points)
    short = short_names(names)
    varying = [name for name in names if len({point.get(name) for point in points}) > 1] or names

    def part(name: str, value: str) -> str:
        return shown(value) if short[name] == "method" else f"{short[name]}={shown(value)}"

    return [", ".join(part(name, point[name]) for name in varying if name in point) or "default" for point in points]
