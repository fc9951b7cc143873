"""Lets verl's PPO run on a CPU, rollouts included: its processes count as Ray's GPUs, of which Ray is told a number.

verl asks Ray for the indices of the accelerators that a rollout's server may use, and Ray knows none of CPUs. Loaded by
`VERL_USE_EXTERNAL_MODULES=cpu_platform`, chosen by `VERL_PLATFORM=cpu_as_gpus`. A reference's weights rest in pinned
memory, which exists only with an accelerator: here they stay in ordinary memory.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_speculator.training.platform_cpu import PlatformCPU


@PlatformRegistry.register(platform="cpu_as_gpus")
class PlatformCPUAsGPUs(PlatformCPU):
    """The host's processors, by another name for Ray."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}


def rest_unpinned() -> None:
    """In processes that build engines."""
    from verl.workers.engine.fsdp import transformer_impl

    transformer_impl.CPUOffloadPolicy = partial(unpinned, transformer_impl.CPUOffloadPolicy)


def unpinned(policy: type, pin_memory: bool) -> Any:
    return policy(pin_memory=False)


rest_unpinned()
if "vllm.v1.worker.worker_base" in sys.modules:
    import cpu_vllm

    cpu_vllm.mend()
