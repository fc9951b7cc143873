"""What a base model does to the product of hidden state and LM head: a scale, a soft cap, or neither."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Settings of transformers' configurations: linear ones with the power at which the value is the factor, then caps.
SCALE_POWERS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LogitTransform(NamedTuple):
    """logits = cap · tanh(scale · W h / cap); without a cap scale · W h.

    Attributes:
        scale: the linear factor, which can be folded into W.
        cap: the soft cap, or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """[..., V] logits from the products W h."""
        return soft_cap(products if self.scale == 1 else products * self.scale, self.cap)


def logit_transform(config: Any) -> LogitTransform:
    """The scale and cap that a Hugging Face configuration names."""
    settings, scale = config.get_text_config(), 1.0
    for name, power in SCALE_POWERS.items():
        value = getattr(settings, name, None)
        scale *= 1.0 if value is None else float(value) ** power
    caps = (getattr(settings, name, None) for name in CAPS)
    return LogitTransform(scale, next((float(cap) for cap in caps if cap), None))


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits themselves."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
