"""sum_rnn and sum_lstm: Snowflake's speculators, which sum a projected state and the embedding of the newest token.

Module and tensor names follow Snowflake's implementation, so that weights can be exchanged unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.config.families import OWN
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import EPS, OutputHead, SpeculatorWithTables, TokenEmbedding
from verl_speculator.models.speculator import DraftState, Slot


def rms_normalise(x: Tensor) -> Tensor:
    """`x · rsqrt(mean(x²) + 1e-6)` over the last axis, in float32 for half types."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class RMSNormWithBias(nn.Module):
    """`w ⊙ rms_normalise(x) + b`: an RMS norm with a bias and without centring ("LN" in Snowflake's code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, rms_normalise(x))


def widen(first: nn.Module, dims: Sequence[int]) -> nn.Sequential:
    """`first`, whose output has width dims[0], then RMSNormWithBias, GELU, Linear for each further width."""
    layers: list[nn.Module] = [first]
    for before, after in pairwise(dims):
        layers += [RMSNormWithBias(before), nn.GELU(), nn.Linear(before, after, bias=False)]
    return nn.Sequential(*layers)


def inner_chain(merge_width: int, dims: Sequence[int]) -> nn.Sequential:
    """From the merge width M to dims[-1]: a norm, then GELU, Linear, norm for each further width.

    If dims[0] != M, a norm, GELU and Linear from M to dims[0] come first.
    """
    if dims[0] != merge_width:
        dims = (merge_width, *dims)
    return nn.Sequential(*widen(nn.Identity(), dims)[1:], RMSNormWithBias(dims[-1]))


class GateChains(nn.Module):
    """One `widen` chain per gate; the first layers of all gates are one matrix product or one lookup.

    Args:
        first: output [..., gates · dims[0]], the first layers side by side.
        dims: widths of the chain of one gate.
        gates: number of gates.
    """

    def __init__(self, first: nn.Module, dims: Sequence[int], gates: int) -> None:
        super().__init__()
        self.first, self.dims, self.gates = first, tuple(dims), gates
        # The layers after the first; Identity stands for the first, so that the numbers of the others do not change.
        rest = (widen(nn.Identity(), dims) for _ in range(gates))
        self.rest = nn.ModuleList(rest) if len(dims) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., gates, M]."""
        y = self.first(x).unflatten(-1, (self.gates, self.dims[0]))
        if self.rest is None:
            return y
        return torch.stack([chain(part) for chain, part in zip(self.rest, y.unbind(-2), strict=True)], -2)

    def slots(self, prefix: str, names: Sequence[str], *, axis: int) -> dict[str, Slot]:
        """Checkpoint names of the gates' tensors.

        Args:
            prefix: of this module's parameters.
            names: of each gate's chain; a chain of one layer has no layer number in its names.
            axis: along which the first layers of the gates are concatenated.
        """
        single, slots = self.rest is None, {}
        for i, name in enumerate(names):
            part = (axis, i * self.dims[0], self.dims[0]) if self.gates > 1 else None
            for (
                key,
                _,
            ) in self.first.named_parameters():  # one, or two where a projection follows the base model's table
                slots[f"{name}.{key}" if single else f"{name}.0.{key}"] = Slot(f"{prefix}.first.{key}", part)
            for key, _ in [] if single else self.rest[i].named_parameters():
                slots[f"{name}.{key}"] = Slot(f"{prefix}.rest.{i}.{key}")
        return slots


def embedding_scale(n_predict: int, merge_width: int) -> float:
    """α, the weight of the token embedding relative to the projected state (IBM's MLP speculator).

    State weight sw = 0.5^(0.5/K), embedding weight ew = sqrt((1 − sw²)·M/2), α = ew/sw.
    """
    state_weight = 0.5 ** (0.5 / n_predict)
    return math.sqrt((1 - state_weight**2) * merge_width / 2) / state_weight


def scale_hidden(hidden: Tensor) -> Tensor:
    """The hidden state as `scale_input` feeds it: RMS-normalised, over √2."""
    return rms_normalise(hidden) / math.sqrt(2)


def scaled_sum(projected: Tensor, embedded: Tensor, scale: float) -> Tensor:
    """projected + α · embedded, rounded once. Not `torch.add(…, alpha=…)`: torch.compile (torch 2.13) drops the factor
    when it fuses the sum with the matrix product before it."""
    return torch.addcmul(projected, embedded, embedded.new_ones(()), value=scale)


def with_head_names(slots: dict[str, Slot], n_predict: int, *, tied: bool) -> dict[str, Slot]:
    """Rename `heads.{k}` to the checkpoint's `head.{k}`, one name per depth even if all depths share a head."""
    named = {key: slot for key, slot in slots.items() if not key.startswith("heads.")}
    for k in range(n_predict):
        prefix = f"heads.{0 if tied else k}."
        keys = (key.removeprefix(prefix) for key in slots if key.startswith(prefix))
        named |= {f"head.{k}.{key}": Slot(prefix + key) for key in keys}
    return named


class RecurrentSpeculator(SpeculatorWithTables):
    """What sum_rnn and sum_lstm share: tables of their own or of the base model, with projections."""

    def _embedding(self, width: int) -> TokenEmbedding:
        """The token embedding, whose output has `width`."""
        source = self.config.embedding
        return TokenEmbedding(self.vocab_size, width if source == OWN else self.hidden_size, width, source)

    def _head(self, width: int) -> OutputHead:
        """A head that reads states of `width`."""
        source = self.config.head
        return OutputHead(self.head_size, width if source == OWN else self.hidden_size, width, source)

    def _after(self, state: DraftState, output: Tensor, cell: Tensor | None, head: OutputHead) -> DraftState:
        """The state after a step that computed `output`, which the next step reads; the head reads its projection."""
        if head.projection is None:
            return DraftState(output, cell, state.depth + 1)
        return DraftState(head.project(output), cell, state.depth + 1, output)


class SumRNN(RecurrentSpeculator):
    """Snowflake's variant of IBM's MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124).

    The sum of the projected state and the newest token's embedding, after a norm and GELU, is the next state.

        s = GELU(LN_k(P_k s + α·E_k[x_{t+1+k}])),   logits_k = W_k s

    With `tie_weights` all depths share E, LN and W, and all but the first share P.
    """

    method = "sum_rnn"

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        emb, proj, merge, width = config.emb_dims, config.proj_dims, config.emb_dims[-1], config.inner_dims[-1]
        shared = 1 if config.tie_weights else config.n_predict
        inputs = [hidden_size, *[width] * (config.n_predict - 1)][: shared + 1]
        self.emb = nn.ModuleList(widen(self._embedding(emb[0]), emb) for _ in range(shared))
        self.proj = nn.ModuleList(widen(nn.Linear(before, proj[0], bias=False), proj) for before in inputs)
        self.ln = nn.ModuleList(inner_chain(merge, config.inner_dims) for _ in range(shared))
        self.heads = nn.ModuleList(self._head(width) for _ in range(shared))
        self.emb_scale = embedding_scale(config.n_predict, merge)

    def _layer(self, modules: nn.ModuleList, depth: int) -> nn.Module:
        """The module of a depth; tied depths share the last one."""
        return modules[min(depth, len(modules) - 1)]

    def start(self, hidden: Tensor) -> DraftState:
        return DraftState(scale_hidden(hidden) if self.config.scale_input else hidden, None, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        projected = self._layer(self.proj, state.depth)(state.carried)
        merged = scaled_sum(projected, self._layer(self.emb, state.depth)(token), self.emb_scale)
        output = F.gelu(self._layer(self.ln, state.depth)(merged))
        return self._after(state, output, None, self._layer(self.heads, state.depth))

    def head(self, depth: int) -> Tensor:
        return self._layer(self.heads, depth).weight

    def checkpoint_slots(self) -> dict[str, Slot]:
        return with_head_names(super().checkpoint_slots(), self.n_predict, tied=self.config.tie_weights)


GATES = ("forget", "input", "output", "cell")


class SumLSTM(RecurrentSpeculator):
    """Snowflake's Arctic LSTM speculator.

    An LSTM whose gates are sums of the projected state and the newest token's embedding; all depths share weights.

        f, i, o = σ(P_g s + α·E_g[x])              for forget, input, output
        c̃ = GELU(LN_cell(P_cell s + α·E_cell[x]))
        c = c ⊙ f + c̃ ⊙ i
        s = GELU(LN_state(c)) ⊙ o,                 logits_k = W s

    Unless `inner_dim` is the single width M, a chain of norms and linear layers follows s.
    """

    method = "sum_lstm"

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        merge, width = config.emb_dims[-1], config.inner_dims[-1]
        gates, first = len(GATES), config.proj_dims[0]
        self.proj = nn.ModuleList(
            GateChains(nn.Linear(before, gates * first, bias=False), config.proj_dims, gates)
            for before in [hidden_size, width][: config.n_predict]
        )
        tables = 1 if config.tie_lstm_embs else gates
        self.emb = GateChains(self._embedding(tables * config.emb_dims[0]), config.emb_dims, tables)
        self.cell_ln = nn.ModuleList([RMSNormWithBias(merge)])
        self.state_ln = nn.ModuleList([RMSNormWithBias(merge)])
        has_chain = config.inner_dims != (merge,)
        self.ln = nn.ModuleList([inner_chain(merge, config.inner_dims)]) if has_chain else None
        self.heads = nn.ModuleList([self._head(width)])
        self.emb_scale = embedding_scale(config.n_predict, merge)
        self.merge_width = merge

    def start(self, hidden: Tensor) -> DraftState:
        cell = hidden.new_zeros(*hidden.shape[:-1], self.merge_width)
        return DraftState(scale_hidden(hidden) if self.config.scale_input else hidden, cell, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        projected, embedded = self.proj[min(state.depth, 1)](state.carried), self.emb(token)
        forget, admit, release, candidate = scaled_sum(projected, embedded, self.emb_scale).unbind(-2)
        cell = state.cell * torch.sigmoid(forget) + F.gelu(self.cell_ln[0](candidate)) * torch.sigmoid(admit)
        output = F.gelu(self.state_ln[0](cell)) * torch.sigmoid(release)
        output = output if self.ln is None else self.ln[0](output)
        return self._after(state, output, cell, self.heads[0])

    def head(self, depth: int) -> Tensor:
        return self.heads[0].weight

    def checkpoint_slots(self) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for i, chains in enumerate(self.proj):
            slots |= chains.slots(f"proj.{i}", [f"{gate}_proj.{i}" for gate in GATES], axis=0)
        slots |= self.emb.slots("emb", [f"{gate}_emb.0" for gate in GATES[: self.emb.gates]], axis=1)
        slots |= {
            key: slot for key, slot in super().checkpoint_slots().items() if not key.startswith(("proj.", "emb."))
        }
        if self.config.tie_lstm_embs:
            tied = [(key, slot) for key, slot in slots.items() if key.startswith("forget_emb.")]
            slots |= {key.replace("forget", gate, 1): slot for gate in GATES[1:] for key, slot in tied}
        return with_head_names(slots, self.n_predict, tied=True)
