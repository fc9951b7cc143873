"""The files of a training step and the readers of a setting stay as few as docs/design.md lists them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def trace(*arguments: str) -> dict[str, list[str]]:
    """Each group of files that tests/helpers/trace_files.py prints, by its title without the count."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "trace_files.py"), *arguments]
    output = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert output.returncode == 0, output.stderr
    groups: dict[str, list[str]] = {}
    for line in output.stdout.splitlines():
        if line.endswith(" files"):
            groups[line.rsplit(":", 1)[0]] = files = []
        elif line.startswith("  ") and groups:
            files.append(line.strip())
    return groups


def test_training_step_passes_through_the_files_of_the_design_page():
    files = trace()["one step and its checkpoint"]
    assert 10 < len(files) <= 20
    listed = (ROOT / "docs" / "design.md").read_text().split("trace_files.py`, which also", 1)[1].split("```")[1]
    assert sorted(files) == sorted(listed.split())


def test_setting_is_read_by_the_files_of_the_design_page():
    (files,) = trace("loss").values()
    assert 2 < len(files) <= 6
    sentence = (ROOT / "docs" / "design.md").read_text().split("trace_files.py loss`): ", 1)[1].split("\n\n")[0]
    assert files == sorted(re.findall(r"[\w/]+\.py", sentence))
