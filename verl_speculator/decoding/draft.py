"""Drafting: from the base's last hidden state and its newest token to the next few guesses."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from verl_speculator.decoding.policy import SamplingPolicy
from verl_speculator.decoding.sampling import draw
from verl_speculator.models import Speculator


class Proposal(NamedTuple):
    """Drafted tokens.

    Attributes:
        tokens: [K]
        probabilities: [K, V] what each was drawn from; None if they were chosen and not drawn.
    """

    tokens: Tensor
    probabilities: Tensor | None


class Drafter(Protocol):
    """Whatever guesses tokens. What it guesses decides the speed and never the text."""

    def propose(self, hidden: Tensor, token: Tensor, uniforms: Tensor | None, count: int) -> Proposal:
        """
        Args:
            hidden: [1, D] the base's state at the position before `token`.
            token: [1] the newest token; the base has not read it yet.
            uniforms: [count] in [0, 1) to draw with; None where no token is ever drawn.
            count: how many tokens to draft.
        """
        ...


class SpeculatorDrafter:
    """Drafts with a speculator.

    Args:
        speculator: any family that lives on one hidden state.
        policy: the target's policy, which shapes q too.
        sampled: draw the drafts from q; otherwise take the most likely token.
    """

    def __init__(self, speculator: Speculator, policy: SamplingPolicy, *, sampled: bool) -> None:
        self.speculator = speculator
        self.policy = policy
        self.sampled = sampled and not policy.greedy
        self.dtype = next(speculator.parameters()).dtype

    def propose(self, hidden: Tensor, token: Tensor, uniforms: Tensor | None, count: int) -> Proposal:
        """`Drafter.propose`: one step of the speculator for each token."""
        speculator, tokens, probabilities = self.speculator, [], []
        state = speculator.start(hidden.to(self.dtype))
        for depth in range(count):
            state = speculator.step(state, token)
            logits = state.output @ speculator.head(depth).T
            if self.sampled:
                q = self.policy.probabilities(logits)
                probabilities.append(q)
                token = draw(q, uniforms[depth : depth + 1])
            else:
                token = logits.argmax(-1)
            tokens.append(token)
        return Proposal(torch.cat(tokens), torch.cat(probabilities) if self.sampled else None)
