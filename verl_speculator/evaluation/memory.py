"""Peak memory of a stretch of work."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

MEBIBYTE = 1024 * 1024


class PeakMemory:
    """The most memory held at once since `reset`.

    On an accelerator, what torch allocated there. On a CPU, the resident size of the process (with everything that was
    loaded before); where the kernel does not let the mark be lowered, the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> float:
        """The peak, in MiB."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated() / MEBIBYTE
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:", 1)[1].split()[0]) / 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
