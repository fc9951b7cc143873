"""The base's own distribution at a state that its forward pass has already made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from verl_speculator.models.logits import logit_transform
from verl_speculator.utils.errors import UserError

TOLERANCE = 1e-2


class BaseHead:
    """The base's output head with the soft cap or scale that it applies. Never carries a gradient.

    Args:
        base: a Hugging Face causal language model.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.transform = logit_transform(base.config)

    def __call__(self, states: Tensor) -> Tensor:
        """[r, V] logits of the token behind each of the states [r, D] after the final norm."""
        head = self.base.get_output_embeddings()
        weight = head.weight.detach()
        products = F.linear(states.to(weight.dtype), weight, None if head.bias is None else head.bias.detach())
        return self.transform(products)

    @contextmanager
    def gathered(self) -> Iterator[BaseHead]:
        """Its weight whole, while the block lasts, where it is a sharding unit of its own (verl makes untied ones so).

        Gathered once for all calls: ranks have different numbers of rows, and so of calls, and a gathering in each
        would wait for ever.
        """
        head = self.base.get_output_embeddings()
        if not isinstance(head, FSDPModule):
            yield self
            return
        head.unshard()
        try:
            yield self
        finally:
            head.reshard()

    @torch.no_grad()
    def check(self, states: Tensor, logits: Tensor, expected: str = "model.speculator.loss=ce") -> None:
        """Hold the head against logits that the base itself gave.

        Args:
            states: [r, D]
            logits: [r, V]
            expected: settings of a run that does not need the base's logits to be known.

        Raises:
            UserError: for an architecture that does something else to its logits.
        """
        difference = (self(states).float() - logits.float()).abs().max() / logits.float().abs().max().clamp(min=1)
        if difference > TOLERANCE:
            raise UserError(
                f"model.partial_pretrain: {type(self.base).__name__} does something to its logits that is not known "
                f"here, so its distribution can be neither compared with nor copied; expected {expected} for this base"
            )
