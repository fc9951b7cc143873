"""Building blocks of the sum_rnn and sum_lstm speculators.

Module and tensor names follow Snowflake's implementation, so that weights move between the two unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.models.base import Slot

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
