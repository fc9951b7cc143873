"""PPO and GRPO by verl's own trainer, with a speculator that follows the policy into its rollouts.

    mapfile -t ROLLOUT < <(verl-speculator rollout-args CHECKPOINT --train)
    python -m verl_speculator.train_ppo "${ROLLOUT[@]}" [verl's overrides]

Everything of `python -m verl.trainer.main_ppo` holds here too. What is added: the actor's speculator learns, every
update sends it to the rollout, and the metrics tell how it did (docs/rollout.md).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import UserError
from verl_speculator.rollout.arguments import (
    MODEL,
    MODEL_TYPE,
    ROLLOUT,
    SERVER,
    SPECULATION,
    TRAINERS,
    WORKER_EXTENSION,
)
from verl_speculator.settings import compose_ppo

# Each setting with what it has to be, and what another value would do.
NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    MODEL + "model_type": ((MODEL_TYPE,), "the actor would have no speculator"),
    MODEL + "speculator.train": ((True,), "nothing would follow, and verl.trainer.main_ppo does that"),
    ROLLOUT + "name": (("vllm",), "no other engine takes a newer speculator"),
    SPECULATION + "method": (("custom_class",), "no other drafter takes a newer speculator"),
    SERVER + "worker_extension_cls": ((WORKER_EXTENSION,), "the rollout could not take over a newer speculator"),
    ROLLOUT + "checkpoint_engine.backend": (("naive",), "the actors would not share a machine with the rollout"),
    ROLLOUT + "disaggregation.enabled": ((False, None), "an actor would not know which server to send to"),
    "trainer.use_v1": ((True,), "verl's older trainer is not supported"),
    "trainer.v1.trainer_mode": (TRAINERS, "its rollouts have no actor beside them"),
}


def check(config: DictConfig) -> None:
    """Refuse what cannot follow, before anything starts.

    Raises:
        UserError: for a setting under which no newer speculator would reach the rollout.
    """
    for name, (accepted, why) in NEEDED.items():
        value = OmegaConf.select(config, name)
        if value not in accepted:
            raise UserError(f"{name}={value}: {why}; expected {' or '.join(map(str, accepted))}")


def train(overrides: Sequence[str]) -> None:
    """verl's `main_ppo`, with our task runner.

    Raises:
        UserError: for an override that Hydra refuses, and as `check`.
    """
    config = compose_ppo(overrides)
    check(config)
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from verl_speculator.engine.ppo import FollowedTaskRunner

    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=FollowedTaskRunner)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`; a user's error is one line and exit code 2."""
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        train(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # Of an error in a worker Ray makes one that has the traceback in its text, and the error itself as its cause.
        sys.stderr.write(f"error: {getattr(error, 'cause', error)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
