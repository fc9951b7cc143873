"""Building blocks of the sum_rnn and sum_lstm speculators.

Module and tensor names follow Snowflake's implementation, so that weights move between the two unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import FrozenNorm, block_of, final_norm
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.logits import logit_transform
from verl_speculator.models.speculator import Slot, Speculator
from verl_speculator.utils.errors import UserError

EPS = 1e-6


def rms_normalise(x: Tensor) -> Tensor:
    """`x · rsqrt(mean(x²) + 1e-6)` over the last axis, in float32 where x is a half type."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class RMSNormWithBias(nn.Module):
    """`w ⊙ rms_normalise(x) + b`: an RMS norm with a bias and without centring ("LN" in Snowflake's code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, rms_normalise(x))


class TokenEmbedding(nn.Module):
    """A [V, E] table. Not an `nn.Embedding`: sharding wrappers give each of those a unit of its own, and then its rows
    can be read through its own forward only."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class OutputHead(nn.Module):
    """The [V, E] weight of one head. It has no forward: losses and verification decide how to multiply with it."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))


def widen(first: nn.Module, dims: Sequence[int]) -> nn.Sequential:
    """`first`, which gives width dims[0], and for each further width RMSNormWithBias, GELU, Linear."""
    layers: list[nn.Module] = [first]
    for before, after in pairwise(dims):
        layers += [RMSNormWithBias(before), nn.GELU(), nn.Linear(before, after, bias=False)]
    return nn.Sequential(*layers)


def embedding_chain(vocab_size: int, dims: Sequence[int]) -> nn.Sequential:
    """Token ids to width dims[-1]."""
    return widen(TokenEmbedding(vocab_size, dims[0]), dims)


def projection_chain(width: int, dims: Sequence[int]) -> nn.Sequential:
    """A state of the given width to width dims[-1]."""
    return widen(nn.Linear(width, dims[0], bias=False), dims)


def inner_chain(merge_width: int, dims: Sequence[int]) -> nn.Sequential:
    """From the merge width M to dims[-1]: norm, then GELU, Linear, norm for each further width.

    dims[0] == M is the merged state itself; otherwise a first norm, GELU and Linear lead from M to dims[0].
    """
    if dims[0] != merge_width:
        dims = (merge_width, *dims)
    layers: list[nn.Module] = [RMSNormWithBias(dims[0])]
    for before, after in pairwise(dims):
        layers += [nn.GELU(), nn.Linear(before, after, bias=False), RMSNormWithBias(after)]
    return nn.Sequential(*layers)


class GateChains(nn.Module):
    """The same chain for each of several gates: one product or one lookup gives the first layer of all of them.

    Args:
        first: [..., gates · dims[0]], the first layers side by side.
        dims: widths of the chain of one gate.
        gates: how many.
    """

    def __init__(self, first: nn.Module, dims: Sequence[int], gates: int) -> None:
        super().__init__()
        self.first, self.dims, self.gates = first, tuple(dims), gates
        # What follows the first layer; the placeholder in front keeps the numbers of the layers.
        rest = (widen(nn.Identity(), dims) for _ in range(gates))
        self.rest = nn.ModuleList(rest) if len(dims) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., gates, M] for each gate."""
        y = self.first(x).unflatten(-1, (self.gates, self.dims[0]))
        if self.rest is None:
            return y
        return torch.stack([chain(part) for chain, part in zip(self.rest, y.unbind(-2), strict=True)], -2)

    def slots(self, prefix: str, names: Sequence[str], *, axis: int) -> dict[str, Slot]:
        """Checkpoint names of the gates' chains.

        Args:
            prefix: of this module's parameters.
            names: of each gate's chain. A single layer gets no index behind it.
            axis: along which the first layers stand side by side.
        """
        single, slots = self.rest is None, {}
        for i, name in enumerate(names):
            part = (axis, i * self.dims[0], self.dims[0]) if self.gates > 1 else None
            slots[f"{name}.weight" if single else f"{name}.0.weight"] = Slot(f"{prefix}.first.weight", part)
            for key, _ in [] if single else self.rest[i].named_parameters():
                slots[f"{name}.{key}"] = Slot(f"{prefix}.rest.{i}.{key}")
        return slots


def embedding_scale(n_predict: int, merge_width: int) -> float:
    """α, the weight of the token embedding against the projected state.

    State weight sw = 0.5^(0.5/K), embedding weight ew = sqrt((1 − sw²)·M/2), α = ew/sw (IBM's MLP speculator).
    """
    state_weight = 0.5 ** (0.5 / n_predict)
    return math.sqrt((1 - state_weight**2) * merge_width / 2) / state_weight


def scaled_sum(projected: Tensor, embedded: Tensor, scale: float) -> Tensor:
    """projected + α · embedded, rounded once. Not `torch.add(…, alpha=…)`: torch.compile (torch 2.13) loses the factor
    where it joins the sum to the product before it."""
    return torch.addcmul(projected, embedded, embedded.new_ones(()), value=scale)


def with_head_names(slots: dict[str, Slot], n_predict: int, *, tied: bool) -> dict[str, Slot]:
    """Checkpoint names in which `heads.{k}` is called `head.{k}`, one for each depth even where all share one."""
    named = {key: slot for key, slot in slots.items() if not key.startswith("heads.")}
    return named | {f"head.{k}.weight": Slot(f"heads.{0 if tied else k}.weight") for k in range(n_predict)}


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
        if speculator.keeps_head_scale and not is_table:
            own.copy_(copied_head(base))
            continue
        weight = _widened(source.weight)
        own.copy_(weight * (1.0 if speculator.keeps_head_scale else 1 / math.sqrt(min(own.shape)) / weight.std()))


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
