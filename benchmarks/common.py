"""What every row of a benchmark records: when, on what, with which versions and commit."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.provenance import git_commit, hardware, versions


def environment() -> dict[str, Any]:
    """Columns that say where a row comes from."""
    found = versions()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit() or "",
        "hardware": hardware(),
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
