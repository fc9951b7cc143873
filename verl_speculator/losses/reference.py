"""The definitions: one row, one loss. Whatever is faster must give these values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log q(target) of each row.

    Args:
        logits: [R, V] in float32 or wider.
        targets: [R] token ids.

    Returns:
        [R]
    """
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    return torch.logsumexp(logits, -1) - picked
