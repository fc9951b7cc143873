"""PPO and GRPO whose rollouts are drafted by a speculator that follows the policy: verl's own workers and trainers.

Each update of the rollout's weights brings the actor's speculator beside the policy; what the one before it did is
asked first. Every name of verl's configuration means what it means to verl.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import ray
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker

import verl_speculator.engine.plugin  # noqa: F401  (fails loudly in a worker, where verl's own loading fails silently)
from verl_speculator.engine.engine import SpeculatorEngine
from verl_speculator.engine.platform_cpu import start_process_group
from verl_speculator.rollout.account import rollout_metrics
from verl_speculator.rollout.push import collect_accounts, push_speculator

# What verl's trainers are called with a speculator that follows.
FOLLOWED = "{}_with_speculator"


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
        await push_speculator(self._rollout, dict(self._engine.speculator.named_parameters()), version=global_steps)
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


class Followed:
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
    return type(f"Followed{trainer.__name__}", (Followed, trainer), {"__doc__": trainer.__doc__})


# verl's third trainer, separate_async, has rollouts that no actor shares a machine with.
TRAINERS: dict[str, type[PPOTrainer]] = {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync}
for _name, _trainer in TRAINERS.items():
    register_trainer(FOLLOWED.format(_name))(follow(_trainer))


@ray.remote
class FollowedTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's, in a process that knows these trainers."""

    def run(self, config: Any) -> None:
        # Ray sends the class itself, not the name of its module.
        importlib.import_module("verl_speculator.engine.ppo")
        config.trainer.v1.trainer_mode = FOLLOWED.format(config.trainer.v1.trainer_mode)
        super().run(config)
