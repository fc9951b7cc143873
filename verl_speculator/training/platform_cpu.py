"""A CPU platform for verl, with gloo, so that the same trainer runs on a laptop, in CI and in the demo.

It is chosen by name (`VERL_PLATFORM=cpu`) and never detected: a driver node without an accelerator may command workers
that have one.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def start_process_group() -> None:
    """Start the process group on a CPU, where verl would ask for "cpu:gloo,cpu:gloo"; elsewhere verl starts it."""
    from verl.utils.device import get_device_name

    if get_device_name() == "cpu" and not dist.is_initialized():
        dist.init_process_group("gloo")


def _returns(value: Any) -> Callable[..., Any]:
    """A method that returns `value` for any arguments."""
    return lambda self, *args, **kwargs: value


_do_nothing = _returns(None)  # there is one device, no cache and no profiler, and operations are synchronous


class CpuDeviceModule(ModuleType):
    """`torch.cpu`, with the part of `torch.cuda` that verl uses of every device module.

    Memory is the process's: resident now for "allocated" and "reserved", its peak since the start for their maxima.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def memory_allocated(self, device: Any = None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated
    empty_cache = reset_peak_memory_stats = _do_nothing

    get_device_name = _returns("CPU")

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """The host's processors; `set_allocator_settings` is left to the launcher."""

    device_module = CpuDeviceModule("verl_speculator.cpu_device")
    device_name = vendor_name = "cpu"
    set_device = synchronize = empty_cache = set_allocator_settings = _do_nothing
    profiler_start = profiler_stop = cudart = _do_nothing
    manual_seed = manual_seed_all = CpuDeviceModule.manual_seed

    is_available = _returns(True)
    is_platform_available = _returns(False)  # never by detection
    current_device = _returns("cpu")
    device_count = _returns(1)
    get_device_capability = _returns((None, None))
    communication_backend_name = _returns("gloo")
    visible_devices_envvar = _returns("CPU_VISIBLE_DEVICES")
    ray_resource_name = _returns("CPU")
    ray_noset_envvars = _returns([])
    is_ipc_supported = _returns(False)

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}

    def nvtx_range(self, msg: str) -> AbstractContextManager:
        return torch.profiler.record_function(msg)
