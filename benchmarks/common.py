"""Columns that every benchmark row records: date, hardware, versions and commit."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.provenance import git_commit, hardware, versions


def environment() -> dict[str, Any]:
    """Date, commit, hardware and versions of this run."""
    installed = versions()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit() or "",
        "hardware": hardware(),
        **{name: installed.get(name, "") for name in ("python", "torch", "transformers", "verl")},
    }


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV; a new file gets the columns of the first row."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
