"""The attention mask and positions with which a target model reads a draft tree in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.utils.errors import UserError

# These take a mask as it is given to them. The flash kernels know causal attention alone.
IMPLEMENTATIONS = ("eager", "sdpa")
FULL, SLIDING = "full_attention", "sliding_attention"


def windows(base: nn.Module) -> dict[str, int | None]:
    """For each kind of a base's attention layers: how many positions its window spans, None for all.

    Raises:
        UserError: for a base whose layers could not be told to read a tree.
    """
    config, name = base.config.get_text_config(), f"base={base.name_or_path} ({type(base).__name__})"
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"draft_tree: {name} attends by {config._attn_implementation}, which takes no mask of a tree's; "
            f"expected attn_implementation={' or '.join(IMPLEMENTATIONS)}"
        )
    # Older code adds a causal mask or a bias of its own, by the place in the cache.
    if not base._supports_attention_backend or "position_ids" not in inspect.signature(base.forward).parameters:
        raise UserError(f"draft_tree: {name} takes no mask and positions from outside; expected a base that does")
    window = getattr(config, "sliding_window", None)
    # Without a list of kinds, all layers have the window that the configuration names (transformers' own rule).
    kinds = set(getattr(config, "layer_types", None) or [SLIDING if window else FULL])
    if unknown := sorted(kinds - {FULL, SLIDING}):
        raise UserError(f"draft_tree: {name} has layers of {unknown[0]}; expected {FULL} or {SLIDING} alone")
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


class TreeAttention:
    """The mask and the positions of a tree's nodes behind a text of any length.

    Shapes: N + 1 nodes with the root, L tokens in the cache.

    Args:
        base: that will read it.
        parents: of the nodes 1 … N, as `DraftTree.parents`.

    Raises:
        UserError: for a base that cannot read a tree.
    """

    def __init__(self, base: nn.Module, parents: Sequence[int]) -> None:
        self.windows = windows(base)
        self.boolean = base.config.get_text_config()._attn_implementation == "sdpa"
        self.dtype = base.dtype
        ancestors = torch.eye(len(parents) + 1, dtype=torch.bool)
        for node, parent in enumerate(parents, 1):
            ancestors[node] |= ancestors[parent]
        self.ancestors = ancestors.to(base.device)
        self.depths = self.ancestors.sum(-1) - 1

    def arguments(self, length: int) -> dict[str, Any]:
        """`attention_mask` and `position_ids` of the base's forward pass, with `length` tokens in the cache.

        The mask is [1, 1, N+1, L+N+1], or one such for each kind of layer where a base has several.
        """
        positions = length + self.depths
        seen = torch.cat([self.ancestors.new_ones(len(positions), length), self.ancestors], dim=1)
        keys = torch.cat([torch.arange(length, device=positions.device), positions])
        masks = {}
        for kind, window in self.windows.items():
            near = seen if window is None else seen & (keys > positions[:, None] - window)
            masks[kind] = self._as_taken(near)[None, None]
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"attention_mask": mask, "position_ids": positions[None]}

    def _as_taken(self, seen: Tensor) -> Tensor:
        """True where attention goes, or what is added to its scores."""
        if self.boolean:
            return seen
        zero = torch.zeros((), dtype=self.dtype, device=seen.device)
        return torch.where(seen, zero, torch.finfo(self.dtype).min)
