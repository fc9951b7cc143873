"""What `train_ppo` holds against each other before anything starts. Imports no torch."""

from __future__ import annotations

import importlib.util
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.config.schema import SpeculatorSettings
from verl_speculator.interop.engine_formats import proposer_obstacle
from verl_speculator.rl.rollout_args import (
    BASE,
    MODEL,
    SERVER,
    SPECULATION,
    SYNC_REQUIREMENTS,
    check_followed,
    check_installed,
)
from verl_speculator.utils.errors import UserError
from verl_speculator.vllm_plugin.compat import ProposerSettings, check_drafts


def check_following(config: DictConfig) -> list[str]:
    """Refuse a PPO run whose speculator could not follow the policy.

    Args:
        config: verl's, with overrides.

    Returns:
        Notes.

    Raises:
        UserError: for a setting under which no newer speculator would reach the rollout; a checkpoint that the
            proposer cannot serve, of another base or with another number of drafts; or what is not installed.
    """
    if OmegaConf.select(config, MODEL + "model_type") is None:
        raise UserError(
            f"{MODEL}model_type: the actor would have no speculator; expected what "
            "verl-speculator rollout-args CHECKPOINT --train prints"
        )
    for name in SYNC_REQUIREMENTS:
        check_followed(name, OmegaConf.select(config, name))
    training = SpeculatorSettings.parse(_plain(config, MODEL + "speculator")).training
    info = read_checkpoint_info(ProposerSettings.parse(_plain(config, SERVER + "additional_config")).path)
    if (
        training.path is not None
        and read_checkpoint_info(training.path).directory.resolve() != info.directory.resolve()
    ):
        raise UserError(
            f"{MODEL}speculator.path={training.path}: the rollout begins with another; expected {info.directory}"
        )
    if (unsupported_reason := proposer_obstacle(info.config)) is not None:
        raise UserError(f"{info.directory}: cannot be served: {unsupported_reason}")
    check_drafts(info, OmegaConf.select(config, SPECULATION + "num_speculative_tokens"))
    base = OmegaConf.select(config, BASE)
    info.check_base(*base_shape(base))
    info.check_base_weights(base)
    if importlib.util.find_spec("transfer_queue") is None:
        raise UserError("TransferQueue is not installed, and verl's PPO needs it: pip install verl_speculator[ppo]")
    return check_installed("vllm")


def _plain(config: DictConfig, name: str) -> dict[str, Any]:
    found = OmegaConf.select(config, name)
    return OmegaConf.to_container(found, resolve=True) if isinstance(found, DictConfig) else {}
