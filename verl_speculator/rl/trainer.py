"""PPO and GRPO whose rollouts are drafted by a speculator that follows the policy: verl's own workers and trainers.

Each update of the rollout's weights brings the actor's speculator beside the policy; what the one before it did is
asked first. Every name of verl's configuration means what it means to verl.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from verl_speculator.vllm_plugin.acceptance_stats import rollout_metrics


def whole_tensors(
    parameters: Mapping[str, Tensor], *, device: Any = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Gather parameters one after the other; a tensor is kept no longer than whoever asked for it keeps it.

    Args:
        parameters: this rank's shards (`DTensor`), or whole tensors; all ranks in the same order.
        device: of what is given out; by default where each lies.
        dtype: of what is given out, taken before the gathering, so that ranks send each other no more; by default
            each one's own.
    """
    for name, parameter in parameters.items():
        yield name, _whole(parameter.detach().to(device=device, dtype=dtype))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


async def sync_speculator(rollout: Any, parameters: Mapping[str, Tensor], version: int | None = None) -> None:
    """Send a speculator to the vLLM workers of a verl rollout.

    Called by every rank, where verl calls `rollout.update_weights`: with the device's expandable segments switched off,
    since what lies in them cannot be shared with another process twice.

    It goes the way of the base's weights: each rank sends to the worker on its own device, through verl's buckets. At
    no time are more than two tensors whole on a rank, in the type that the rollout serves (`rollout.dtype`).

    Args:
        rollout: verl's `ServerAdapter`.
        parameters: every parameter of the speculator, as this rank holds it, under the module's names; all ranks in
            the same order.
        version: the trainer's step, usually. None for a sync at no step: the version stays what it was.
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
    # vLLM's names of types are torch's; auto, the base's own, is left to the worker to convert to.
    served_dtype = getattr(torch, rollout.config.dtype, None)
    await sender.async_send_weights(whole_tensors(parameters, device=get_device_id(), dtype=served_dtype))
    if call is not None:
        await call


async def collect_accounts(rollout: Any) -> list[dict[str, Any]]:
    """What this rank's rollout drafted since the last call: `account.rollout_metrics` makes metrics of it.

    Through files, since verl's `collective_rpc` gives no results back. Empty on ranks that hold no server; workers on
    other machines than the server's are not asked, and count the same requests.

    Args:
        rollout: verl's `ServerAdapter`.
    """
    with tempfile.TemporaryDirectory(prefix="verl_speculator.") as directory:
        await rollout._execute_method("write_speculator_account", args=(directory,))
        return [json.loads(path.read_text()) for path in sorted(Path(directory).glob("[0-9]*.json"))]


# What verl's trainers are called with a speculator that follows.
SYNC_REQUIREMENTS = "{}_with_speculator"


class RolloutWithSpeculator:
    """verl's rollout, which gets the actor's speculator with every update of the policy's weights.

    verl updates the rollout with the device's expandable segments switched off, and its memory back: weights that are
    sent to another process have to be allocated then.

    Args:
        rollout: verl's; all but updates goes to it as it is.
        engine: the actor's.
    """

    def __init__(self, rollout: Any, engine: SpeculatorEngine) -> None:
        self._rollout = rollout
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rollout, name)

    async def update_weights(self, weights: Any, global_steps: int | None = None, **kwargs: Any) -> Any:
        """As verl's; the speculator first."""
        await sync_speculator(self._rollout, dict(self._engine.speculator.named_parameters()), version=global_steps)
        return await self._rollout.update_weights(weights, global_steps=global_steps, **kwargs)


class SpeculatorActorWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, whose rollout drafts with the actor's newest speculator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        start_process_group()
        super().__init__(*args, **kwargs)
        self._accounts: list[dict[str, Any]] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """As verl's; the rollout gets the speculator too."""
        super().init_model()
        if self._is_actor and self._is_rollout:
            self.rollout = RolloutWithSpeculator(self.rollout, self.actor.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        """As verl's; what was drafted until now is counted before another speculator drafts."""
        await self.collect_accounts()
        return await super().update_weights(global_steps, mode)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def collect_accounts(self) -> None:
        """Ask this rank's rollout what it drafted since it was last asked, and keep the answer."""
        self._accounts += await collect_accounts(self.rollout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_accounts(self) -> list[dict[str, Any]]:
        """What was collected of this rank's rollout since the last call (`rollout.account`)."""
        taken, self._accounts = self._accounts, []
        return taken


class SpeculatorSyncMixin:
    """Of a trainer of verl's: its workers are ours, and its metrics tell how the speculator did."""

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRolloutRef, Role.ActorRollout):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SpeculatorActorWorker)

    # Of training rollouts that a validation found under way.
    _earlier_accounts: Sequence[dict[str, Any]] = ()

    def _take_accounts(self) -> list[dict[str, Any]]:
        return [account for taken in self.actor_rollout_wg.take_accounts() for account in taken]

    def _consume_sync_metrics(self) -> dict[str, float]:
        # These rollouts were drafted before this step's update, by what the step before it had sent.
        accounts = [*self._earlier_accounts, *self._take_accounts()]
        self._earlier_accounts = ()
        return super()._consume_sync_metrics() | rollout_metrics(accounts, trainer_version=self.global_steps - 1)

    def _validate(self) -> dict[str, float]:
        """As verl's; what was drafted meanwhile has metrics of its own (`val/…`), and is no part of the next step's."""
        self.actor_rollout_wg.collect_accounts()
        self._earlier_accounts = [*self._earlier_accounts, *self._take_accounts()]
        metrics = super()._validate()
        self.actor_rollout_wg.collect_accounts()
        return metrics | rollout_metrics(self._take_accounts(), prefix="val")


def follow(trainer: type[PPOTrainer]) -> type[PPOTrainer]:
    """The trainer with a speculator that follows."""
    return type(f"SpeculatorSyncMixin{trainer.__name__}", (SpeculatorSyncMixin, trainer), {"__doc__": trainer.__doc__})


# verl's third trainer, separate_async, has rollouts that no actor shares a machine with.
TRAINERS: dict[str, type[PPOTrainer]] = {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync}
for _name, _trainer in TRAINERS.items():
    register_trainer(SYNC_REQUIREMENTS.format(_name))(follow(_trainer))


@ray.remote
class FollowedTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's, in a process that knows these trainers."""

    def run(self, config: Any) -> None:
        # Ray sends the class itself, not the name of its module.
        importlib.import_module("verl_speculator.rl.trainer")
        config.trainer.v1.trainer_mode = SYNC_REQUIREMENTS.format(config.trainer.v1.trainer_mode)
        super().run(config)
