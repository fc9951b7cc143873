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


def _calls(function: Callable[[], Any]) -> Callable[..., Any]:
    """A method that takes any arguments and calls `function` without them."""
    return lambda self, *args, **kwargs: function()


def _returns(value: Any) -> Callable[..., Any]:
    return _calls(lambda: value)


_do_nothing = _returns(None)  # there is one device, no cache and no profiler, and operations are synchronous


class CpuDeviceModule(ModuleType):
    """`torch.cpu`, with the part of `torch.cuda` that verl uses of every device module.

    Memory is the process's: resident now for "allocated" and "reserved", its peak since the start for their maxima.
    """

    memory_allocated = memory_reserved = _calls(lambda: psutil.Process().memory_info().rss)
    max_memory_allocated = max_memory_reserved = _calls(
        lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    mem_get_info = _calls(lambda: (psutil.virtual_memory().available, psutil.virtual_memory().total))
    empty_cache = reset_peak_memory_stats = _do_nothing
    get_device_name = _returns("CPU")
    get_rng_state = _calls(torch.get_rng_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

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
