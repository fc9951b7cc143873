"""PPO and GRPO whose rollouts are drafted by a speculator that follows the policy: verl's own workers and trainers.

After an update each actor sends its speculator to the rollout, beside the weights of the policy, and asks what the one
before it did. Every name of verl's configuration means what it means to verl.
"""

from __future__ import annotations

import importlib
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
from verl_speculator.engine.platform_cpu import start_process_group
from verl_speculator.rollout.account import rollout_metrics
from verl_speculator.rollout.push import collect_accounts, push_speculator

# What verl's trainers are called with a speculator that follows.
FOLLOWED = "{}_with_speculator"


class SpeculatorActorWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, whose rollout drafts with the actor's newest speculator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        start_process_group()
        super().__init__(*args, **kwargs)
        self._accounts: list[dict[str, Any]] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        """As verl's, and the speculator with it.

        The speculator goes first: it lies outside of what a sleeping engine gives back, and nothing is drafted before
        the engine has its base again.
        """
        self._accounts += await collect_accounts(self.rollout)
        await push_speculator(self.rollout, self.actor.engine.get_speculator_param().items(), version=global_steps)
        return await super().update_weights(global_steps, mode)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_accounts(self) -> list[dict[str, Any]]:
        """What this rank's rollout drafted between the last two updates (`rollout.account`)."""
        taken, self._accounts = self._accounts, []
        return taken


class Followed:
    """Of a trainer of verl's: its workers are ours, and its metrics tell how the speculator did."""

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRolloutRef, Role.ActorRollout):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SpeculatorActorWorker)

    def _consume_sync_metrics(self) -> dict[str, float]:
        # These rollouts were drafted before this step's update, by what the step before it had pushed.
        accounts = [account for taken in self.actor_rollout_wg.take_accounts() for account in taken]
        return super()._consume_sync_metrics() | rollout_metrics(accounts, trainer_version=self.global_steps - 1)


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
