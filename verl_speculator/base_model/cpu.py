"""A base model for inference on a CPU: the same results up to rounding, from weights packed once and attention without
copies of shared keys and values. Measured by benchmarks/pass_time.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "verl_speculator_grouped"
# A processor's caches may hold less than this, and then a packed layer's longer call costs more than it saves.
LEAST_PACKED_BYTES = 64 * 2**20


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
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and query.shape[2] > 1 and attention_mask is None
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference whose weight lies in the blocked layout that oneDNN computes with. `nn.Linear`
    brings its weight into such a layout at every call, which takes longer than the product with a few tokens.

    Args:
        linear: the layer, in float32, or in bfloat16 on a processor that computes it.
        keeps_plain: keep the plain weight as `weight`, for an embedding that is tied to it.
    """

    def __init__(self, linear: nn.Linear, *, keeps_plain: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.packed_weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        if keeps_plain:
            self.weight = linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed_weight, self.bias, "none", [], "")


def optimize_for_cpu(base: nn.Module) -> None:
    """Prepare a Hugging Face causal language model for inference on a CPU, in place: `pack_linears` if that pays, and
    `grouped_attention` in place of `sdpa`."""
    if base.config.get_text_config()._attn_implementation == "sdpa" and base._supports_attention_backend:
        base.set_attn_implementation(GROUPED)
    if packing_pays(base):
        pack_linears(base)


def packing_pays(base: nn.Module) -> bool:
    """Whether the linear layers of a model on a CPU are larger than the processor's caches, and can be packed."""
    linears = [module for module in base.modules() if type(module) is nn.Linear]
    return sum(each.weight.nbytes for each in linears) >= LEAST_PACKED_BYTES and all(map(can_pack, linears))


def pack_linears(base: nn.Module) -> None:
    """Replace every linear layer of a Hugging Face causal language model by a `PackedLinear`."""
    head = base.get_output_embeddings()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, keeps_plain=child is head))


def can_pack(linear: nn.Linear) -> bool:
    """Whether torch's oneDNN computes this layer from a packed weight on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    dtype, computes_bf16 = linear.weight.dtype, torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and computes_bf16)
