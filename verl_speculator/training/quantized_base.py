"""The base of a training run: what `from_pretrained` gives, every type included, made ready for sharding.

Whatever is not trained has the type that transformers gives it: RoPE's frequencies and routing biases stay in fp32 in a
base in bf16, as they do wherever it is served.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.model import get_hf_auto_model_class

from verl_speculator.training.model_config import SpeculatorModelConfig


def load_base(settings: SpeculatorModelConfig, dtype: torch.dtype, *, sent: bool) -> nn.Module:
    """The base as `settings.form` says, ready for what verl's engine does next. Every rank calls it.

    In 4 bits it is whole on this process's device, on every process. Otherwise it is an ordinary model on the host,
    which verl shards.

    Args:
        settings: of the base.
        dtype: as `from_pretrained` takes it. A base that is trained has all its parameters in this type, since a
            sharding unit trains parameters of one type.
        sent: whether verl sends this process its weights, so that it needs none; nothing is then read.

    Raises:
        UserError: if it cannot be loaded.
    """
    auto_class, form = get_hf_auto_model_class(hf_config=settings.hf_config), settings.form
    options = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if sent and not form.is_quantized:
        with get_init_weight_context_manager(use_meta_tensor=True)():
            base = auto_class.from_config(settings.hf_config, **options).eval()  # as from_pretrained leaves it
    else:
        base = form.load(auto_class, settings.local_path, device=get_device_id(), config=settings.hf_config, **options)
    if settings.use_liger:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base, fused_linear_cross_entropy=False, swiglu=True)
    # Rows packed without padding, as verl has it for every other base.
    apply_monkey_patch(model=base, use_remove_padding=settings.use_remove_padding)
    if form.is_quantized:
        return base
    if not settings.freeze_base_model:
        for parameter in base.parameters():
            parameter.data = parameter.data.to(dtype)
    take_types_of_first_rank(base)
    if settings.enable_gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def take_types_of_first_rank(base: nn.Module) -> None:
    """Give parameters and buffers the types that rank 0 has, which `from_pretrained` decides while it reads weights.

    A rank that has read none would otherwise be sent values of another type than it expects.
    """
    tensors: dict[str, Tensor] = dict(base.named_parameters()) | dict(base.named_buffers())
    types = [{name: tensor.dtype for name, tensor in tensors.items()}]
    dist.broadcast_object_list(types, src=0)
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(types[0][name])


def keep_types(base: nn.Module) -> None:
    """Turn the parameters of a frozen base that have another type than the rest into buffers, which wrappers neither
    shard nor cast: a sharding unit gathers all its parameters in one type."""
    dtype = base.dtype
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def leave_inputs_and_buffers(whole: nn.Module, base: nn.Module) -> None:
    """Have the sharding units of a frozen base cast neither what its modules hand to each other nor its buffers.

    FSDP2 casts every floating input of a unit, such as RoPE's sines, which some architectures keep in fp32; FSDP1 casts
    buffers. Neither can be told otherwise for some units when it wraps them, so it is told afterwards.

    Args:
        whole: the sharded module that has the base in it.
        base: in it.
    """
    for unit in (whole, *base.modules()):
        if isinstance(unit, FSDPModule):
            state = unit._get_fsdp_state()
            state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)
        elif isinstance(unit, FullyShardedDataParallel):
            unit.mixed_precision = replace(unit.mixed_precision, buffer_dtype=None)
