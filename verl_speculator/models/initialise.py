"""Starting a speculator's tables and heads from the base's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from verl_speculator.errors import UserError
from verl_speculator.models.base import Slot, Speculator
from verl_speculator.models.layers import OutputHead, TokenEmbedding


def vocabulary_slots(speculator: Speculator) -> Iterator[tuple[str, Slot, bool]]:
    """Checkpoint name and place of every token table and head, and whether it is a table.

    Raises:
        UserError: for one that is not as wide as the base.
    """
    kinds = {name: type(m) for name, m in speculator.named_modules() if isinstance(m, (TokenEmbedding, OutputHead))}
    state = dict(speculator.named_parameters())
    for name, slot in speculator.checkpoint_slots().items():
        kind = kinds.get(slot.parameter.removesuffix(".weight"))
        if kind is None:
            continue
        width = slot.of(state).shape[1]
        if width != speculator.hidden_size:
            setting = "the first of emb_dim" if kind is TokenEmbedding else "the last of inner_dim"
            raise UserError(
                f"model.speculator.init=base: {name} is {width} wide, the base {speculator.hidden_size}; "
                f"expected {setting} to be {speculator.hidden_size}"
            )
        yield name, slot, kind is TokenEmbedding


@torch.no_grad()
def start_from_base(speculator: Speculator, embedding: Tensor, head: Tensor) -> None:
    """Every token table from the base's embedding, every head from its output head, scaled to the spread that
    `reset_parameters` gives: most of a speculator's parameters then know the vocabulary before the first step.

    Args:
        speculator: initialised; its other parameters stay as they are.
        embedding: [V, D] the base's.
        head: [V, D] the base's.

    Raises:
        UserError: where a table or head has another width than the base.
    """
    state = dict(speculator.named_parameters())
    for _, slot, is_table in vocabulary_slots(speculator):
        own, source = slot.of(state), (embedding if is_table else head).float()
        own.copy_(source * (1 / math.sqrt(min(own.shape)) / source.std()))
