"""How glibc treats the large tensors of a CPU process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# glibc returns large tensors to the kernel at every step and faults them in again; 32 MiB is the most it accepts.
# What it brings is in docs/results.md.
CPU_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def restart_with_allocator() -> None:
    """Start this command again with the settings that glibc reads at the start of a process, unless they are there."""
    if sys.platform == "linux" and not CPU_ALLOCATOR.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | CPU_ALLOCATOR)


PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be sent SIGTERM when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Set the wish, look whether the parent is still there, and become the command."""
    parent, *command = sys.argv[1:]
    end_with_parent()
    if os.getppid() != int(parent):
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()


def progress_bar() -> Progress:
    """Bars on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices at even distances, so that a file sorted by category is sampled whole; 0 for all."""
    wanted = min(wanted, count) or count
    return [i * count // wanted for i in range(wanted)]
