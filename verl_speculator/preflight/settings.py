"""Checks of the settings' own values, of the device, and of how the batch is cut. No file is read."""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_speculator.base_model.loading import BaseModelFormat, check_frozen_type
from verl_speculator.config.hydra import flash_attention_installed
from verl_speculator.config.objective import is_number
from verl_speculator.preflight.loggers import logger_names
from verl_speculator.utils.errors import UserError, nearest

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


TYPES = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
PRECISION = "engine.mixed_precision."
# Settings whose value is one of a few.
CHOICES = {
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    "data.truncation": ("error", "left", "right"),
    "engine.strategy": ("fsdp2", "fsdp"),
    "optim.lr_scheduler_type": ("cosine", "constant"),
    "optim.warmup_style": (None, "cosine", "constant"),
    "optim.zero_indexed_step": (True, False),
    "engine.model_dtype": TYPES,
    **{f"{PRECISION}{name}_dtype": TYPES for name in ("param", "reduce", "buffer")},
    "model.freeze_base_model": (True, False),
    "data.use_dynamic_bsz": (True, False),
    "model.use_remove_padding": ("auto", True, False),
}
# Whole numbers, with the least that makes sense and what else is accepted.
WHOLE_NUMBERS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "data.train_batch_size": (1, ()),
    "data.micro_batch_size_per_gpu": (1, ()),
    "data.max_token_len_per_gpu": (1, ()),
    "data.max_length": (2, ()),
    "data.train_max_samples": (-1, ()),
    "data.val_max_samples": (-1, ()),
    "data.num_workers": (0, ()),
    # null and -1: by the ratio; 0 has become a ratio of 0.
    "optim.lr_warmup_steps": (-1, (None,)),
    "trainer.seed": (0, ()),
    "trainer.total_epochs": (1, ()),
    "trainer.total_training_steps": (1, (None,)),
    "trainer.save_freq": (-1, ("after_each_epoch",)),
    "trainer.test_freq": (-1, ("after_each_epoch",)),
    "trainer.max_ckpt_to_keep": (1, (None,)),
    "trainer.nnodes": (1, ()),
    "trainer.n_gpus_per_node": (1, ()),
}
# Numbers, with the range that makes sense; the least is excluded where it stands alone.
NUMBERS = {
    "optim.lr": (0.0, math.inf, False),
    "optim.clip_grad": (0.0, math.inf, False),
    "optim.weight_decay": (0.0, math.inf, True),
    "optim.lr_warmup_steps_ratio": (0.0, 1.0, True),
    "optim.min_lr_ratio": (0.0, 1.0, True),
    "optim.num_cycles": (0.0, math.inf, True),
}
CONTENTS = ("model", "optimizer", "extra", "hf_model")
HALF_TYPES = ("bf16", "bfloat16", "fp16", "float16")


def say(value: Any) -> str:
    """A value as it is written on a command line."""
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def _choice(config: DictConfig, key: str) -> None:
    value, known = OmegaConf.select(config, key), CHOICES[key]
    if not any(value is one or (isinstance(one, str) and value == one) for one in known):
        names = [say(one) for one in known]
        raise UserError(f"{key}={say(value)}: expected one of {', '.join(names)}" + nearest(str(value), names))


def _whole(config: DictConfig, key: str) -> None:
    value, (least, also) = OmegaConf.select(config, key), WHOLE_NUMBERS[key]
    if any(value is one or (isinstance(one, str) and value == one) for one in also):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = "".join(f" or {say(one)}" for one in also)
        raise UserError(f"{key}={say(value)}: expected an integer of at least {least}{more}")


def _number(config: DictConfig, key: str, least: float, most: float, inclusive: bool) -> None:
    value = OmegaConf.select(config, key)
    if not is_number(value) or value < least or value > most or (value == least and not inclusive):
        bounds = f"of at least {least:g}" if inclusive else f"above {least:g}"
        bounds += "" if math.isinf(most) else f" and at most {most:g}"
        raise UserError(f"{key}={say(value)}: expected a number {bounds}")


def _names(config: DictConfig) -> None:
    for key in ("trainer.project_name", "trainer.experiment_name"):
        name = OmegaConf.select(config, key)
        if not isinstance(name, str) or not name:
            raise UserError(f"{key}={say(name)}: expected a name")


def _contents(config: DictConfig) -> None:
    given = config.checkpoint.save_contents
    if not isinstance(given, ListConfig):
        raise UserError(f"checkpoint.save_contents={say(given)}: expected a list of some of {', '.join(CONTENTS)}")
    for name in given:
        if name not in CONTENTS:
            raise UserError(
                f"checkpoint.save_contents={list(given)}: expected some of {', '.join(CONTENTS)}"
                + nearest(str(name), CONTENTS)
            )


def _profile(config: DictConfig) -> None:
    given = config.trainer.profile_interval
    steps = list(given) if isinstance(given, ListConfig) else []
    whole = len(steps) == 2 and all(type(step) is int for step in steps)
    if not whole or steps[1] < steps[0] or (steps[0] < 0 <= steps[1]):
        shown = steps or say(given)
        raise UserError(f"trainer.profile_interval={shown}: expected two steps, the first to the last, or [-1,-1]")


def check_settings(config: DictConfig) -> None:
    """Values of single settings."""
    for key in CHOICES:
        if not key.startswith(PRECISION) or config.engine.mixed_precision is not None:
            _choice(config, key)
    for key in WHOLE_NUMBERS:
        _whole(config, key)
    for key, bounds in NUMBERS.items():
        _number(config, key, *bounds)
    _number(config, "model.speculator_loss_coeff", 0.0, math.inf, inclusive=not config.model.freeze_base_model)
    if config.optim.get("grad_clip") is not None:
        _number(config, "optim.grad_clip", 0.0, math.inf, inclusive=False)
    logger_names(config.trainer.logger)
    _names(config)
    _contents(config)
    _profile(config)
    model = config.model
    BaseModelFormat(model.quantization, model.gguf_file).check("model.", frozen=model.freeze_base_model)
    if model.freeze_base_model:
        precision = config.engine.mixed_precision
        compute = "bf16" if precision is None else precision.get("param_dtype", "bf16")
        check_frozen_type(config.engine.model_dtype, compute)
    named = config.data.cache_hidden_states
    if named is not None and (not isinstance(named, str) or not named):
        raise UserError(f"data.cache_hidden_states={named}: expected a directory, or null")
    if named is not None and not config.model.freeze_base_model:
        raise UserError(f"data.cache_hidden_states={named}: the states of a base that is trained change; expected null")
    if named is not None and config.model.speculator.method == "early_exit":
        raise UserError(
            f"data.cache_hidden_states={named}: model.speculator.method=early_exit reads states inside the base, "
            "which are not kept; expected null"
        )
    if config.model.quantization is not None and config.model.speculator.get("trainable") == "head_and_block":
        raise UserError(
            f"model.quantization={config.model.quantization}: a block in 4 bits cannot be trained; "
            "expected model.speculator.trainable=head"
        )
    for key, only in UNSUPPORTED.items():
        if OmegaConf.select(config, key) != only:
            raise UserError(
                f"{key}={OmegaConf.select(config, key)}: a speculator trains with {key}={json.dumps(only)} only"
            )


def check_device(config: DictConfig, processes: int, processes_per_node: int) -> None:
    """Whether the device has what is asked of it."""
    device, strategy = config.trainer.device, config.engine.strategy
    if device == "cpu" and strategy == "fsdp":
        raise UserError("engine.strategy=fsdp: torch has no FSDP1 for the CPU; use engine.strategy=fsdp2")
    if strategy == "fsdp" and processes == 1:
        # torch turns it into NO_SHARD, whose frozen root then fails for a base model with a tied LM head.
        raise UserError("engine.strategy=fsdp: FSDP1 has nothing to shard in one process; expected fsdp2")
    attention = config.model.override_config.get("attn_implementation")
    if attention == "flash_attention_2" and not flash_attention_installed():
        raise UserError(
            "model.override_config.attn_implementation=flash_attention_2: the package flash-attn is not installed; "
            "install it or use sdpa"
        )
    if attention == "flash_attention_2" and device == "cpu":
        raise UserError("model.override_config.attn_implementation=flash_attention_2: not on a CPU; use sdpa")
    precision = config.engine.mixed_precision
    if attention == "flash_attention_2" and precision is not None and precision.param_dtype not in HALF_TYPES:
        raise UserError(
            "model.override_config.attn_implementation=flash_attention_2: needs a half type, "
            f"engine.mixed_precision.param_dtype is {precision.param_dtype}"
        )
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device == "cpu" and config.model.speculator.compile and not any(map(shutil.which, compilers)):
        raise UserError(
            f"model.speculator.compile=true: no C++ compiler ({' or '.join(compilers)}), which torch.compile needs on "
            "a CPU; install one, or set it to false"
        )
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
    if data.use_dynamic_bsz and data.max_token_len_per_gpu < data.max_length:
        raise UserError(
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu}: must hold a whole row, "
            f"data.max_length is {data.max_length}"
        )
    per_rank = data.train_batch_size // processes
    if not data.use_dynamic_bsz and per_rank % data.micro_batch_size_per_gpu:
        raise UserError(
            f"data.train_batch_size={data.train_batch_size}: its {per_rank} rows per process are not divisible by "
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu}"
        )
