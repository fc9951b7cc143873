"""Drafting: from the base's last hidden state and its newest token to the next few guesses."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.tree import DraftTree
from verl_speculator.decoding.verification import draw
from verl_speculator.models import DraftState, Speculator


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


@dataclass(frozen=True)
class Level:
    """How the nodes of one depth come about. Shapes: P rows that are stepped, C nodes.

    Attributes:
        tokens: [P] which of the nodes one depth above each row reads.
        states: [P] the row of the state that it goes on from.
        rows: [C] the row that drafts each node.
        ranks: [C] which of the row's most likely tokens the node is.
        widest: how many of them are needed.
    """

    tokens: Tensor
    states: Tensor
    rows: Tensor
    ranks: Tensor
    widest: int


def plan(tree: DraftTree, *, reads_tokens: bool, device: torch.device) -> list[Level]:
    """The levels of a tree.

    Args:
        tree: to be drafted.
        reads_tokens: of the speculator. What ignores tokens says the same after each of them: one row serves a depth.
        device: of the speculator.
    """
    levels = []
    # One level above: its nodes, and the row of the last state that drafted each.
    above, drafted_by = [()], [0]
    for depth in range(1, tree.depth + 1):
        nodes = [path for path in tree.paths if len(path) == depth]
        parents = list(dict.fromkeys(above.index(path[:-1]) for path in nodes))
        parents = parents if reads_tokens else parents[:1]
        rows = [parents.index(above.index(path[:-1])) if reads_tokens else 0 for path in nodes]
        ranks = [path[-1] for path in nodes]
        tensors = (parents, [drafted_by[parent] for parent in parents], rows, ranks)
        levels.append(Level(*(torch.tensor(x, device=device) for x in tensors), max(ranks) + 1))
        above, drafted_by = nodes, rows
    return levels


class TreeDrafter:
    """Drafts a tree with a speculator.

    Args:
        speculator: any family that lives on one hidden state.
        tree: to be drafted.
    """

    def __init__(self, speculator: Speculator, tree: DraftTree) -> None:
        self.speculator, self.tree = speculator, tree
        parameter = next(speculator.parameters())
        self.dtype = parameter.dtype
        self.levels = plan(tree, reads_tokens=speculator.reads_tokens, device=parameter.device)

    def propose(self, hidden: Tensor, token: Tensor) -> Tensor:
        """[N] the tokens of the tree's nodes.

        Args:
            hidden: [1, D] the base's state after its final norm at the position before `token`.
            token: [1] the newest token, the tree's root.
        """
        state, tokens, drafted = self.speculator.start(hidden.to(self.dtype)), token, []
        for depth, level in enumerate(self.levels):
            state = DraftState(*(x[level.states] if isinstance(x, Tensor) else x for x in state))
            state = self.speculator.step(state, tokens[level.tokens])
            logits = self.speculator.logits(depth, state.output)
            tokens = logits.topk(level.widest).indices[level.rows, level.ranks]
            drafted.append(tokens)
        return torch.cat(drafted)
