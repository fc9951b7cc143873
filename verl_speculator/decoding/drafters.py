"""Drafting: from the hidden state before the newest token to the next draft tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_speculator.decoding.options import SamplingPolicy
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


class SpeculatorDrafter:
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
        self.speculator, self.policy, self.sampled = speculator, policy, sampled and not policy.greedy
        self.dtype = speculator.head(0).dtype
        self.read = None if read is None else lambda tokens: read(tokens).to(self.dtype)

    def propose(self, hidden: Tensor, token: Tensor, uniforms: Tensor | None, count: int) -> Proposal:
        """Draft `count` tokens.

        Args:
            hidden: [1, D] the target's hidden state before `token`; unused with `read`.
            token: [1] the newest token; the target has not read it yet.
            uniforms: [count] in [0, 1) to draw with; None if drafts are greedy.
            count: draft length.
        """
        probabilities: list[Tensor] = []

        def sample(logits: Tensor) -> Tensor:
            uniform = uniforms[len(probabilities)].view(1)
            probabilities.append(self.policy.probabilities(logits))
            return draw(probabilities[-1], uniform)

        choose = sample if self.sampled else None
        drafts = self.speculator.draft(hidden.to(self.dtype), token, count, choose=choose, read=self.read)
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


class TreeDrafter:
    """Drafts a tree, one batched step per depth.

    Args:
        speculator: of any family that reads one hidden state.
        tree: to be drafted.
    """

    def __init__(self, speculator: Speculator, tree: DraftTree) -> None:
        self.speculator, weight = speculator, speculator.head(0)
        self.dtype = weight.dtype
        self.levels = tree_levels(tree, reads_tokens=speculator.reads_tokens, device=weight.device)

    def propose(
        self, hidden: Tensor, token: Tensor, uniforms: Tensor | None = None, count: int | None = None
    ) -> Proposal:
        """Draft the nodes of the first `count` levels of the tree, all by default; as `SpeculatorDrafter.propose`."""
        state, tokens, drafts = self.speculator.start(hidden.to(self.dtype)), token, []
        for depth, level in enumerate(self.levels[:count]):
            state = DraftState(*(x[level.states] if isinstance(x, Tensor) else x for x in state))
            state = self.speculator.step(state, tokens[level.tokens])
            best = self.speculator.draft_logits(depth, state.output).topk(level.top).indices
            tokens = self.speculator.tokens_of(best[level.rows, level.ranks])
            drafts.append(tokens)
        return Proposal(torch.cat(drafts))
