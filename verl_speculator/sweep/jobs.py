"""A point as something to do: what the launcher and the evaluation are started with, and where its results lie."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_speculator.files import atomic_file
from verl_speculator.sweep.values import Values

POINTS = "points"
TRAINING, EVALUATION, POINT = "training.json", "evaluation.json", "point.json"
DONE, DIVERGED, OUT_OF_MEMORY, FAILED, WAITING = "done", "diverged", "out of memory", "failed", "waiting"


@dataclass(frozen=True)
class Measurement:
    """One call of the evaluation.

    Attributes:
        directory: of its results.
        arguments: of `verl-speculator evaluate`, without the checkpoint.
        behaviour: names of the prompt sets that are reported, by file.
        quality: name of the text whose figures are reported, None for none.
    """

    directory: Path
    arguments: tuple[str, ...]
    behaviour: dict[str, str]
    quality: str | None


@dataclass(frozen=True)
class Job:
    """One point of a sweep.

    Attributes:
        label: what a person calls it.
        values: its settings.
        overrides: all settings of its training.
        identity: what makes its training this one.
        directory: all that belongs to it.
        processes: of its training.
        measurements: calls of the evaluation; the first one's figures are the point's own.
        measured: what makes its evaluation this one.
    """

    label: str
    values: Values
    overrides: tuple[str, ...]
    identity: dict[str, Any]
    directory: Path
    processes: int
    measurements: tuple[Measurement, ...]
    measured: dict[str, Any]

    @property
    def run(self) -> Path:
        """The launcher's save path."""
        return self.directory / "run"

    def training(self) -> dict[str, Any]:
        """The account of its training, empty if there is none."""
        return read_record(self.directory / TRAINING)

    def evaluation(self) -> dict[str, Any]:
        """The account of its evaluation, empty if there is none, or of another one."""
        found = read_record(self.directory / EVALUATION)
        return found if found.get("measured") == self.measured else {}

    @property
    def status(self) -> str:
        """DONE, WAITING, or how it failed."""
        for record in (self.training(), self.evaluation()):
            if record.get("status") != DONE:
                return record.get("status", WAITING)
        return DONE

    @property
    def reason(self) -> str:
        """Why it failed, empty if it did not."""
        return self.training().get("reason") or self.evaluation().get("reason") or ""


def digest(identity: Mapping[str, Any]) -> str:
    """A short name of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def point_directory(out: Path, label: str, identity: Mapping[str, Any]) -> Path:
    """Where a point lies: found by its identity under whatever label, else a new place that begins with this one."""
    key = digest(identity)
    found = sorted((out / POINTS).glob(f"*-{key}"))
    slug = re.sub(r"[^\w.=-]+", "_", label)[:60]
    return (found[0] if found else out / POINTS / f"{slug}-{key}").absolute()


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file, empty if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON file, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, default=str) + "\n")
