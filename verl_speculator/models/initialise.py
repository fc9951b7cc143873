"""Starting a speculator from the base: its tables, its heads, and its norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from verl_speculator.config import SpeculatorConfig
from verl_speculator.errors import UserError
from verl_speculator.models.base import Slot, Speculator
from verl_speculator.models.hidden_state import FrozenNorm, block_of, final_norm
from verl_speculator.models.layers import OutputHead, TokenEmbedding
from verl_speculator.models.logits import logit_transform


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
def start_from_base(speculator: Speculator, base: nn.Module) -> None:
    """Every token table from the base's embedding, every head from its output head: most of a speculator's parameters
    then know the vocabulary before the first step.

    They are scaled to the spread that `reset_parameters` gives, unless the family reads states like the base's: then a
    head is the base's own times the scale that the base gives its logits.

    Args:
        speculator: initialised; its other parameters stay as they are.
        base: a Hugging Face causal language model.

    Raises:
        UserError: where a table or head has another width than the base.
    """
    state, logit_scale = dict(speculator.named_parameters()), logit_transform(base.config).scale
    for _, slot, is_table in vocabulary_slots(speculator):
        own, source = slot.of(state), base.get_input_embeddings() if is_table else base.get_output_embeddings()
        weight = source.weight.to(torch.promote_types(source.weight.dtype, torch.float32))
        if speculator.copies_scale:
            scale = 1.0 if is_table else logit_scale
        else:
            scale = 1 / math.sqrt(min(own.shape)) / weight.std()
        own.copy_(weight * scale)


def block_shapes(base: nn.Module, config: SpeculatorConfig) -> dict[str, list[int]]:
    """Shapes of the parameters of the base's block that a speculator trains a copy of, empty if it trains none.

    Raises:
        UserError: where the base has no such block.
    """
    if config.trainable != "head_and_block":
        return {}
    return {name: list(p.shape) for name, p in block_of(base, config.exit_layer).named_parameters()}


def copy_norm(speculator: Speculator, base: nn.Module) -> None:
    """The base's final norm into the speculator's frozen copy, where it has one: however it starts, that is no matter
    of training.

    Raises:
        UserError: if the base ends with something else than an RMS norm.
    """
    for module in speculator.modules():
        if isinstance(module, FrozenNorm):
            module.copy_from(final_norm(base))
