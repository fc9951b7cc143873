"""Why a training or an evaluation ended badly, from its exit code and its log."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from verl_speculator.sweep.jobs import FAILED, OUT_OF_MEMORY

TAIL = 200_000
MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|Cannot allocate memory|\bMemoryError\b",
    re.IGNORECASE,
)
RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")
USERS = re.compile(r"^error: (.*)$")
# torchrun's own account of a worker that failed.
NOT_IT = ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError", "ChildFailedError")


def explain(code: int, log: Path, start: int = 0) -> tuple[str, str]:
    """A status and a reason in a line.

    Args:
        code: exit code of the command, negative for a signal.
        log: its output.
        start: where in the log it began.
    """
    text = _tail(log, start)
    lines = [line.strip() for line in text.splitlines()]
    raised = [m[1] for line in lines if (m := RAISED.match(line)) and not m[1].startswith(NOT_IT)]
    users = [m[1] for line in lines if (m := USERS.match(line))]
    if memory := [line for line in raised if MEMORY.search(line)]:
        return OUT_OF_MEMORY, _short(memory[0])
    said = next((found[-1] for found in (users, raised) if found), None)
    if said is None and (code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Signal 9 (SIGKILL)" in text):
        said = "killed by SIGKILL, which is what the system does when memory runs out"
    elif said is None and code < 0:
        said = f"ended by {signal.Signals(-code).name}"
    return FAILED, _short(said or f"exit code {code}")


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - TAIL))
        return file.read().decode(errors="replace").replace("\r", "\n")


def _short(line: str) -> str:
    return " ".join(line.split())[:300]
