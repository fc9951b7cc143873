"""PPO and GRPO by verl's own trainer, with a speculator that drafts the policy's rollouts and is trained with it.

    args=$(verl-speculator rollout-args CHECKPOINT --train actor_rollout_ref.model.path=BASE) &&
    mapfile -t ROLLOUT <<< "$args" &&
    python -m verl_speculator.train_ppo "${ROLLOUT[@]}" [verl's overrides]

Takes every option of `python -m verl.trainer.main_ppo`. Besides, each update of the actor trains the speculator and
syncs its weights to the rollout, and the metrics report its acceptance (docs/rollout.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from verl_speculator.config.hydra import compose_ppo
from verl_speculator.rl.rollout_args import check_ppo
from verl_speculator.train import run_command
from verl_speculator.utils.process import silence_import_warnings

logger = logging.getLogger(__name__)


def train(overrides: Sequence[str]) -> None:
    """verl's `main_ppo`, with our task runner.

    Raises:
        UserError: for an override that Hydra refuses, and as `check_ppo`.
    """
    config = compose_ppo(overrides)
    for note in check_ppo(config):
        logger.warning(note)
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from verl_speculator.rl.trainer import SpeculatorTaskRunner

    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=SpeculatorTaskRunner)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`."""
    silence_import_warnings()
    run_command(train, f"{__doc__}\n", argv, log_level=logging.WARNING)


if __name__ == "__main__":
    main()
