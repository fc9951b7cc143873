"""Everything that is registered with verl, which imports this module through the entry-point group `verl.plugins`.

verl logs a plugin that fails at debug level only. Importing it by name fails loudly: `VERL_USE_EXTERNAL_MODULES` or
`model.external_lib=verl_speculator.training.plugin`. The platform is imported first, since verl looks the device up
while the engine's module is imported.
"""

from verl_speculator.training.platform_cpu import PlatformCPU  # isort: skip
import copy
from collections.abc import Callable
from dataclasses import fields

from hydra.utils import get_class
from omegaconf import DictConfig, open_dict
from verl.workers.config import HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from verl_speculator.training import MODEL_TYPE
from verl_speculator.training.engine import SpeculatorEngine
from verl_speculator.training.model_config import SpeculatorModelConfig, SpeculatorPolicyConfig
from verl_speculator.training.policy import PolicyEngine

__all__ = ["PlatformCPU", "PolicyEngine", "SpeculatorEngine"]


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class RegisteredEngine(SpeculatorEngine):
    """Makes the engine for a model configuration: verl's registry takes classes only, one for each model type."""

    def __new__(cls, model_config, *args, **kwargs):
        engine = PolicyEngine if isinstance(model_config, SpeculatorPolicyConfig) else SpeculatorEngine
        return engine(model_config, *args, **kwargs)


def rollout_model_config(model: DictConfig) -> DictConfig:
    """`actor_rollout_ref.model` without our keys, for rollout servers; any other configuration as it is.

    A server converts it to verl's HFModelConfig, which rejects unknown keys. Workers and trainer keep them.
    """
    target = model.get("_target_")
    config_class = get_class(target) if target else HFModelConfig
    if not issubclass(config_class, SpeculatorModelConfig):
        return model
    config = copy.deepcopy(model)
    with open_dict(config):
        for name in {f.name for f in fields(config_class)} - {f.name for f in fields(HFModelConfig)}:
            config.pop(name, None)
        config.pop("model_type", None)
        config._target_ = f"{HFModelConfig.__module__}.{HFModelConfig.__qualname__}"
    return config


def without_speculator(load: Callable[[], type[RolloutReplica]]) -> Callable[[], type[RolloutReplica]]:
    """A loader of the same replica class, whose instances are given `rollout_model_config`."""

    def load_replica() -> type[RolloutReplica]:
        class BaseReplica(load()):
            def __init__(self, replica_rank, config, model_config, *args, **kwargs) -> None:
                super().__init__(replica_rank, config, rollout_model_config(model_config), *args, **kwargs)

        return BaseReplica

    return load_replica


for _server in ("vllm", "sglang", "trtllm"):
    # Read without the registry's own method, which would call the loader and import the server's package.
    RolloutReplicaRegistry.register(_server, without_speculator(RolloutReplicaRegistry._registry[_server]))
