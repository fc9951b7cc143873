"""Logit scale and soft cap of a base model: what it applies to the product of hidden state and LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTOR, DIVISOR, CAP = "factor", "divisor", "cap"
# By model type: a setting of its transformers configuration, and what the architecture's code does with it. The name of
# a setting does not tell: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X, and MPT never reads its
# `logit_scale`.
TRANSFORMS = {
    "cohere": ("logit_scale", FACTOR),
    "cohere2": ("logit_scale", FACTOR),
    "cohere2_moe": ("logit_scale", FACTOR),
    "falcon_h1": ("lm_head_multiplier", FACTOR),
    "gemma2": ("final_logit_softcapping", CAP),
    "gemma3_text": ("final_logit_softcapping", CAP),
    "gemma3n_text": ("final_logit_softcapping", CAP),
    "gemma4_text": ("final_logit_softcapping", CAP),
    "gemma4_unified_text": ("final_logit_softcapping", CAP),
    "granite": ("logits_scaling", DIVISOR),
    "granitemoe": ("logits_scaling", DIVISOR),
    "granitemoehybrid": ("logits_scaling", DIVISOR),
    "granitemoeshared": ("logits_scaling", DIVISOR),
    "hyperclovax": ("logits_scaling", FACTOR),
    "nanochat": ("final_logit_softcapping", CAP),
    "recurrent_gemma": ("logits_soft_cap", CAP),
    "vaultgemma": ("final_logit_softcapping", CAP),
    "xlstm": ("output_logit_soft_cap", CAP),
}


class LogitTransform(NamedTuple):
    """logits = cap · tanh(scale · W h / cap); without a cap scale · W h.

    Attributes:
        scale: the factor, which can be folded into W.
        cap: the soft cap, or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """[..., V] logits from the products W h."""
        return soft_cap(products if self.scale == 1 else products * self.scale, self.cap)


def logit_transform(config: Any) -> LogitTransform:
    """Scale and cap of a Hugging Face configuration by TRANSFORMS; neither for a model type without a row."""
    settings = config.get_text_config()
    name, kind = TRANSFORMS.get(settings.model_type, (None, None))
    value = None if name is None else getattr(settings, name, None)
    if not value:
        return LogitTransform()
    if kind == CAP:
        return LogitTransform(cap=float(value))
    return LogitTransform(float(value) if kind == FACTOR else 1 / float(value))


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits themselves."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
