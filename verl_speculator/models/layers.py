"""Token embeddings and heads of the speculators, and their initialisation from a base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import FrozenNorm, block_of, final_norm
from verl_speculator.config.families import BASE, BASE_FROZEN, OWN
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.speculator import Slot, Speculator, logit_transform
from verl_speculator.utils.settings import UserError

EPS = 1e-6
# Initial values of a speculator's `FrozenNorm`, until `copy_norm` replaces them.
NORM_CONSTANTS: Mapping[str, float] = MappingProxyType({"norm.weight": 1.0, "norm.eps": EPS})


class Table(nn.Module):
    """A weight with a row for each token, of the speculator's own or taken from the base model.

    Args:
        rows: V for an embedding, V′ for a head.
        width: of the weight, that of the base model where it is the base model's.
        outside: width on the other side of the projection; a table without one has the same width there.
        source: one of `config.families.TABLES`.

    Attributes:
        weight: [rows, width] a parameter. With `base_frozen` a buffer that no checkpoint holds, empty until
            `Speculator.attach`.
        projection: linear, or None where both widths are the same.
    """

    def __init__(self, rows: int, width: int, outside: int | None = None, source: str = OWN) -> None:
        super().__init__()
        self.source, outside = source, width if outside is None else outside
        if source == BASE_FROZEN:
            # On the CPU wherever the module is built: no tensor of a checkpoint would take the place of a meta tensor.
            self.register_buffer("weight", torch.empty(0, width, device="cpu"), persistent=False)
        else:
            self.weight = nn.Parameter(torch.empty(rows, width))
        inputs, outputs = (width, outside) if self.embeds else (outside, width)
        self.projection = nn.Linear(inputs, outputs, bias=False) if width != outside else None

    embeds: ClassVar[bool]

    def project(self, x: Tensor) -> Tensor:
        """[..., outside] rows of an embedding, or [..., width] what a head is multiplied with."""
        return x if self.projection is None else self.projection(x)


class TokenEmbedding(Table):
    """An embedding. Not an `nn.Embedding`: sharding wrappers make each of those a unit of its own, whose weight is
    complete only inside its own forward."""

    embeds = True

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., outside] of tokens [...]."""
        if not len(self.weight):
            raise RuntimeError(
                "the embedding is the base model's: call speculator.attach(base), or load_speculator(…, base=model)"
            )
        return self.project(F.embedding(tokens, self.weight))


class OutputHead(Table):
    """One head. It has no forward: `project` is part of the step, and losses and verification decide how to multiply
    its result with the weight."""

    embeds = False


def tables_of(speculator: Speculator) -> dict[str, Table]:
    """The embeddings and heads of a speculator, by the names of their weights."""
    return {f"{name}.weight": module for name, module in speculator.named_modules() if isinstance(module, Table)}


def base_table(table: Table, speculator: Speculator, base: nn.Module) -> Tensor:
    """[rows, D] the table of a Hugging Face causal language model that this one is or starts as."""
    if table.embeds:
        return base.get_input_embeddings().weight.detach()
    return drafted_rows(speculator, base.get_output_embeddings().weight.detach())


class SpeculatorWithTables(Speculator):
    """A speculator whose embedding and heads may be the base model's own tables."""

    _attached: list[Any] | None = None  # which tables of the base model were taken

    def attach(self, base: nn.Module, *, tables: bool = True) -> None:
        """Take the tables without a copy where device and dtype are the speculator's and there is no draft vocabulary.
        They are taken again only if the base model's have changed."""
        if not (tables and self.config.frozen_tables):
            return
        sources = [m.weight for m in (base.get_input_embeddings(), base.get_output_embeddings())]
        own = next(self.parameters())
        state = [(w.data_ptr(), None if w.is_inference() else w._version, own.device, own.dtype) for w in sources]
        if state != self._attached:
            for name, table in self.frozen_tables(base).items():
                module = self.get_submodule(name.removesuffix(".weight"))
                module.weight = table.to(device=own.device, dtype=own.dtype)
            self._attached = state

    def frozen_tables(self, base: nn.Module) -> dict[str, Tensor]:
        tables = tables_of(self).items()
        return {name: base_table(table, self, base) for name, table in tables if table.source == BASE_FROZEN}


INIT, RANDOM = "model.speculator.init=base", "model.speculator.init=random"


def vocabulary_slots(speculator: Speculator) -> Iterator[tuple[str, Slot, bool]]:
    """Checkpoint name and slot of every token embedding and head of its own, and whether it is an embedding.

    Raises:
        UserError: for one whose width is not the base model's.
    """
    tables = tables_of(speculator)
    state = dict(speculator.named_parameters())
    for name, slot in speculator.checkpoint_slots().items():
        table = tables.get(slot.parameter)
        if table is None or table.source != OWN:
            continue
        width = slot.of(state).shape[1]
        if width != speculator.hidden_size:
            setting = "the first of emb_dim" if table.embeds else "the last of inner_dim"
            raise UserError(
                f"model.speculator.init=base: {name} is {width} wide, the base {speculator.hidden_size}; "
                f"expected {setting} to be {speculator.hidden_size}"
            )
        yield name, slot, table.embeds


@torch.no_grad()
def copy_base_tables(speculator: Speculator, base: nn.Module) -> None:
    """Copy the base model's tables, as they are, into those that start as the base model's (`embedding` or
    `head`=base)."""
    for table in tables_of(speculator).values():
        if table.source == BASE:
            table.weight.copy_(base_table(table, speculator, base))


@torch.no_grad()
def start_from_base(speculator: Speculator, base: nn.Module) -> None:
    """Copy the base model's token embedding into every token embedding of the speculator's own, and its LM head into
    every such head.

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
