"""Settings of a sweep, from a YAML file, the command line or both, and the grid of points that they describe.

Values stay texts in Hydra's syntax, as the launcher takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from verl_speculator.config.schema import DIM_KEYS, PREFIX, check_value, known_settings
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.settings import Option, UserError, nearest

EXECUTORS = ("local", "ray")
# Axes with a short name: keys of `axes` in the file, options of the command.
SHORT_NAMES = {
    "exit_layers": PREFIX + "exit_layer",
    "temperatures": PREFIX + "kl_temperature",
    "train": PREFIX + "trainable",
}
# Settings of the launcher that the sweep sets itself, with its own name for each.
RESERVED = {"model.partial_pretrain": "base", "model.path": "base", "trainer.default_local_dir": "out"}
KEYS = (
    *("base", "train_files", "prompts", "text", "out"),
    *("settings", "axes", "points", "refine", "evaluation", "nproc", "executor"),
)
EXPECTED = {
    "base": "a directory or a hub name",
    "prompts": "a parquet or jsonl file of prompts, or several",
    "out": "a directory for the results",
}
# The sweep sets the others itself; a draft tree is chosen for one speculator.
EVALUATION_KEYS = tuple(
    field.name
    for field in fields(EvaluationSettings)
    if field.name not in ("base", "speculators", "prompts", "out", "texts", "baselines", "draft_trees", "plots")
)
# What Hydra reads as itself without quotes.
PLAIN = re.compile(r"[\w./+-]+")

Values = dict[str, str]


@dataclass(frozen=True)
class SweepOptions:
    """What the command line replaces in a sweep file, or adds to its `axes`, `settings` and `evaluation`."""

    base: Annotated[str | None, Option("base model: a directory or a hub name")] = None
    train_files: Annotated[tuple[str, ...], Option("parquet to train on; may be given again")] = ()
    prompts: Annotated[tuple[str, ...], Option("parquet or jsonl of prompts, or NAME=FILE; may be given again")] = ()
    text: Annotated[tuple[str, ...], Option("held-out text, or NAME=FILE; may be given again")] = ()
    out: Annotated[Path | None, Option("directory of results.csv and plots/; goes on in it")] = None
    exit_layers: Annotated[str | None, Option(f"values of {SHORT_NAMES['exit_layers']}: a,b,c")] = None
    temperatures: Annotated[str | None, Option(f"values of {SHORT_NAMES['temperatures']}: a,b,c")] = None
    train: Annotated[str | None, Option(f"values of {SHORT_NAMES['train']}: a,b,c")] = None
    axis: Annotated[tuple[str, ...], Option("KEY=a,b,c of any setting; may be given again")] = ()
    set: Annotated[tuple[str, ...], Option("KEY=VALUE for every point; may be given again")] = ()
    evaluation: Annotated[
        tuple[str, ...], Option("NAME=VALUE of `evaluate`, such as num_prompts=20; may be given again")
    ] = ()
    nproc: Annotated[int | None, Option("processes of each training [1]")] = None
    executor: Annotated[str | None, Option(f"{' or '.join(EXECUTORS)} [{EXECUTORS[0]}]")] = None

    def axes(self) -> dict[str, list[str]]:
        """Values of each axis by its full name."""
        texts = {(SHORT_NAMES[name], f"--{name.replace('_', '-')}"): getattr(self, name) for name in SHORT_NAMES}
        for name, values in _pairs("--axis", self.axis):
            full_name = setting_name(name, "--axis")
            texts[full_name, f"--axis {full_name}"] = values
        return {name: split_list(name, text, where) for (name, where), text in texts.items() if text is not None}


@dataclass(frozen=True)
class SweepSettings:
    """Everything that decides which points there are and what is measured of them."""

    base: str  # directory or hub name of the base model
    train_files: tuple[str, ...]  # parquet files; empty where the points name their own
    prompts: dict[str, Path]  # prompt files by name; in the results the first one's columns have no suffix
    texts: dict[str, Path]  # held-out text by name, likewise; empty to measure no quality
    out: Path  # directory of the results
    settings: Values  # of the launcher, the same for every point
    points: tuple[Values, ...]  # settings of the launcher by point
    evaluation: dict[str, Any]  # options of the evaluation
    nproc: int = 1  # processes of each training
    executor: str = "local"  # one of EXECUTORS

    def evaluation_settings(self) -> EvaluationSettings:
        """The evaluation of any point, without its checkpoint."""
        prompts = tuple(self.prompts.values())
        return EvaluationSettings(base=self.base, prompts=prompts, out=self.out, baselines=(), **self.evaluation)


def read_settings(file: Path | None, options: SweepOptions = SweepOptions()) -> SweepSettings:
    """The settings of a sweep file and of the command line.

    Raises:
        UserError: naming the key, the value and what is accepted.
    """
    raw = read_yaml(file) if file else {}
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected keys such as {', '.join(KEYS[:4])}")
    _check_keys(raw, KEYS, str(file))
    where = f"{file}: " if file else ""
    settings = _values(raw.get("settings", {}), f"{where}settings")
    settings |= {setting_name(name, "--set"): value for name, value in _pairs("--set", options.set)}
    points = _read_points(raw, options, where)
    evaluation = _evaluation(raw.get("evaluation", {}), f"{where}evaluation")
    evaluation |= _evaluation(dict(_pairs("--evaluation", options.evaluation)), "evaluation")

    for name in ("base", "train_files", "prompts", "text", "out", "nproc", "executor"):
        if getattr(options, name) not in (None, ()):
            raw[name] = getattr(options, name)
    for name, expected in EXPECTED.items():
        if not raw.get(name):
            raise UserError(f"{where}{name} is not set: expected {expected}")
        if name != "prompts" and not isinstance(raw[name], (str, Path)):
            raise UserError(f"{where}{name}={raw[name]}: expected {expected}")
    train_files = _paths(raw.get("train_files") or [], f"{where}train_files")
    if not train_files and not all("data.train_files" in settings | point for point in points):
        raise UserError(f"{where}train_files is not set: expected one parquet file or a list of them")
    executor, nproc = str(raw.get("executor", EXECUTORS[0])), str(raw.get("nproc", 1))
    check_value(f"{where}executor", executor, Literal[EXECUTORS])
    if not re.fullmatch(r"0*[1-9][0-9]*", nproc):
        raise UserError(f"{where}nproc={nproc}: expected a positive integer")
    # A directory must mean the same in every process of the sweep.
    base = _absolute(raw["base"])
    sweep = SweepSettings(
        base=str(base) if base.is_dir() or str(raw["base"]).startswith("~") else str(raw["base"]),
        train_files=tuple(str(_absolute(path)) for path in train_files),
        prompts=_named_files(raw["prompts"], f"{where}prompts"),
        texts=_named_files(raw.get("text") or [], f"{where}text"),
        out=_absolute(raw["out"]),
        settings=settings,
        points=tuple(points),
        evaluation=evaluation,
        nproc=int(nproc),
        executor=executor,
    )
    sweep.evaluation_settings()
    check_writable(f"out={sweep.out}", sweep.out)
    return sweep


def read_yaml(path: Path) -> Any:
    """Lists, mappings and texts of a YAML file: numbers stay as they are written.

    Raises:
        UserError: for a file that does not exist or is not YAML, or a key that is there twice.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _check_distinct([key.value for key, _ in node.value], str(path))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in raw:
        if name not in known:
            raise UserError(f"{where}: {name} is not a key{nearest(str(name), known)}; known: {', '.join(known)}")


def _check_distinct(values: list[str], where: str) -> list[str]:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{where}: {repeated[0]} stands there twice")
    return values


def _pairs(option: str, texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Name and value of each `NAME=VALUE`."""
    for name, equals, value in (text.partition("=") for text in texts):
        if not (name and equals):
            raise UserError(f"{option} {name}: expected NAME=VALUE")
        yield name, value


def hydra_value(value: Any) -> str:
    """A text, or a list or mapping of texts, in Hydra's syntax."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    return value if PLAIN.fullmatch(value) else QuotedString(text=value, quote=Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """A value without the quotes that Hydra needs."""
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1].replace("\\" + value[0], value[0]) if is_quoted else value


def setting_name(name: str, where: str) -> str:
    """The full name of a setting from its full or short name; a UserError if the sweep sets it or none has it."""
    full_name = SHORT_NAMES.get(name, name)
    bare = full_name.lstrip("+")
    if bare in RESERVED:
        raise UserError(f"{where}: {name} is the sweep's own {RESERVED[bare]}")
    if "." not in bare:
        known = known_settings()
        hint = f" (did you mean {PREFIX + bare!r}?)" if bare in known else nearest(bare, [*SHORT_NAMES, *known])
        raise UserError(f"{where}: {name} is no setting{hint}; expected a full name such as {PREFIX}n_predict")
    return full_name


def _check_type(raw: Any, kind: type, where: str, expected: str) -> None:
    if not isinstance(raw, kind):
        raise UserError(f"{where}: expected {expected}, got {'nothing' if raw in ('', None) else repr(raw)[:80]}")


def _values(raw: Any, where: str) -> Values:
    _check_type(raw, dict, where, "settings with a value each")
    return {setting_name(name, where): hydra_value(value) for name, value in raw.items()}


def _axis(raw: Any, where: str) -> list[str]:
    _check_type(raw, list, where, "a list of values such as [1, 2]")
    return _axis_values([hydra_value(value) for value in raw], where)


def _axis_values(values: list[str], where: str) -> list[str]:
    if not values:
        raise UserError(f"{where}: an empty axis, expected at least one value")
    return _check_distinct(values, where)


def split_list(name: str, text: str, where: str) -> list[str]:
    """The values of an axis on the command line, Hydra's `a,b,c` or `range(0,16)`; a UserError if it refuses them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if name.removeprefix(PREFIX) in DIM_KEYS:  # Hydra would read 1024.2560 as a number
        return _axis_values([part.strip() for part in text.split(",") if part.strip()], where)
    try:
        parsed = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException as error:
        raise UserError(f"{where}={text}: {str(error).splitlines()[0]}") from None
    values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [text]
    return _axis_values([value for value in values if value], where)


def _paths(raw: Any, where: str) -> tuple[str, ...]:
    values = [raw] if isinstance(raw, (str, Path)) else raw
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (str, Path)) and str(v) for v in values):
        raise UserError(f"{where}: expected one file or a list of them, got {raw!r}")
    return tuple(map(str, values))


def _named_files(raw: Any, where: str) -> dict[str, Path]:
    """Files by name, from a file or a list of them, named by their stems or as `name=file`, or from a mapping."""
    if isinstance(raw, dict):
        pairs = [(str(name), *_paths(path, f"{where}.{name}")) for name, path in raw.items()]
    else:
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", path) for path in _paths(raw, where)]
        pairs = [(part[1] or Path(part[2]).stem, part[2]) for part in parts]
    for i, (name, _) in enumerate(pairs):
        if name in dict(pairs[:i]):
            raise UserError(f"{where}: two files are called {name}; expected names of their own, such as other={name}")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{where}: {name!r} is no name for a column; expected letters, digits, '.', '_' and '-'")
    return {name: _absolute(path) for name, path in pairs}


def _evaluation(raw: Any, where: str) -> dict[str, Any]:
    """Options of the evaluation, in the types of its settings."""
    from pydantic import TypeAdapter, ValidationError

    _check_type(raw, dict, where, "options with a value each, such as num_prompts: 20")
    _check_keys(raw, EVALUATION_KEYS, where)
    types = get_type_hints(EvaluationSettings)
    options = {}
    for name, value in raw.items():
        try:
            options[name] = TypeAdapter(types[name]).validate_python(None if value in ("null", "~") else value)
        except ValidationError as error:
            reasons = ", or ".join(fault["msg"] for fault in error.errors())
            raise UserError(f"{where}.{name}={value}: {reasons}") from None
    return options


class Refinement(NamedTuple):
    """An axis whose `coarse` values are trained first, and then those of `all`."""

    axis: str
    coarse: Sequence[str]
    all: Sequence[str]


def _read_points(raw: Mapping[str, Any], options: SweepOptions, where: str) -> list[Values]:
    """The points of `axes`, `points` and `refine`."""
    axes = raw.get("axes", {})
    _check_type(axes, dict, f"{where}axes", "settings with a list of values each")
    axes = {setting_name(name, f"{where}axes"): _axis(axes[name], f"{where}axes.{name}") for name in axes}
    axes |= options.axes()
    listed = raw.get("points", [])
    _check_type(raw.get("points", [{}]) or None, list, f"{where}points", "a list of points, each with its settings")
    listed = [_values(point, f"{where}points[{i}]") for i, point in enumerate(listed)]
    refine, keys = raw.get("refine"), ("axis", "coarse", "all")
    if "refine" in raw:
        if not isinstance(refine, dict) or not set(keys) <= set(refine):
            raise UserError(f"{where}refine: expected {', '.join(keys)}")
        _check_keys(refine, keys, f"{where}refine")
        coarse, everything = (_axis(refine[name], f"{where}refine.{name}") for name in ("coarse", "all"))
        refine = Refinement(setting_name(str(refine["axis"]), f"{where}refine.axis"), coarse, everything)
    if not (axes or listed or refine):
        raise UserError(f"{where}nothing to sweep over: expected axes, points or refine")
    return make_points(axes, listed, refine)


def make_points(
    axes: Mapping[str, Sequence[str]], listed: Sequence[Values] = (), refine: Refinement | None = None
) -> list[Values]:
    """Every listed point with every combination of the axes, each once, in the order in which they are trained.

    Raises:
        UserError: if a listed point sets an axis, or the refined axis is one of `axes` too.
    """
    if refine and refine.axis in axes:
        raise UserError(f"refine.axis={refine.axis}: is one of axes too, expected it in one place")
    grids = [dict(axes) | {refine.axis: values} for values in (refine.coarse, refine.all)] if refine else [axes]
    for i, point in enumerate(listed):
        if repeated := [name for name in point if name in grids[0]]:
            raise UserError(f"points[{i}]: {repeated[0]} is an axis too, expected it in one place")
    points: dict[frozenset[tuple[str, str]], Values] = {}
    for grid, listed_point in product(grids, listed or ({},)):
        for values in product(*grid.values()):
            point = listed_point | dict(zip(grid, values, strict=True))
            points.setdefault(frozenset(point.items()), point)
    return list(points.values())


def columns_of(points: Sequence[Values]) -> list[str]:
    """Every setting that a point names, in order."""
    return list(dict.fromkeys(name for point in points for name in point))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each setting's last part, or its whole name where another one ends alike."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)}


def labels_of(points: Sequence[Values]) -> list[str]:
    """A name for each point, of the settings in which points differ; a method stands without its setting's name."""
    names = columns_of(points)
    short = short_names(names)
    varying = [name for name in names if len({point.get(name) for point in points}) > 1] or names

    def part(name: str, value: str) -> str:
        return unquoted(value) if short[name] == "method" else f"{short[name]}={unquoted(value)}"

    return [", ".join(part(name, point[name]) for name in varying if name in point) or "default" for point in points]
