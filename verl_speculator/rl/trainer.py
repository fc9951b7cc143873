"""PPO and GRPO with a speculator that is trained with the policy: verl's own workers and trainers, with weight sync.

Each update of the rollout's weights also sends the actor's speculator; before that, the acceptance statistics of the
previous version are collected. Every setting of verl has verl's meaning.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker

import verl_speculator.training.plugin  # noqa: F401  (fails loudly in a worker, where verl's own loading fails silently)
from verl_speculator.training.engine import SpeculatorEngine
from verl_speculator.training.platform_cpu import start_process_group
from verl_speculator.vllm_plugin.acceptance import rollout_metrics

TRAINER_NAME = "{}_with_speculator"  # by the name of verl's trainer


def whole_tensors(
    parameters: Mapping[str, Tensor], *, device: Any = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Gather parameters one after the other. The generator keeps no reference to a tensor that it has yielded.

    Args:
        parameters: this rank's shards (`DTensor`), or whole tensors; in the same order on all ranks.
        device: of the yielded tensors; by default that of each parameter.
        dtype: of the yielded tensors, by default that of each parameter. Shards are converted before they are gathered.
    """
    for name, parameter in parameters.items():
        yield name, _whole(parameter.detach().to(device=device, dtype=dtype))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


async def sync_speculator(rollout: Any, parameters: Mapping[str, Tensor], version: int | None = None) -> None:
    """Send a speculator to the vLLM workers of a verl rollout: each rank to the worker on its device, through verl's
    buckets. At most two tensors are whole on a rank at a time, in the dtype of the rollout.

    Every rank calls it where verl calls `rollout.update_weights`: the device's expandable segments are off there, and
    memory from them cannot be shared with another process.

    Args:
        rollout: verl's `ServerAdapter`.
        parameters: every parameter of the speculator on this rank, by the module's names; in the same order on all
            ranks.
        version: the trainer's step. None, for a sync outside of a step, keeps the version.
    """
    from verl.utils.device import get_device_id
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    call = await rollout._execute_method(
        "update_speculator_from_ipc",
        non_block=True,
        kwargs={
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
            "version": version,
            "use_shm": rollout.use_shm,
        },
    )
    sender = BucketedWeightSender(
        zmq_handle=rollout.zmq_handle,
        bucket_size_mb=rollout.config.checkpoint_engine.update_weights_bucket_megabytes,
        use_shm=rollout.use_shm,
    )
    # vLLM names dtypes as torch does, except `auto`: the worker then converts.
    dtype = getattr(torch, rollout.config.dtype, None)
    await sender.async_send_weights(whole_tensors(parameters, device=get_device_id(), dtype=dtype))
    if call is not None:
        await call


async def collect_acceptance_stats(rollout: Any) -> list[dict[str, Any]]:
    """`AcceptanceStats` of this rank's rollout since the last call, for `rollout_metrics`.

    Read from files, since verl's `collective_rpc` returns no results. Empty on ranks without a server. Workers on other
    machines than the server's are left out: they count the same requests.

    Args:
        rollout: verl's `ServerAdapter`.
    """
    with tempfile.TemporaryDirectory(prefix="verl_speculator.") as directory:
        await rollout._execute_method("write_acceptance_stats", args=(directory,))
        return [json.loads(path.read_text()) for path in sorted(Path(directory).glob("[0-9]*.json"))]


class RolloutWithSpeculator:
    """verl's rollout, which also receives the actor's speculator in `update_weights`.

    verl calls that method with the device's expandable segments off and its memory back.

    Args:
        rollout: verl's; every other attribute is its own.
        engine: the actor's.
    """

    def __init__(self, rollout: Any, engine: SpeculatorEngine) -> None:
        self._rollout = rollout
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rollout, name)

    async def update_weights(self, weights: Any, global_steps: int | None = None, **kwargs: Any) -> Any:
        """As verl's, after the speculator."""
        await sync_speculator(self._rollout, dict(self._engine.speculator.named_parameters()), version=global_steps)
        return await self._rollout.update_weights(weights, global_steps=global_steps, **kwargs)


class SpeculatorActorWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, whose rollout drafts with the actor's latest speculator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        start_process_group()
        super().__init__(*args, **kwargs)
        self._stats: list[dict[str, Any]] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """As verl's, with `RolloutWithSpeculator`."""
        super().init_model()
        if self._is_actor and self._is_rollout:
            self.rollout = RolloutWithSpeculator(self.rollout, self.actor.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        """As verl's, after the statistics of the current speculator are collected."""
        await self.collect_acceptance_stats()
        return await super().update_weights(global_steps, mode)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def collect_acceptance_stats(self) -> None:
        """Collect the statistics of this rank's rollout for `take_acceptance_stats`."""
        self._stats += await collect_acceptance_stats(self.rollout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_acceptance_stats(self) -> list[dict[str, Any]]:
        """The statistics collected since the last call."""
        stats, self._stats = self._stats, []
        return stats


class SpeculatorSyncMixin:
    """Mixin for verl's trainers that syncs the speculator to the rollout and logs its acceptance."""

    # Of training rollouts that were unfinished when a validation started.
    _earlier_stats: Sequence[dict[str, Any]] = ()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRolloutRef, Role.ActorRollout):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SpeculatorActorWorker)

    def _take_stats(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(self.actor_rollout_wg.take_acceptance_stats()))

    def _consume_sync_metrics(self) -> dict[str, float]:
        # This step's rollouts were drafted before its update, by the speculator that the step before sent.
        stats = [*self._earlier_stats, *self._take_stats()]
        self._earlier_stats = ()
        return super()._consume_sync_metrics() | rollout_metrics(stats, trainer_version=self.global_steps - 1)

    def _validate(self) -> dict[str, float]:
        """As verl's; the acceptance of its drafts is reported as `val/…` and does not count for the next step."""
        self.actor_rollout_wg.collect_acceptance_stats()
        self._earlier_stats = [*self._earlier_stats, *self._take_stats()]
        metrics = super()._validate()
        self.actor_rollout_wg.collect_acceptance_stats()
        return metrics | rollout_metrics(self._take_stats(), prefix="val")


# verl's third trainer, separate_async, has no actor on the machines of the rollout.
TRAINERS: dict[str, type[PPOTrainer]] = {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync}
for _name, _trainer in TRAINERS.items():
    _class = type(f"{_trainer.__name__}WithSpeculator", (SpeculatorSyncMixin, _trainer), {"__doc__": _trainer.__doc__})
    register_trainer(TRAINER_NAME.format(_name))(_class)


@ray.remote
class SpeculatorTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's, in a process in which these trainers are registered."""

    def run(self, config: Any) -> None:
        # Ray sends the class by value, so its module has to be imported by name.
        importlib.import_module("verl_speculator.rl.trainer")
        config.trainer.v1.trainer_mode = TRAINER_NAME.format(config.trainer.v1.trainer_mode)
        super().run(config)
