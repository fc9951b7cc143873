"""How glibc treats the large tensors of a CPU process."""

from __future__ import annotations

import os
import sys

# glibc returns large tensors to the kernel at every step and faults them in again; 32 MiB is the most it accepts.
# What it brings is in docs/results.md.
CPU_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def restart_with_allocator() -> None:
    """Start this command again with the settings that glibc reads at the start of a process, unless they are there."""
    if sys.platform == "linux" and not CPU_ALLOCATOR.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | CPU_ALLOCATOR)
