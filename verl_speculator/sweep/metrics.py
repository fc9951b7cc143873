"""What a run's file logger has written: one JSON object a step, `null` for what is not a finite number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOSS = "train/loss"


def new_file(directory: Path) -> Path:
    """A place for the next attempt's metrics: verl's file logger empties the file that it opens."""
    number = len(list(directory.glob("metrics-*.jsonl"))) + 1
    return directory / f"metrics-{number:03d}.jsonl"


def read_metrics(directory: Path) -> dict[int, dict[str, Any]]:
    """Metrics by step, over all attempts; a step that was done again counts as it was done last."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(directory.glob("metrics-*.jsonl")):
        found |= {entry["step"]: entry["data"] for entry in _entries(path.read_bytes())}
    return dict(sorted(found.items()))


def divergence(metrics: dict[int, dict[str, Any]]) -> str | None:
    """Where the loss stopped being a number; None where it never did."""
    for step, values in metrics.items():
        if LOSS in values and (values[LOSS] is None or not math.isfinite(values[LOSS])):
            return f"the loss is not finite from step {step} on"
    return None


def seconds(metrics: dict[int, dict[str, Any]]) -> float:
    """Time spent in training steps, without starting, validating and saving."""
    return sum(
        values["train/global_tokens"] / values["perf/tokens_per_second"]
        for values in metrics.values()
        if values.get("perf/tokens_per_second")
    )


class DivergenceWatch:
    """Whether a run that is going on has diverged; reads what is new in its file."""

    def __init__(self, path: Path) -> None:
        self.path, self.read, self.diverged = path, 0, False

    def __call__(self) -> bool:
        if not self.diverged and self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.read)
                whole, newline, _ = file.read().rpartition(b"\n")
            self.read += len(whole + newline)
            self.diverged = divergence({entry["step"]: entry["data"] for entry in _entries(whole)}) is not None
        return self.diverged


def _entries(content: bytes) -> Iterator[dict[str, Any]]:
    """Without half a last line."""
    for line in content.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
