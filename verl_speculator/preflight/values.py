"""Checks of the settings' own values, of the device, and of how the batch is cut. No file is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import UserError, nearest
from verl_speculator.settings import flash_attention_installed

# Features of verl's engine that change the module or the forward pass which the speculator is attached to.
UNSUPPORTED = {
    "engine.ulysses_sequence_parallel_size": 1,
    "engine.forward_only": False,
    "engine.qat.enable": False,
    "model.lora_rank": 0,
    "model.lora_adapter_path": None,
    "model.use_fused_kernels": False,
    "data.pad_mode": "no_padding",
}


def _whole(config: DictConfig, key: str, least: int, also: Sequence[Any] = ()) -> None:
    value = OmegaConf.select(config, key)
    if value in also and not isinstance(value, bool):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = "".join(f" or {a}" for a in also if a is not None)
        raise UserError(f"{key}={value}: expected an integer of at least {least}{more}")


def _number(config: DictConfig, key: str, *, positive: bool) -> None:
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (positive and value == 0):
        raise UserError(f"{key}={value}: expected a {'positive ' if positive else 'non-negative '}number")


def check_settings(config: DictConfig) -> None:
    """Values of single settings."""
    for key in ("data.train_batch_size", "data.micro_batch_size_per_gpu", "data.max_length", "trainer.total_epochs"):
        _whole(config, key, 1)
    _whole(config, "data.num_workers", 0)
    _whole(config, "trainer.total_training_steps", 1, also=(None,))
    for key in ("trainer.save_freq", "trainer.test_freq"):
        _whole(config, key, -1, also=("after_each_epoch",))
    _whole(config, "trainer.max_ckpt_to_keep", 1, also=(None,))
    _number(config, "optim.lr", positive=True)
    _number(config, "model.speculator_loss_coeff", positive=config.model.freeze_base_model)
    for key in ("model.freeze_base_model", "data.use_dynamic_bsz", "model.use_remove_padding"):
        if not isinstance(OmegaConf.select(config, key), bool):
            raise UserError(f"{key}={OmegaConf.select(config, key)}: expected true or false")
    modes = ("auto", "disable", "resume_path")
    if config.trainer.resume_mode not in modes:
        raise UserError(
            f"trainer.resume_mode={config.trainer.resume_mode}: expected one of {', '.join(modes)}"
            + nearest(str(config.trainer.resume_mode), modes)
        )
    if config.data.truncation not in ("error", "left", "right"):
        raise UserError(f"data.truncation={config.data.truncation}: expected error, left or right")
    for key, only in UNSUPPORTED.items():
        if OmegaConf.select(config, key) != only:
            raise UserError(
                f"{key}={OmegaConf.select(config, key)}: a speculator trains with {key}={json.dumps(only)} only"
            )


def check_device(config: DictConfig, processes_per_node: int) -> None:
    """Whether the device has what is asked of it."""
    device, strategy = config.trainer.device, config.engine.strategy
    if strategy not in ("fsdp", "fsdp2"):
        raise UserError(f"engine.strategy={strategy}: expected fsdp2 or fsdp" + nearest(strategy, ("fsdp2", "fsdp")))
    if device == "cpu" and strategy == "fsdp":
        raise UserError("engine.strategy=fsdp: torch has no FSDP1 for the CPU; use engine.strategy=fsdp2")
    attention = config.model.override_config.get("attn_implementation")
    if attention == "flash_attention_2" and not flash_attention_installed():
        raise UserError(
            "model.override_config.attn_implementation=flash_attention_2: the package flash-attn is not installed; "
            "install it or use sdpa"
        )
    if attention == "flash_attention_2" and device == "cpu":
        raise UserError("model.override_config.attn_implementation=flash_attention_2: not on a CPU; use sdpa")
    if device in ("cuda", "npu"):
        import torch

        available = getattr(torch, device).device_count() if hasattr(torch, device) else 0
        if available < processes_per_node:
            raise UserError(
                f"nproc_per_node={processes_per_node}: this machine has {available} {device} device(s); "
                "trainer.device=cpu trains without any"
            )


def check_batch(config: DictConfig, processes: int) -> None:
    """Whether the global batch can be cut as asked."""
    data = config.data
    if data.train_batch_size % processes:
        raise UserError(f"data.train_batch_size={data.train_batch_size}: not divisible by {processes} processes")
    per_rank = data.train_batch_size // processes
    if not data.use_dynamic_bsz and per_rank % data.micro_batch_size_per_gpu:
        raise UserError(
            f"data.train_batch_size={data.train_batch_size}: its {per_rank} rows per process are not divisible by "
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu}"
        )
