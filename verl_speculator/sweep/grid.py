"""Which points a sweep has, and what each is called. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from verl_speculator.config.schema import DIM_KEYS, PREFIX, known_settings
from verl_speculator.utils.errors import UserError, nearest

# Settings that a sweep names by a word of their own: in its file as axes, on its command line as options.
SHORT_NAMES = {
    "exit_layers": PREFIX + "exit_layer",
    "temperatures": PREFIX + "kl_temperature",
    "train": PREFIX + "trainable",
}
# What the sweep itself sets, with the name that it has here.
RESERVED = {
    "model.partial_pretrain": "base",
    "model.path": "base",
    "trainer.default_local_dir": "out",
}
PLAIN = re.compile(r"[\w./+-]+")

Values = dict[str, str]


def read_yaml(path: Path) -> Any:
    """Lists, mappings and raw texts of a YAML file.

    Raises:
        UserError: for a file that is not there or no YAML, and for a key that stands twice.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """Texts as they are written, and no key twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f"{path}: {twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def hydra_value(value: Any) -> str:
    """A value in Hydra's syntax: a text, or lists and mappings of texts."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    return value if PLAIN.fullmatch(value) else QuotedString(text=value, quote=Quote.single).with_quotes()


def shown(value: str) -> str:
    """A value without the quotes that Hydra needs."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1].replace("\\" + value[0], value[0]) if quoted else value


def setting_name(name: str, where: str) -> str:
    """The full name of a setting, of a short name too.

    Raises:
        UserError: for what no setting can be called, or the sweep sets by itself.
    """
    full = SHORT_NAMES.get(name, name)
    bare = full.lstrip("+")
    if bare in RESERVED:
        raise UserError(f"{where}: {name} is the sweep's own {RESERVED[bare]}")
    if "." not in bare:
        known = [*SHORT_NAMES, *known_settings()]
        full_names = [PREFIX + bare] if bare in known_settings() else []
        hint = f" (did you mean {full_names[0]!r}?)" if full_names else nearest(bare, known)
        raise UserError(f"{where}: {name} is no setting{hint}; expected a full name such as {PREFIX}n_predict")
    return full


def read_values(raw: Any, where: str) -> Values:
    """A mapping of settings to values, from a file.

    Raises:
        UserError: if it is none.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected settings with a value each, got {_short(raw)}")
    return {setting_name(name, where): hydra_value(value) for name, value in raw.items()}


def read_list(raw: Any, where: str) -> list[str]:
    """The values of an axis, from a file.

    Raises:
        UserError: for what is no list, is empty, or names a value twice.
    """
    if not isinstance(raw, list):
        raise UserError(f"{where}: expected a list of values such as [1, 2], got {_short(raw)}")
    return _distinct([hydra_value(value) for value in raw], where)


def split_list(name: str, text: str, where: str) -> list[str]:
    """The values of an axis, from the command line: Hydra's `a,b,c` or `range(0,16)`.

    Raises:
        UserError: for what Hydra cannot read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if name.removeprefix(PREFIX) in DIM_KEYS:  # Hydra would make a number of 1024.2560
        return _distinct([part.strip() for part in text.split(",") if part.strip()], where)
    try:
        parsed = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException as error:
        raise UserError(f"{where}={text}: {str(error).splitlines()[0]}") from None
    values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [text]
    return _distinct([value for value in values if value], where)


def _distinct(values: Sequence[str], where: str) -> list[str]:
    if not values:
        raise UserError(f"{where}: an empty axis, expected at least one value")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{where}: {twice[0]} stands there twice")
    return list(values)


def _short(raw: Any) -> str:
    return "nothing" if raw in ("", None) else repr(raw)[:80]


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
