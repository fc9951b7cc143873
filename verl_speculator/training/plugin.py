"""What verl loads from the entry-point group `verl.plugins`: importing it registers the platform, the engine, and what
rollout servers are told.

Also importable by name, which fails loudly where a plugin fails silently: `VERL_USE_EXTERNAL_MODULES` or
`model.external_lib=verl_speculator.training.plugin`. The platform comes first: verl looks the device up while the
engine's module is imported.
"""

from verl_speculator.training.platform_cpu import PlatformCPU  # isort: skip
from verl_speculator.training.engine import SpeculatorEngine  # isort: skip
import verl_speculator.training.rollout_config as served  # isort: skip

served.register()

__all__ = ["PlatformCPU", "SpeculatorEngine"]
