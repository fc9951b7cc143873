"""Ending with the process that one was started by, even if that was killed by SIGKILL. Linux alone can do it.

    python -m verl_speculator.leash <pid of the parent> <command …>

becomes a command with that wish, which the kernel keeps over `exec`. torchrun passes a request to end on to its
workers, whose sessions are their own; where it cannot, because it was killed itself, they have the same wish.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
