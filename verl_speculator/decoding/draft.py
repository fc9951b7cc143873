"""Drafting: from the base's last hidden state and its newest token to the next few guesses."""

from __future__ import annotations

import abc
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


class ChainDrafter(abc.ABC):
    """Drafts one token after the other.

    Args:
        policy: the target's policy, which shapes q too.
        sampled: draw the drafts from q; otherwise take the most likely token.
    """

    def __init__(self, policy: SamplingPolicy, *, sampled: bool) -> None:
        self.policy = policy
        self.sampled = sampled and not policy.greedy

    @abc.abstractmethod
    def begin(self, hidden: Tensor) -> None:
        """A new chain, from the base's state [1, D] before the newest token."""

    @abc.abstractmethod
    def logits(self, depth: int, token: Tensor) -> Tensor:
        """[1, V] of the token behind `token` [1], which the chain has reached at this depth."""

    def propose(self, hidden: Tensor, token: Tensor, uniforms: Tensor | None, count: int) -> Proposal:
        """`Drafter.propose`"""
        tokens, probabilities = [], []
        self.begin(hidden)
        for depth in range(count):
            logits = self.logits(depth, token)
            if self.sampled:
                q = self.policy.probabilities(logits)
                probabilities.append(q)
                token = draw(q, uniforms[depth : depth + 1])
            else:
                token = logits.argmax(-1)
            tokens.append(token)
        return Proposal(torch.cat(tokens), torch.cat(probabilities) if self.sampled else None)


class SpeculatorDrafter(ChainDrafter):
    """Drafts with a speculator that lives on one hidden state: one step of it for each token.

    Args:
        speculator: any such family.
        policy: the target's policy, which shapes q too.
        sampled: draw the drafts from q; otherwise take the most likely token.
    """

    def __init__(self, speculator: Speculator, policy: SamplingPolicy, *, sampled: bool) -> None:
        super().__init__(policy, sampled=sampled)
        self.speculator = speculator
        self.dtype = next(speculator.parameters()).dtype

    def begin(self, hidden: Tensor) -> None:
        self.state = self.speculator.start(hidden.to(self.dtype))

    def logits(self, depth: int, token: Tensor) -> Tensor:
        self.state = self.speculator.step(self.state, token)
        return self.speculator.logits(depth, self.state.output)
