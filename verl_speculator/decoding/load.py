"""A base and its tokenizer for decoding: safe loading, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_form import AS_IT_LIES, BaseForm
from verl_speculator.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def choose_device(device: str) -> str:
    """`auto` is the accelerator if there is one.

    Raises:
        UserError: for a device that is not there.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return found.type if found else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, or an accelerator such as cuda") from None
    if kind != "cpu" and (found is None or found.type != kind):
        raise UserError(f"device={device}: not on this machine (it has {found.type if found else 'cpu alone'})")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is fp32 on a CPU and bf16 elsewhere.

    Raises:
        UserError: for a name that is none.
    """
    import torch

    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def check_base(path: str | Path, form: BaseForm = AS_IT_LIES) -> None:
    """Whether a base can be decoded with, by its configuration: before its weights are read.

    Raises:
        UserError: for one with recurrent layers.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from verl_speculator.decoding.target import check_rollback

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **form.reading)
    except (OSError, ValueError, KeyError):  # `load_base` says what is the matter
        return
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        check_rollback(str(path), MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def load_base(path: str | Path, *, device: str, dtype: torch.dtype, form: BaseForm = AS_IT_LIES) -> nn.Module:
    """A Hugging Face causal language model in evaluation mode. No code from the model's folder is run.

    Raises:
        UserError: if there is none.
    """
    from transformers import AutoModelForCausalLM

    base = form.load(AutoModelForCausalLM, path, dtype=dtype, device=device, trust_remote_code=False)
    base = base if form.whole else base.to(device)
    return base.eval().requires_grad_(False)


def load_tokenizer(path: str | Path, form: BaseForm = AS_IT_LIES) -> Any:
    """A base's tokenizer, with the default chat template if it has none.

    Raises:
        UserError: if there is none.
    """
    from verl_speculator.bases import check_base_name

    check_base_name(path)
    from verl_speculator.tokens import ensure_chat_template

    try:
        tokenizer = form.read_tokenizer(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base={form.name_of(path)}: no tokenizer: {' '.join(str(error).split())[:300]}") from None
    ensure_chat_template(tokenizer)
    return tokenizer
