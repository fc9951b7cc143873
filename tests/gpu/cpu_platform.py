"""Lets verl's PPO run on a CPU, rollouts included: its processes count as Ray's GPUs, of which Ray is told a number.

verl asks Ray for the indices of the accelerators that a rollout's server may use, and Ray knows none of CPUs. Loaded by
`VERL_USE_EXTERNAL_MODULES=cpu_platform`, chosen by `VERL_PLATFORM=cpu_as_gpus`.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_speculator.engine.platform_cpu import PlatformCPU


@PlatformRegistry.register(platform="cpu_as_gpus")
class PlatformCPUAsGPUs(PlatformCPU):
    """The host's processors, by another name for Ray."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}


if "vllm.v1.worker.worker_base" in sys.modules:
    import cpu_vllm

    cpu_vllm.mend()
