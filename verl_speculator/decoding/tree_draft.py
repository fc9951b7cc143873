"""Drafting a tree: one batched step of the speculator for each of its levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.decoding.tree import DraftTree
from verl_speculator.models import DraftState, Speculator


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
