"""Become another command that is asked to end when the process that started it is gone, even by SIGKILL.

    python -m verl_speculator.sweep.leash <pid of the parent> <command …>

The kernel keeps the wish over `exec`. torchrun passes the request on to its workers, whose sessions are
their own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the wish, look whether the parent is still there, and become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
