"""Token embeddings and heads of the speculators, and their initialisation from a base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import FrozenNorm, block_of, final_norm
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.speculator import Slot, Speculator, logit_transform
from verl_speculator.utils.settings import UserError

EPS = 1e-6
# Initial values of a speculator's `FrozenNorm`, until `copy_norm` replaces them.
NORM_CONSTANTS: Mapping[str, float] = MappingProxyType({"norm.weight": 1.0, "norm.eps": EPS})


class TokenEmbedding(nn.Module):
    """A [V, E] embedding. Not an `nn.Embedding`: sharding wrappers make each of those a unit of its own, whose weight
    is complete only inside its own forward."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class OutputHead(nn.Module):
    """The [V′, E] weight of one head. It has no forward: losses and verification decide how to multiply with it."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))


INIT, RANDOM = "model.speculator.init=base", "model.speculator.init=random"


def vocabulary_slots(speculator: Speculator) -> Iterator[tuple[str, Slot, bool]]:
    """Checkpoint name and slot of every token embedding and head, and whether it is an embedding.

    Raises:
        UserError: for one whose width is not the base model's.
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
    """Copy the base model's token embedding into every token embedding, and its LM head into every head.

    Both are scaled to the standard deviation of `reset_parameters`. With `keeps_head_scale` they are not, and a head
    is the LM head times the base model's logit scale.

    Args:
        speculator: initialised; its other parameters do not change.
        base: a Hugging Face causal language model.

    Raises:
        UserError: if a width differs from the base model's, or the LM head has a bias that a copied head would lose.
    """
    state = dict(speculator.named_parameters())
    for _, slot, is_embedding in vocabulary_slots(speculator):
        target = slot.of(state)
        if speculator.keeps_head_scale:
            target.copy_(drafted_rows(speculator, copied_head(base)))
            continue
        weight = _in_float32((base.get_input_embeddings() if is_embedding else base.get_output_embeddings()).weight)
        scale = 1 / math.sqrt(min(weight.shape)) / weight.std()
        target.copy_((weight if is_embedding else drafted_rows(speculator, weight)) * scale)


def drafted_rows(speculator: Speculator, weight: Tensor) -> Tensor:
    """[V′, …] the rows of a [V, …] weight that stand for the tokens of the draft vocabulary."""
    return weight if speculator.draft_tokens is None else weight[speculator.draft_tokens]


def copied_head(base: nn.Module, setting: str = INIT, otherwise: str = RANDOM) -> Tensor:
    """[V, D] the LM head of a base model times its logit scale, in float32 at least.

    Raises:
        UserError: as `check_copied_head`.
    """
    check_copied_head(base, setting, otherwise)
    return _in_float32(base.get_output_embeddings().weight.detach()) * logit_transform(base.config).scale


def check_copied_head(base: nn.Module, setting: str = INIT, otherwise: str = RANDOM) -> None:
    """Refuse to copy an LM head with a bias: a speculator's heads have none, so their logits would differ.

    Args:
        base: a Hugging Face causal language model, on any device, meta too.
        setting: the setting that asks for the copy, for the error message.
        otherwise: what the message recommends for such a base model.

    Raises:
        UserError: for such a base model.
    """
    if base.get_output_embeddings().bias is not None:
        raise UserError(
            f"{setting}: {type(base).__name__}: its LM head has a bias, which a copy of it would lose; "
            f"expected a base model without one, or {otherwise}"
        )


def _in_float32(weight: Tensor) -> Tensor:
    """The weight in float32, or in float64 if it is."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def block_shapes(base: nn.Module, config: SpeculatorConfig) -> dict[str, list[int]]:
    """Parameter shapes of the decoder layer that an early exit trains a copy of; empty if it trains none.

    Raises:
        UserError: if the base model has no such layer.
    """
    if config.trainable != "head_and_block":
        return {}
    return {name: list(p.shape) for name, p in block_of(base, config.exit_layer).named_parameters()}


def copy_norm(speculator: Speculator, base: nn.Module) -> None:
    """Copy the base model's final norm into the speculator's frozen norm, if it has one.

    Raises:
        UserError: if the base model's final norm is no RMS norm.
    """
    for module in speculator.modules():
        if isinstance(module, FrozenNorm):
            module.copy_from(final_norm(base))
