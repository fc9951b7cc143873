"""Drawing from probabilities by a given uniform."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token that a uniform picks by the inverse of the cumulative distribution.

    Args:
        weights: [..., V] probabilities, up to a factor; not all zero.
        uniform: [...] in [0, 1).

    Returns:
        [...] token ids; never one of weight zero.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[..., -1:]
    # A product that rounds up to the total would fall behind the last token.
    threshold = torch.minimum(uniform.double().unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
