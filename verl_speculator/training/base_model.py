"""The base model of a training run: loading it with the dtypes of `from_pretrained`, and whether it supports packing.

Whatever is not trained has the dtype that transformers gives it: RoPE frequencies and routing biases stay in fp32 in a
bf16 model, as they do where it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.model import get_hf_auto_model_class

from verl_speculator.training.model_config import SpeculatorModelConfig


def load_base(settings: SpeculatorModelConfig, dtype: torch.dtype, *, receives_weights: bool) -> nn.Module:
    """The base model as `settings.form` describes it, ready to be sharded by verl. Every rank calls it.

    A 4-bit model is whole on the device of every process; any other is on the host.

    Args:
        settings: of the base model.
        dtype: as for `from_pretrained`. A base model that is trained has all its parameters in this dtype, since a
            sharding unit trains parameters of one dtype.
        receives_weights: whether verl sends this process the weights of rank 0, so that none are read.

    Raises:
        UserError: if it cannot be loaded.
    """
    auto_class, form = get_hf_auto_model_class(hf_config=settings.hf_config), settings.form
    options = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if receives_weights and not form.is_quantized:
        with get_init_weight_context_manager(use_meta_tensor=True)():
            base = auto_class.from_config(settings.hf_config, **options).eval()  # as from_pretrained leaves it
    else:
        base = form.load(auto_class, settings.local_path, device=get_device_id(), config=settings.hf_config, **options)
    if settings.use_liger:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base, fused_linear_cross_entropy=False, swiglu=True)
    apply_monkey_patch(model=base, use_remove_padding=settings.use_remove_padding)  # as verl does for every base model
    if form.is_quantized:
        return base
    if not settings.freeze_base_model:
        for parameter in base.parameters():
            parameter.data = parameter.data.to(dtype)
    # `from_pretrained` decides some types while it reads weights, and a rank that reads none would receive tensors of
    # another dtype than it expects.
    tensors: dict[str, Tensor] = dict(base.named_parameters()) | dict(base.named_buffers())
    for name, dtype in from_rank_0({name: tensor.dtype for name, tensor in tensors.items()}).items():
        tensors[name].data = tensors[name].data.to(dtype)
    if settings.enable_gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def keep_types(base: nn.Module) -> None:
    """Turn parameters of a frozen base model that have another dtype than the rest into buffers, which wrappers neither
    shard nor cast: a sharding unit gathers all its parameters in one dtype."""
    dtype = base.dtype
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def leave_inputs_and_buffers(model: nn.Module, base: nn.Module) -> None:
    """Stop the sharding units of a frozen base model from casting the inputs of modules (FSDP2), such as RoPE's sines,
    and buffers (FSDP1). Neither wrapper takes such a setting for some of its units, so it is changed afterwards.

    Args:
        model: the sharded module that contains `base`.
        base: the base model.
    """
    for unit in (model, *base.modules()):
        if isinstance(unit, FSDPModule):
            state = unit._get_fsdp_state()
            state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)
        elif isinstance(unit, FullyShardedDataParallel):
            unit.mixed_precision = replace(unit.mixed_precision, buffer_dtype=None)


# Packing: rows have no mask, and a document starts where `position_ids` start again. In some architectures documents
# depend on those before them, because the mask comes from the row's length, a recurrent state runs through the row, or
# attention is cut at multiples of a length from the row's start. So each base model is probed before it trains.

# The first document has an odd length, about half a block of 16 and of 32: blocks that a model counts from the row's
# start then begin elsewhere in the second document than they do in it alone, for more than half of its tokens.
FIRST_LENGTH, SECOND_LENGTH = 23, 32
# Rounding in bf16 gives about 0.01, another document more than 0.1 in every architecture.
PACKING_TOLERANCE = 5e-2
TEXT = "The cat sat on the mat. Two and two are 4, isn't it? A river runs; it has 10 bends - all of them deep."


def probe_documents(tokenizer: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Two documents of token ids. Packed, the second one shows whether it depends on the first.

    Args:
        tokenizer: of the base model.
        config: the base model's text configuration. A border of its attention chunks falls into the second document.
    """
    vocabulary = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    chunk = getattr(config, "attention_chunk_size", None)
    first_length = FIRST_LENGTH if chunk is None else chunk - min(FIRST_LENGTH // 2, chunk // 4)
    generator = torch.Generator().manual_seed(0)
    lengths = (first_length, SECOND_LENGTH)
    return tuple(vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)] for length in lengths)


@torch.no_grad()
def packing_error(run: Callable[[Sequence[Tensor]], Tensor], documents: Sequence[Tensor]) -> float:
    """The largest relative difference between a document's states packed and alone.

    For each document the median over its tokens, or the smaller difference of its first two tokens if that is larger: a
    recurrent state is soon forgotten, and rounding that sends a single token to another expert is no dependence.

    Args:
        run: gives the states [T, D] of documents in one packed row.
        documents: token ids, [t] each.
    """
    packed, largest = run(documents).split([len(document) for document in documents]), []
    for together, document in zip(packed, documents, strict=True):
        alone = run([document]).float()
        errors = (together.float() - alone).norm(dim=-1) / alone.norm(dim=-1)
        largest += [errors[:2].min(), errors.median()]
    return torch.stack(largest).max().item()
