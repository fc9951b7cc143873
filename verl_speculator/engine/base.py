"""Bases that verl's engine cannot load by itself: in 4 bits, or from a GGUF file."""

from __future__ import annotations

import torch
from torch import nn
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.model import get_hf_auto_model_class

from verl_speculator.engine.config import SpeculatorModelConfig


def load_base(settings: SpeculatorModelConfig, dtype: torch.dtype, *, sent: bool) -> nn.Module:
    """The base as `settings.form` says, ready for what verl's engine does next.

    In 4 bits it is whole on this process's device, on every process. From a GGUF file it is an ordinary model on the
    host, which verl shards.

    Args:
        settings: of the base.
        dtype: of its parameters.
        sent: whether verl sends this process its weights, so that it needs none; nothing is then read.

    Raises:
        UserError: if it cannot be loaded.
    """
    auto_class, form = get_hf_auto_model_class(hf_config=settings.hf_config), settings.form
    if sent and not form.whole:
        with get_init_weight_context_manager(use_meta_tensor=True)():
            base = auto_class.from_config(settings.hf_config, dtype=dtype)
    else:
        base = form.load(
            auto_class,
            settings.local_path,
            dtype=dtype,
            device=get_device_id(),
            config=settings.hf_config,
            trust_remote_code=settings.trust_remote_code,
        )
    if settings.use_liger:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base, fused_linear_cross_entropy=False, swiglu=True)
    # Rows packed without padding, as verl has it for every other base.
    apply_monkey_patch(model=base, use_remove_padding=settings.use_remove_padding)
    if form.whole:
        return base
    base.to(dtype)  # some parameters may have a type of their own
    if settings.enable_gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base
