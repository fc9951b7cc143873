"""Checks of single settings, the optimizer, the loggers, the device and the batch. No data and no model is read.

Each check raises `UserError`, one line that names the setting.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from verl_speculator.base_model.loading import BaseModelFormat, check_frozen_type
from verl_speculator.config.hydra import RunConfig, compose, compute_dtype, flash_attention_installed
from verl_speculator.config.schema import Count, Directory, NonNegativeInt, PositiveNumber, as_written, check_value
from verl_speculator.utils.atomic_io import check_metrics_file, check_writable
from verl_speculator.utils.settings import UserError, nearest, one_line

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
HALF_TYPES = ("bf16", "bfloat16", "fp16", "float16")
CONTENTS = ("model", "optimizer", "extra", "hf_model")
OPTIMIZER_ARGUMENTS = "optim.override_optimizer_config"
CACHE = "data.cache_hidden_states"
PRECISION = "engine.mixed_precision"

Dtype = Literal[*HALF_TYPES, "fp32", "float32"]
NonNegativeNumber = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1)]
CountOrAll = Annotated[int, Field(ge=-1)]
Name = Annotated[str, Field(min_length=1, description="a name")]
Beta = Annotated[float, Field(ge=0, lt=1)]

# The accepted values of verl's settings.
SETTINGS: dict[str, Any] = {
    "trainer.resume_mode": Literal["auto", "disable", "resume_path"],
    "data.truncation": Literal["error", "left", "right"],
    "engine.strategy": Literal["fsdp2", "fsdp"],
    "optim.lr_scheduler_type": Literal["cosine", "constant"],
    "optim.warmup_style": Literal[None, "cosine", "constant"],
    "engine.model_dtype": Dtype,
    **dict.fromkeys(("optim.zero_indexed_step", "model.freeze_base_model"), bool),
    **dict.fromkeys(("data.use_dynamic_bsz", "data.thinking_targets"), bool),
    "model.use_remove_padding": Literal["auto"] | bool,
    **dict.fromkeys(("data.train_batch_size", "data.micro_batch_size_per_gpu", "data.max_token_len_per_gpu"), Count),
    "data.max_length": Annotated[int, Field(ge=2)],
    **dict.fromkeys(("data.train_max_samples", "data.val_max_samples"), CountOrAll),
    **dict.fromkeys(("data.num_workers", "trainer.seed"), NonNegativeInt),
    **dict.fromkeys(("trainer.total_epochs", "trainer.nnodes", "trainer.n_gpus_per_node"), Count),
    **dict.fromkeys(("trainer.total_training_steps", "trainer.max_ckpt_to_keep"), Count | None),
    **dict.fromkeys(("trainer.save_freq", "trainer.test_freq"), CountOrAll | Literal["after_each_epoch"]),
    "trainer.save_minutes": PositiveNumber | None,
    **dict.fromkeys(("trainer.project_name", "trainer.experiment_name"), Name),
    **dict.fromkeys(("optim.lr", "optim.clip_grad"), PositiveNumber),
    **dict.fromkeys(("optim.weight_decay", "optim.num_cycles"), NonNegativeNumber),
    **dict.fromkeys(("optim.lr_warmup_steps_ratio", "optim.min_lr_ratio"), Ratio),
    "optim.lr_warmup_steps": CountOrAll | None,  # null and -1: by the ratio; 0 has become a ratio of 0
    "optim.betas": Annotated[
        list[Beta],
        Field(min_length=2, max_length=2, description="two numbers of at least 0 and below 1, such as [0.9,0.95]"),
    ],
    OPTIMIZER_ARGUMENTS: Annotated[dict[str, Any], Field(description="settings such as {eps: 1e-6}")] | None,
    "checkpoint.save_contents": Annotated[
        list[Literal[*CONTENTS]], Field(description=f"a list of some of {', '.join(CONTENTS)}")
    ],
    CACHE: Directory | None,
}


def check_settings(run: RunConfig) -> None:
    """Check the values of single settings and of some pairs."""
    config, model = run.tree, run.tree.model
    kinds = dict(SETTINGS)
    kinds["model.speculator_loss_coeff"] = NonNegativeNumber if model.freeze_base_model is False else PositiveNumber
    if config.engine.mixed_precision is not None:
        kinds |= {f"{PRECISION}.{name}_dtype": Dtype for name in ("param", "reduce", "buffer")}
    if config.optim.get("grad_clip") is not None:
        kinds["optim.grad_clip"] = PositiveNumber
    for key, kind in kinds.items():
        check_value(key, _select(config, key), kind)
    logger_names(config.trainer.logger)
    steps = _select(config, "trainer.profile_interval")
    is_pair = isinstance(steps, list) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not is_pair or steps[1] < steps[0] or steps[0] < 0 <= steps[1]:
        raise UserError(
            f"trainer.profile_interval={as_written(steps)}: expected two steps, the first to the last, or [-1,-1]"
        )
    BaseModelFormat(model.quantization, model.gguf_file).check("model.", frozen=model.freeze_base_model)
    if model.freeze_base_model:
        check_frozen_type(config.engine.model_dtype, compute_dtype(config))
    _check_pairs(run)
    for key, supported in UNSUPPORTED.items():
        if (value := OmegaConf.select(config, key)) != supported:
            raise UserError(f"{key}={value}: a speculator trains with {key}={json.dumps(supported)} only")


def _check_pairs(run: RunConfig) -> None:
    """Check the settings that the trained parts of the two models exclude."""
    model, config, directory = run.tree.model, run.speculator.config, run.tree.data.cache_hidden_states
    if directory is not None and not model.freeze_base_model:
        raise UserError(f"{CACHE}={directory}: the states of a base that is trained change; expected null")
    if directory is not None and config.method == "early_exit":
        raise UserError(
            f"{CACHE}={directory}: model.speculator.method=early_exit reads states inside the base, which are not "
            "kept; expected null"
        )
    if model.quantization is not None and config.trainable == "head_and_block":
        raise UserError(
            f"model.quantization={model.quantization}: a block in 4 bits cannot be trained; "
            "expected model.speculator.trainable=head"
        )


def _select(config: DictConfig, key: str) -> Any:
    """A value of the tree in plain Python."""
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@functools.cache
def _optimizer_settings() -> tuple[str, ...]:
    # verl reads grad_clip, although its own configuration does not list it.
    return (*map(str, compose([]).optim), "grad_clip")


def check_optimizer(config: DictConfig) -> None:
    """Check that the optimizer takes its settings: make one for a matrix and a vector, as verl makes the run's, and
    take a step if torch ships it."""
    import torch

    optim, names = config.optim, _optimizer_settings()
    for name in map(str, optim):
        if name not in names:
            raise UserError(
                f"optim.{name} is not a setting{nearest(name, names)}; arguments of the optimizer's own go into "
                f"{OPTIMIZER_ARGUMENTS}={{{name}: …}}"
            )
    optimizer_class = _optimizer_class(optim)
    arguments = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if "adam" in optim.optimizer.lower() or "ademamix" in optim.optimizer.lower():
        arguments["betas"] = tuple(optim.betas)
    arguments |= _select(optim, "override_optimizer_config") or {}
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    try:
        optimizer = optimizer_class(parameters, **arguments)
        # Other optimizers may need an accelerator for a step, and so does a capturable one.
        if optimizer_class.__module__.startswith("torch.optim") and not arguments.get("capturable"):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    except Exception as error:  # optimizers raise ValueError, TypeError, RuntimeError and others
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise UserError(f"optim.optimizer={optim.optimizer}: not with {shown}: {one_line(error)}") from None


def _optimizer_class(optim: DictConfig) -> Any:
    import torch

    try:
        module = importlib.import_module(str(optim.optimizer_impl))
    except (ImportError, ValueError) as error:
        setting = f"optim.optimizer_impl={optim.optimizer_impl}"
        raise UserError(f"{setting}: {error}; expected a module of optimizers, such as torch.optim") from None
    classes = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and name != "Optimizer"}
    optimizer_class = getattr(module, str(optim.optimizer), None)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise UserError(
            f"optim.optimizer={optim.optimizer}: {optim.optimizer_impl} has no such optimizer"
            f"{nearest(str(optim.optimizer), classes)}"
        )
    return optimizer_class


def check_loggers(config: DictConfig) -> None:
    """Check that every backend of `trainer.logger` is installed, logged in and can write. Sends nothing."""
    for name in logger_names(config.trainer.logger):
        setting, (package, check) = f"trainer.logger={name}", LOGGERS[name]
        # verl does not use rl_insight unless it is switched on.
        if name == "rl_insight" and os.environ.get("VERL_RL_INSIGHT_ENABLE") != "1":
            continue
        if package is not None and find_spec(package) is None:
            raise UserError(f"{setting}: the package {package} is not installed")
        if check is not None:
            check(setting, config.trainer)


def logger_names(value: Any) -> list[str]:
    """The backends that `trainer.logger` names. Refuses null, and a backend that verl does not have."""
    names = [value] if isinstance(value, str) or value is None else list(value)
    for name in names:
        if name not in LOGGERS:
            written = as_written(name) if len(names) == 1 else f"[{','.join(map(as_written, names))}]"
            word = "" if len(names) == 1 else f"{as_written(name)} is no backend; "
            raise UserError(
                f"trainer.logger={written}: {word}expected one or several of {', '.join(LOGGERS)}"
                + nearest(str(name), LOGGERS)
            )
    return names


def _check_wandb(setting: str, trainer: DictConfig) -> None:
    import wandb

    reason = "not logged in"
    try:
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        if "prompt" in inspect.signature(wandb.login).parameters:
            logged_in = wandb.login(prompt=False, verify=False)
        else:  # before wandb 0.31
            logged_in = bool(wandb.api.api_key)
    except Exception as error:  # wandb's errors have no other common class
        logged_in, reason = False, one_line(error)
    finally:
        wandb.teardown()  # the process that trains reads the settings again
    if not logged_in:
        raise UserError(f"{setting}: {reason}; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")


def _check_swanlab(setting: str, trainer: DictConfig) -> None:
    if os.environ.get("SWANLAB_MODE", "cloud") not in ("cloud", "online") or os.environ.get("SWANLAB_API_KEY"):
        return
    directories = [Path(os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"), Path(".swanlab")]
    if not any((directory / name).is_file() for directory in directories for name in (".netrc", "netrc")):
        raise UserError(
            f"{setting}: not logged in; run `swanlab login`, set SWANLAB_API_KEY, or set SWANLAB_MODE=local"
        )


def _check_clearml(setting: str, trainer: DictConfig) -> None:
    environment = os.environ
    file = environment.get("CLEARML_CONFIG_FILE") or environment.get("TRAINS_CONFIG_FILE")
    files = [Path(file)] if file else [Path.home() / "clearml.conf", Path.home() / "trains.conf"]
    has_key = any(environment.get(f"{prefix}_API_ACCESS_KEY") for prefix in ("CLEARML", "TRAINS"))
    offline = environment.get("CLEARML_OFFLINE_MODE", "0").lower() not in ("", "0", "false")
    if not (has_key or offline or any(file.expanduser().is_file() for file in files)):
        raise UserError(f"{setting}: no credentials; run `clearml-init`, or set CLEARML_API_ACCESS_KEY and its secret")


def _check_volcengine(setting: str, trainer: DictConfig) -> None:
    variables = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")
    if missing := [name for name in variables if name not in os.environ]:
        raise UserError(f"{setting}: no credentials; set {', '.join(missing)}")


def _check_tensorboard(setting: str, trainer: DictConfig) -> None:
    default = f"tensorboard_log/{trainer.project_name}/{trainer.experiment_name}"
    check_writable(setting, Path(os.environ.get("TENSORBOARD_DIR", default)))


# verl's logging backends: the package that each needs, and a check of its credentials or its file.
LOGGERS: dict[str, tuple[str | None, Callable[[str, DictConfig], None] | None]] = {
    "console": (None, None),
    "file": (None, lambda setting, run: check_metrics_file(setting, run.project_name, run.experiment_name)),
    "wandb": ("wandb", _check_wandb),
    "mlflow": ("mlflow", None),
    "swanlab": ("swanlab", _check_swanlab),
    "clearml": ("clearml", _check_clearml),
    "trackio": ("trackio", None),
    "tensorboard": ("tensorboard", _check_tensorboard),
    "vemlp_wandb": ("volcengine_ml_platform", _check_volcengine),
    "rl_insight": ("rl_insight", None),
}


def check_device(run: RunConfig, processes: int, processes_per_node: int) -> None:
    """Check that the device supports the settings."""
    config = run.tree
    device, strategy = config.trainer.device, config.engine.strategy
    if device == "cpu" and strategy == "fsdp":
        raise UserError("engine.strategy=fsdp: torch has no FSDP1 for the CPU; use engine.strategy=fsdp2")
    if strategy == "fsdp" and processes == 1:
        # torch turns it into NO_SHARD, whose frozen root then fails for a base model with a tied LM head.
        raise UserError("engine.strategy=fsdp: FSDP1 has nothing to shard in one process; expected fsdp2")
    if config.model.override_config.get("attn_implementation") == "flash_attention_2":
        _check_flash_attention(device, compute_dtype(config))
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device == "cpu" and run.speculator.training.compile and not any(map(shutil.which, compilers)):
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


def _check_flash_attention(device: str, dtype: str) -> None:
    problem = None
    if not flash_attention_installed():
        problem = "the package flash-attn is not installed; install it or use sdpa"
    elif device == "cpu":
        problem = "not on a CPU; use sdpa"
    elif dtype not in HALF_TYPES:
        problem = f"needs a half type, {PRECISION}.param_dtype is {dtype}"
    if problem is not None:
        raise UserError(f"model.override_config.attn_implementation=flash_attention_2: {problem}")


def check_batch(config: DictConfig, processes: int) -> None:
    """Check that the global batch divides into processes and micro-batches."""
    data = config.data
    setting, rows = f"data.train_batch_size={data.train_batch_size}", data.train_batch_size // processes
    if data.train_batch_size % processes:
        raise UserError(f"{setting}: not divisible by {processes} processes")
    if data.use_dynamic_bsz and data.max_token_len_per_gpu < data.max_length:
        raise UserError(
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu}: must hold a whole row, "
            f"data.max_length is {data.max_length}"
        )
    if not data.use_dynamic_bsz and rows % data.micro_batch_size_per_gpu:
        raise UserError(
            f"{setting}: its {rows} rows per process are not divisible by "
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu}"
        )
