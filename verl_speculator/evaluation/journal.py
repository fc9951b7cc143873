"""Measurements as JSON lines, one as soon as it is made: a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_speculator.errors import UserError
from verl_speculator.files import atomic_file


@dataclass
class Journal:
    """The measurements of one row of the results.

    Attributes:
        path: the file.
        settings: what makes the row this one; they name the file.
        identity: what else must be the same for old measurements to count, such as a fingerprint of the weights.
        records: the measurements by the index of their prompt or document.
        origin: date and commit of the code that began it; recorded, never compared.
        scope: the indices that are asked for. Records of others are kept for a run that asks for them again.
    """

    path: Path
    settings: dict[str, Any]
    identity: dict[str, Any]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    scope: list[int] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: dict[str, Any],
        identity: dict[str, Any],
        origin: dict[str, Any],
        scope: list[int],
    ) -> Journal:
        """A journal to go on with: what it already knows, or nothing if that was measured on something else."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        journal = cls(directory / f"{name}.jsonl", settings, identity, origin=origin, scope=scope)
        found = cls.read(journal.path)
        if found is not None and found.identity == identity:
            journal.records, journal.origin = found.records, found.origin
        # Anew, since a killed run may have left half a last line.
        head = {"settings": settings, "identity": identity, "origin": journal.origin, "scope": scope}
        lines = [head, *journal.records.values()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(journal.path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"out={directory.parent}: cannot be written to: {error.strerror or error}") from None
        return journal

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """A journal as it lies on the disk, without half a last line; None if there is none."""
        found: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not found:
            return None
        head, records = found[0], {record["index"]: record for record in found[1:]}
        return cls(path, head["settings"], head["identity"], records, head["origin"], head["scope"])

    def measured(self) -> list[dict[str, Any]]:
        """The records that are asked for."""
        return [self.records[i] for i in self.scope if i in self.records]

    def missing(self) -> list[int]:
        """The indices that are asked for and have no record yet."""
        return [i for i in self.scope if i not in self.records]

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Keep the measurement of a prompt or document."""
        self.records[index] = {"index": index} | dict(record)
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[index]) + "\n")
