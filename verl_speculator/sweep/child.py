"""Running a command so that nothing of it outlives this call, however the call ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

POLL = 0.5
# torchrun gives its workers 30 seconds before it kills them.
GRACE = 40.0


def run_child(
    command: Sequence[str], log: Path, environment: Mapping[str, str], give_up: Callable[[], bool] = lambda: False
) -> int:
    """The exit code of a command; its output is appended to a log.

    Args:
        command: with all its arguments.
        log: gets standard output and standard error.
        environment: of the command.
        give_up: asked now and then whether to end it before it ends by itself.
    """
    leash = (sys.executable, "-m", "verl_speculator.leash", str(os.getpid()))
    log.parent.mkdir(parents=True, exist_ok=True)
    seen: set[psutil.Process] = set()
    with log.open("ab") as output:
        # In a session of its own: a Ctrl-C reaches this process alone, which then ends the command in order.
        process = subprocess.Popen(
            [*leash, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            while not give_up():
                with suppress(psutil.NoSuchProcess):
                    # A worker whose torchrun was killed is nobody's child any more.
                    seen.update(psutil.Process(process.pid).children(recursive=True))
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL)
        finally:
            _end(process, seen)
    return process.returncode


def _end(process: subprocess.Popen, seen: set[psutil.Process]) -> None:
    """Ask a process to end, wait, and kill what is left of it and of its descendants."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen.update(psutil.Process(process.pid).children(recursive=True))
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = [one for one in seen if one.is_running()]
    for act in (psutil.Process.terminate, psutil.Process.kill):
        for one in left:
            with suppress(psutil.NoSuchProcess):
                act(one)
        _, left = psutil.wait_procs(left, timeout=3)
