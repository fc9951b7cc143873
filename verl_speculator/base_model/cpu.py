"""A base model that a CPU computes faster: the same results up to rounding, from weights packed once and attention
without copies of shared keys and values. Measured by benchmarks/pass_time.py."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "verl_speculator_grouped"
# Smaller weights may stay in a processor's caches, and then a packed layer's longer call costs more than it saves.
LEAST_PACKED_BYTES = 64 * 2**20
# Up to so many queries of each head are a decoding step's.
FEW_QUERIES = 64


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention without its copy of keys and values for each of the query heads that share them,
    which takes longer on a CPU than the attention itself. Shapes: query [N, H, T, d], key and value [N, H′, L, d].

    In bf16 torch's kernel reads the keys of a shared head once for each query head, a number at a time: few queries
    become rows of one head, and those of several texts two products of matrices.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and query.shape[2] > 1 and attention_mask is None
    if query.dtype == torch.bfloat16 and query.shape[2] <= FEW_QUERIES and not is_causal:
        groups, count = key.shape[1], query.shape[1] // key.shape[1]
        rows, mask = query.unflatten(1, (groups, count)).flatten(2, 3), attention_mask  # [N, H′, count · T, d]
        if mask is not None and mask.shape[1] == 1 and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, count, 1)
        elif mask is not None and mask.shape[1] > 1:
            mask = mask.unflatten(1, (groups, count)).flatten(2, 3)
        attend = F.scaled_dot_product_attention if len(query) == 1 else matmul_attention
        output = attend(rows, key, value, mask, scale=scaling).unflatten(2, (count, -1)).flatten(1, 2)
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, is_causal=is_causal, scale=scaling, enable_gqa=True
        )
    return output.transpose(1, 2).contiguous(), None


def matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention` as two products of matrices and a softmax in float32, without dropout."""
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference whose weight lies in the blocked layout that oneDNN computes with. `nn.Linear`
    brings its weight into such a layout for every product of two or more rows, which takes longer than the product of a
    few.

    Args:
        linear: the layer, in float32, or in bfloat16 on a processor that computes it.
        keeps_plain: keep the plain weight as `weight`, for an embedding that is tied to it.
    """

    def __init__(self, linear: nn.Linear, *, keeps_plain: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = linear.weight if keeps_plain else nn.Parameter(packed, requires_grad=False)
        self.packed = packed if keeps_plain else None
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        weight = self.weight if self.packed is None else self.packed
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, self.bias, "none", [], "")


def optimize_for_cpu(base: nn.Module) -> None:
    """Prepare a Hugging Face causal language model for inference on a CPU, in place: `pack_linears` if that pays, and
    `grouped_attention` in place of `sdpa`."""
    if base.config.get_text_config()._attn_implementation == "sdpa" and base._supports_attention_backend:
        base.set_attn_implementation(GROUPED)
    if packing_pays(base):
        pack_linears(base)


def optimize_speculator_for_cpu(speculator: nn.Module) -> None:
    """Prepare a speculator for drafting on a CPU, in place: it can neither be trained nor saved afterwards. A draft
    multiplies a row or a few with each matrix, of which plain layouts take twice as long to read."""
    pack_linears(speculator)
    dtype = next(speculator.parameters()).dtype
    if _computes_packed(dtype):
        speculator.head_product = PackedHeads()


class PackedHeads:
    """The products of states with the heads of a speculator, `Speculator.head_product`. A head is packed where it is
    used first, and again if its weight has changed."""

    def __init__(self) -> None:
        self.packed: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, states: Tensor, head: Tensor) -> Tensor:
        key = (head.data_ptr(), None if head.is_inference() else head._version)
        if key not in self.packed:
            self.packed[key] = torch.ops.mkldnn._reorder_linear_weight(head.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed[key], None, "none", [], "")


def packing_pays(base: nn.Module) -> bool:
    """Whether a model on a CPU has linear layers of at least `LEAST_PACKED_BYTES` that can be packed. Architectures
    older than transformers' attention interface are left as they are: some use their weights in ways of their own."""
    if not base._supports_attention_backend:
        return False
    linears = [getattr(module, name) for module, name in _packable(base)]
    return sum(each.weight.nbytes for each in linears) >= LEAST_PACKED_BYTES


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a Hugging Face causal language model, or of a speculator, by `PackedLinear`, one
    after the other."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module, name in _packable(model):
        linear = getattr(module, name)
        setattr(module, name, PackedLinear(linear, keeps_plain=linear is head))


def _packable(base: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers that can be packed, as modules and names in them; without those whose module reads the weight
    itself, as some routers of experts do."""
    places = [
        (module, name) for module in base.modules() for name, child in module.named_children() if _can_pack(child)
    ]
    return [(module, name) for module, name in places if f"self.{name}.weight" not in _source(type(module))]


def _can_pack(module: nn.Module) -> bool:
    """Whether this is a linear layer that torch's oneDNN computes from a packed weight on this machine."""
    return type(module) is nn.Linear and _computes_packed(module.weight.dtype)


def _computes_packed(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _source(module_class: type) -> str:
    return inspect.getsource(module_class)
