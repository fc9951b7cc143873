"""What a sweep is asked to do: a YAML file, the command line or both, checked before anything heavy loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.sweep.grid import Refinement, Values, make_points, read_list, read_values, read_yaml, setting_name
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError, nearest

EXECUTORS = ("local", "ray")
KEYS = (
    *("base", "train_files", "prompts", "text", "out"),
    *("settings", "axes", "points", "refine", "evaluation", "nproc", "executor"),
)
# What the sweep says to the evaluation by itself; a tree is chosen for one speculator, and no setting of a sweep.
_OWN = ("base", "speculators", "prompts", "out", "texts", "baselines", "draft_trees")
EVALUATION_KEYS = tuple(f.name for f in fields(EvaluationSettings) if f.name not in _OWN)

Files = dict[str, Path]


@dataclass(frozen=True)
class SweepSettings:
    """Everything that decides which points there are and what is measured of them.

    Attributes:
        base: directory or hub name.
        train_files: parquet files; empty where the points name their own.
        prompts: prompt files by name; the figures of the first carry no name.
        texts: held-out text by name, likewise; empty to leave quality out.
        out: directory of the results.
        settings: of the launcher, the same for every point.
        points: of the launcher, each point's own.
        evaluation: options of the evaluation.
        nproc: processes of each training.
        executor: one of EXECUTORS.
    """

    base: str
    train_files: tuple[str, ...]
    prompts: Files
    texts: Files
    out: Path
    settings: Values
    points: tuple[Values, ...]
    evaluation: dict[str, Any]
    nproc: int = 1
    executor: str = "local"

    def evaluation_settings(self) -> EvaluationSettings:
        """The evaluation of any point, without its checkpoint."""
        return EvaluationSettings(
            base=self.base,
            speculators=(),
            prompts=tuple(self.prompts.values()),
            out=self.out,
            baselines=(),
            **self.evaluation,
        )


def read_settings(file: Path | None, given: Mapping[str, Any]) -> SweepSettings:
    """The settings of a sweep file, with what the command line says in their place.

    Args:
        file: None for the command line alone.
        given: keys of KEYS as a file would have them, but `axes` and `settings` in Hydra's syntax already; these
            two and `evaluation` are added to what the file has, all else replaces it.

    Raises:
        UserError: naming the key, what came, and what is accepted.
    """
    raw = read_yaml(file) if file else {}
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected keys such as {', '.join(KEYS[:4])}")
    _check_keys(raw, KEYS, str(file))
    where = f"{file}: " if file else ""
    axes = _axes(raw.get("axes", {}), f"{where}axes") | given.get("axes", {})
    settings = read_values(raw.get("settings", {}), f"{where}settings") | given.get("settings", {})
    listed = raw.get("points", [])
    if not isinstance(listed, list) or ("points" in raw and not listed):
        raise UserError(f"{where}points: expected a list of points, each with its settings")
    points = [read_values(point, f"{where}points[{i}]") for i, point in enumerate(listed)]
    refine = _refinement(raw["refine"], f"{where}refine") if "refine" in raw else None
    if not (axes or points or refine):
        raise UserError(f"{where}nothing to sweep over: expected axes, points or refine")
    evaluation = _evaluation(raw.get("evaluation", {}), f"{where}evaluation")
    evaluation |= _evaluation(given.get("evaluation", {}), "evaluation")
    raw = raw | {name: value for name, value in given.items() if value not in (None, [], ())}
    for name in ("base", "prompts", "out"):
        if not raw.get(name):
            raise UserError(f"{where}{name} is not set: expected {_EXPECTED[name]}")
    for name in ("base", "out"):
        if not isinstance(raw[name], (str, Path)):
            raise UserError(f"{where}{name}={raw[name]}: expected {_EXPECTED[name]}")
    points = make_points(axes, points, refine)
    train_files = [Path(path).expanduser() for path in _paths(raw.get("train_files") or [], f"{where}train_files")]
    if not train_files and not all("data.train_files" in settings | point for point in points):
        raise UserError(f"{where}train_files is not set: expected one parquet file or a list of them")
    executor = str(raw.get("executor", EXECUTORS[0]))
    if executor not in EXECUTORS:
        accepted = ", ".join(EXECUTORS)
        raise UserError(f"{where}executor={executor}: expected one of {accepted}{nearest(executor, EXECUTORS)}")
    found = SweepSettings(
        base=_base(str(raw["base"])),
        train_files=tuple(str(path.absolute()) for path in train_files),
        prompts=_named(raw["prompts"], f"{where}prompts"),
        texts=_named(raw.get("text") or [], f"{where}text"),
        out=Path(raw["out"]).expanduser().absolute(),
        settings=settings,
        points=tuple(points),
        evaluation=evaluation,
        nproc=_whole(raw.get("nproc", 1), f"{where}nproc"),
        executor=executor,
    )
    found.evaluation_settings()
    check_writable(f"out={found.out}", found.out)
    return found


_EXPECTED = {
    "base": "a directory or a hub name",
    "prompts": "a parquet or jsonl file of prompts, or several",
    "out": "a directory for the results",
}


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in raw:
        if name not in known:
            raise UserError(f"{where}: {name} is not a key{nearest(str(name), known)}; known: {', '.join(known)}")


def _axes(raw: Any, where: str) -> dict[str, list[str]]:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected settings with a list of values each")
    return {setting_name(name, where): read_list(values, f"{where}.{name}") for name, values in raw.items()}


def _refinement(raw: Any, where: str) -> Refinement:
    keys = tuple(f.name for f in fields(Refinement))
    if not isinstance(raw, dict) or not set(keys) <= set(raw):
        raise UserError(f"{where}: expected {', '.join(keys)}")
    _check_keys(raw, keys, where)
    coarse, everything = (tuple(read_list(raw[name], f"{where}.{name}")) for name in ("coarse", "all"))
    return Refinement(setting_name(str(raw["axis"]), f"{where}.axis"), coarse, everything)


def _paths(raw: Any, where: str) -> tuple[str, ...]:
    values = [raw] if isinstance(raw, (str, Path)) else raw
    if not isinstance(values, list) or not all(isinstance(value, (str, Path)) and str(value) for value in values):
        raise UserError(f"{where}: expected one file or a list of them, got {raw!r}")
    return tuple(str(value) for value in values)


def _base(name: str) -> str:
    """A directory wherever a process of the sweep is started, or a hub's name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() or name.startswith("~") else name


def _named(raw: Any, where: str) -> Files:
    """Files by name: a file or a list of them, called by their stems or as `name=file`, or a mapping."""
    if isinstance(raw, dict):
        pairs = [(str(name), *_paths(path, f"{where}.{name}")) for name, path in raw.items()]
    else:
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", path) for path in _paths(raw, where)]
        pairs = [(part[1] or Path(part[2]).stem, part[2]) for part in parts]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two files are called {name}; expected names of their own, such as other={name}")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{where}: {name!r} is no name for a column; expected letters, digits, '.', '_' and '-'")
    return {name: Path(path).expanduser().absolute() for name, path in pairs}


def _whole(raw: Any, where: str) -> int:
    text = str(raw)
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UserError(f"{where}={raw}: expected a positive integer")
    return int(text)


def _evaluation(raw: Any, where: str) -> dict[str, Any]:
    """Options of the evaluation, of the types that it has them in."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected options with a value each, such as num_prompts: 20")
    _check_keys(raw, EVALUATION_KEYS, where)
    types = get_type_hints(EvaluationSettings)
    found = {}
    for name, value in raw.items():
        try:
            found[name] = TypeAdapter(types[name]).validate_python(None if value in ("null", "~") else value)
        except ValidationError as error:
            reasons = ", or ".join(fault["msg"] for fault in error.errors())
            raise UserError(f"{where}.{name}={value}: {reasons}") from None
    return found
