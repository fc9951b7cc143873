"""Drafting: from the hidden states that the target has computed to the next draft tokens.

Shapes: n states since the last draft, K drafts, D base width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.decoding.target import RollbackLayer
from verl_speculator.decoding.tree import DraftTree
from verl_speculator.decoding.verification import draw
from verl_speculator.models.speculator import DraftState, Speculator


class Proposal(NamedTuple):
    """Draft tokens.

    Attributes:
        tokens: [K]
        probabilities: [K, V] the distribution that each was drawn from; None for greedy drafts.
    """

    tokens: Tensor
    probabilities: Tensor | None = None


class Drafter:
    """What drafters of chains and trees share: the caches of a speculator that reads the sequence.

    Args:
        speculator: of any family.
    """

    def __init__(self, speculator: Speculator) -> None:
        self.speculator, self.dtype = speculator, speculator.head(0).dtype
        self.caches = [RollbackLayer() for _ in range(speculator.cache_layers)]
        self.reads_sequence = speculator.reads_sequence

    def begin(self, hidden: Tensor, tokens: Tensor, length: int) -> DraftState:
        """The state before the first step, as `Speculator.begin`; the target has read `length` tokens."""
        for cache in self.caches:
            cache.crop(length - len(tokens))
        return self.speculator.begin(hidden.to(self.dtype), tokens, self.caches)


class SpeculatorDrafter(Drafter):
    """Drafts a chain: every token continues the one before it.

    Args:
        speculator: of any family.
        policy: the target's sampling policy, which is applied to the draft's logits too.
        sampled: draw the drafts from q; otherwise take the most likely token.
        read: for a self-speculative draft, from tokens [1] to their hidden states [1, D] (`Speculator.draft`).
    """

    def __init__(
        self,
        speculator: Speculator,
        policy: SamplingPolicy,
        *,
        sampled: bool,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(speculator)
        self.policy, self.sampled = policy, sampled and not policy.greedy
        self.read = None if read is None else lambda tokens: read(tokens).to(self.dtype)

    def propose(self, hidden: Tensor, tokens: Tensor, uniforms: Tensor | None, count: int, length: int) -> Proposal:
        """Draft `count` tokens.

        Args:
            hidden: [n, D] the target's hidden states since the last draft; unused with `read`.
            tokens: [n] the token after each; the target has not read the last one yet. n = 1 unless the speculator
                reads the sequence.
            uniforms: [count] in [0, 1) to draw with; None if drafts are greedy.
            count: draft length.
            length: number of tokens that the target has read.
        """
        probabilities: list[Tensor] = []

        def sample(logits: Tensor) -> Tensor:
            uniform = uniforms[len(probabilities)].view(1)
            probabilities.append(self.policy.probabilities(logits))
            return draw(probabilities[-1], uniform)

        choose = sample if self.sampled else None
        state = self.begin(hidden, tokens, length) if self.read is None else None
        drafts = self.speculator.draft(state, tokens[-1:], count, choose=choose, read=self.read)
        return Proposal(drafts[0], torch.cat(probabilities) if self.sampled else None)


class TreeLevel(NamedTuple):
    """How the nodes of one depth are drafted. Shapes: P rows that are stepped, C nodes.

    Attributes:
        tokens: [P] for each row the node of the depth above whose token it reads.
        states: [P] for each row the row of the depth above whose state it continues.
        rows: [C] for each node the row that drafts it.
        ranks: [C] for each node its rank among the most likely tokens of the row.
        top: number of most likely tokens that are needed.
    """

    tokens: Tensor
    states: Tensor
    rows: Tensor
    ranks: Tensor
    top: int


def tree_levels(tree: DraftTree, *, reads_tokens: bool, device: torch.device) -> list[TreeLevel]:
    """The levels of a tree.

    Args:
        tree: to be drafted.
        reads_tokens: of the speculator. If False every node of a depth has the same distribution: one row suffices.
        device: of the speculator.
    """
    levels = []
    # Of the depth above: its nodes, and for each the row that drafted it.
    above, drafted_by = [()], [0]
    for depth in range(1, tree.depth + 1):
        nodes = [path for path in tree.paths if len(path) == depth]
        parent_of = [above.index(path[:-1]) if reads_tokens else 0 for path in nodes]
        parents = list(dict.fromkeys(parent_of))
        rows = [parents.index(parent) for parent in parent_of]
        ranks = [path[-1] for path in nodes]
        tensors = (parents, [drafted_by[parent] for parent in parents], rows, ranks)
        levels.append(TreeLevel(*(torch.tensor(x, device=device) for x in tensors), max(ranks) + 1))
        above, drafted_by = nodes, rows
    return levels


class TreeDrafter(Drafter):
    """Drafts a tree, one batched step per depth.

    Args:
        speculator: of any family that does not run layers of the target.
        tree: to be drafted.
    """

    def __init__(self, speculator: Speculator, tree: DraftTree) -> None:
        super().__init__(speculator)
        self.levels = tree_levels(tree, reads_tokens=speculator.reads_tokens, device=speculator.head(0).device)

    def propose(self, hidden: Tensor, tokens: Tensor, uniforms: None, count: int, length: int) -> Proposal:
        """Draft the nodes of the first `count` levels of the tree; as `SpeculatorDrafter.propose`."""
        state, tokens, drafts = self.begin(hidden, tokens, length), tokens[-1:], []
        for depth, level in enumerate(self.levels[:count]):
            state = DraftState(*(x[level.states] if isinstance(x, Tensor) else x for x in state))
            state = self.speculator.step(state, tokens[level.tokens])
            best = self.speculator.draft_logits(depth, state.output).topk(level.top).indices
            tokens = self.speculator.tokens_of(best[level.rows, level.ranks])
            drafts.append(tokens)
        return Proposal(torch.cat(drafts))
