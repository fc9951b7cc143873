"""What verl's rollout servers are told of the model: the base, as if there were no speculator.

A server turns `actor_rollout_ref.model` into verl's own HFModelConfig, which refuses our keys. They leave where a
replica is made, through verl's registry of replicas: workers and trainer keep them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

from hydra.utils import get_class
from omegaconf import DictConfig, open_dict
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from verl_speculator.training.model_config import SpeculatorModelConfig

SERVERS = ("vllm", "sglang", "trtllm")


def served_model_config(model: DictConfig) -> DictConfig:
    """`actor_rollout_ref.model` as verl's own; what is not ours stays as it is."""
    target = model.get("_target_")
    kind = get_class(target) if target else HFModelConfig
    if not issubclass(kind, SpeculatorModelConfig):
        return model
    served = copy.deepcopy(model)
    with open_dict(served):
        for name in {f.name for f in fields(kind)} - {f.name for f in fields(HFModelConfig)}:
            served.pop(name, None)
        served.pop("model_type", None)
        served._target_ = f"{HFModelConfig.__module__}.{HFModelConfig.__qualname__}"
    return served


def without_speculator(load: Callable[[], type[RolloutReplica]]) -> Callable[[], type[RolloutReplica]]:
    """A loader of the same replicas, which are given `served_model_config`."""

    def load_replica() -> type[RolloutReplica]:
        class BaseReplica(load()):
            def __init__(self, replica_rank, config, model_config, *args, **kwargs) -> None:
                super().__init__(replica_rank, config, served_model_config(model_config), *args, **kwargs)

        return BaseReplica

    return load_replica


def register() -> None:
    """Have verl's servers made so, in this process."""
    for name in SERVERS:
        # The registry has no word for the loader itself, and calling it would import the server's package.
        RolloutReplicaRegistry.register(name, without_speculator(RolloutReplicaRegistry._registry[name]))
