"""Starting a speculator from the base: its tables, its heads, and its norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from verl_speculator.config import SpeculatorConfig
from verl_speculator.errors import UserError
from verl_speculator.models.base import Slot, Speculator
from verl_speculator.models.hidden_state import FrozenNorm, block_of, final_norm
from verl_speculator.models.layers import OutputHead, TokenEmbedding
from verl_speculator.models.logits import logit_transform

INIT, RANDOM = "model.speculator.init=base", "model.speculator.init=random"


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
        UserError: where a table or head has another width than the base, or a head whose bias would be lost is copied.
    """
    state = dict(speculator.named_parameters())
    for _, slot, is_table in vocabulary_slots(speculator):
        own, source = slot.of(state), base.get_input_embeddings() if is_table else base.get_output_embeddings()
        if speculator.copies_scale and not is_table:
            own.copy_(copied_head(base))
            continue
        weight = _widened(source.weight)
        own.copy_(weight * (1.0 if speculator.copies_scale else 1 / math.sqrt(min(own.shape)) / weight.std()))


def copied_head(base: nn.Module, setting: str = INIT, otherwise: str = RANDOM) -> Tensor:
    """[V, D] the LM head of a base model times the scale that it gives its logits, in float32 at least.

    Raises:
        UserError: as `check_copied_head`.
    """
    check_copied_head(base, setting, otherwise)
    return _widened(base.get_output_embeddings().weight.detach()) * logit_transform(base.config).scale


def check_copied_head(base: nn.Module, setting: str = INIT, otherwise: str = RANDOM) -> None:
    """Refuse to copy an LM head that has a bias: a speculator's heads have none, and would give other logits.

    Args:
        base: a Hugging Face causal language model, on the meta device too.
        setting: what asks for the copy.
        otherwise: what to do with such a base.

    Raises:
        UserError: for such a base.
    """
    if base.get_output_embeddings().bias is not None:
        raise UserError(
            f"{setting}: {type(base).__name__}: its LM head has a bias, which a copy of it would lose; "
            f"expected a base model without one, or {otherwise}"
        )


def _widened(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


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
