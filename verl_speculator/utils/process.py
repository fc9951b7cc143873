"""What a process sets up for itself: allocator, end with its parent, unwanted messages of libraries, progress bars.

`python -m verl_speculator.utils.process PID COMMAND…` replaces itself by a command that ends with the process PID.
"""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)

# glibc returns large tensors to the kernel at every step and faults them in again; 32 MiB is the largest threshold that
# it accepts. docs/results.md has the measured effect.
CPU_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
PR_SET_PDEATHSIG = 1
INTERRUPTED = 130  # exit code after Ctrl-C, as of a shell
SAME_REQUEST = 3.0  # seconds

# By logger, how the messages begin that say nothing to the user of a speculator.
UNWANTED_MESSAGES = {
    # The platform is the one that the launcher asked for.
    "verl.plugin.platform.platform_manager": "Platform override from VERL_PLATFORM",
    # bitsandbytes has another kernel for 4-bit base models on a CPU.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Addressed to callers of a function that torch itself calls.
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",
}
# verl tries to import each of its engines; only the one of FSDP is needed, and it is not optional.
OPTIONAL_ENGINES = r"(torchtitan|veomni|automodel|mindspeed|megatron) engine is not available"


def restart_with_allocator() -> None:
    """Start this command again with the settings that glibc reads at the start of a process, unless they are set."""
    if sys.platform == "linux" and not CPU_ALLOCATOR.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | CPU_ALLOCATOR)


def cpu_computes_bf16() -> bool:
    """Whether this machine's processor has instructions for bf16 (AVX512-BF16 or AMX), which are faster than those for
    float32; without them bf16 is emulated and slower."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def quiet_prints() -> Iterator[None]:
    """Log at DEBUG what libraries print to standard output, such as the whole configuration, memory, and patches."""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            yield
        finally:
            for line in printed.getvalue().splitlines():
                logger.debug("%s", line)


class StopRequest:
    """Whether SIGINT (Ctrl-C) or SIGTERM asked this process to end, within the context. Another one some seconds later
    ends it at once; earlier ones are the same request, which a scheduler sends to every process and torchrun passes on.

    Attributes:
        made: whether there was a signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.made, self._at = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handler
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.made and time.monotonic() - self._at > SAME_REQUEST:
            raise SystemExit(INTERRUPTED)
        self.made, self._at = True, time.monotonic()


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM to this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_wanted(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


@functools.cache
def silence_import_warnings() -> None:
    """Drop the messages above in this process. Call it before verl is imported; a second call changes nothing."""
    for name, beginning in UNWANTED_MESSAGES.items():
        logging.getLogger(name).addFilter(functools.partial(_is_wanted, beginning))
    warnings.filterwarnings("ignore", message=OPTIONAL_ENGINES, category=UserWarning, module=r"verl\.workers\.engine")


def progress_bar() -> Progress:
    """Progress bars on stderr: description, bar, count, time elapsed and remaining."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    description, bar, _, remaining = Progress.get_default_columns()
    columns = (description, bar, MofNCompleteColumn(), TimeElapsedColumn(), remaining)
    return Progress(*columns, console=Console(stderr=True))


def evenly_spaced(count: int, limit: int) -> list[int]:
    """`limit` evenly spaced indices below `count`, so that a sample of a sorted file has all its categories; 0: all."""
    limit = min(limit, count) or count
    return [i * count // limit for i in range(limit)]


def main() -> None:
    """Run a command that ends with the process whose id is the first argument."""
    parent, *command = sys.argv[1:]
    end_with_parent()
    if os.getppid() != int(parent):  # the parent ended before the kernel knew
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
