"""The sampling policy: from logits to probabilities, for draft and target alike. Importing it loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


# Below it, logits over temperature overflow float32, and only the most likely token is ever drawn.
LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class SamplingPolicy:
    """Temperature, then top-k, then top-p: the order of Hugging Face's `generate` and of vLLM.

    Attributes:
        temperature: 0 is greedy: always the most likely token.
        top_p: keep the most likely tokens whose probabilities together reach this; 1 keeps all.
        top_k: keep this many most likely tokens, and those that tie with the last; 0 keeps all.

    Raises:
        UserError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature}: expected a number ≥ 0")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy), or at least {LEAST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected a number in (0, 1]")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: expected a whole number ≥ 0 (0 keeps all tokens)")

    @property
    def greedy(self) -> bool:
        """Whether the temperature is 0."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] probabilities of logits [..., V], in float32 at least; one-hot for a greedy policy."""
        import torch

        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(stable=True)
            below = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            below[..., -1] = False  # rounding must not take the most likely token
            logits = logits.masked_fill(below.scatter(-1, order, below), -torch.inf)
        return logits.softmax(-1)
