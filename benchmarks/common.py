"""What every row of a benchmark records: when, on what, with which versions and commit."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from pathlib import Path
from typing import Any

from verl_speculator.provenance import git_commit, versions


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def environment() -> dict[str, Any]:
    """Columns that say where a row comes from."""
    found = versions()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit() or "",
        "hardware": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        **{name: found.get(name, "") for name in ("python", "torch", "transformers", "verl")},
    }


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV; a new file gets the columns of the first row."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
