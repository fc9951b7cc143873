"""sum_lstm: Snowflake's Arctic LSTM speculator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.config import SpeculatorConfig
from verl_speculator.models.base import DraftState, Speculator
from verl_speculator.models.layers import (
    OutputHead,
    RMSNormWithBias,
    embedding_chain,
    embedding_scale,
    inner_chain,
    projection_chain,
    rms_normalise,
    unwrap_single,
    with_head_names,
)

GATES = ("forget", "input", "output", "cell")


class SumLSTM(Speculator):
    """An LSTM whose gates are sums of the projected state and the newest token's embedding; all depths share weights.

        f, i, o = σ(P_g s + α·E_g[x])              for forget, input, output
        c̃ = GELU(LN_cell(P_cell s + α·E_cell[x]))
        c = c ⊙ f + c̃ ⊙ i
        s = GELU(LN_state(c)) ⊙ o,                 logits_k = W s

    With several widths in `inner_dim` a chain of norms and layers follows s (absent for a single one equal to M).
    """

    method = "sum_lstm"

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        merge, width = config.emb_dims[-1], config.inner_dims[-1]
        for gate in GATES:
            first = projection_chain(hidden_size, config.proj_dims)
            chains = [first] + [projection_chain(width, config.proj_dims) for _ in range(min(config.n_predict - 1, 1))]
            setattr(self, f"{gate}_proj", nn.ModuleList(unwrap_single(chain) for chain in chains))
        for gate in GATES[:1] if config.tie_lstm_embs else GATES:
            chain = embedding_chain(vocab_size, config.emb_dims)
            setattr(self, f"{gate}_emb", nn.ModuleList([unwrap_single(chain)]))
        self.cell_ln = nn.ModuleList([RMSNormWithBias(merge)])
        self.state_ln = nn.ModuleList([RMSNormWithBias(merge)])
        has_chain = config.inner_dims != (merge,)
        self.ln = nn.ModuleList([inner_chain(merge, config.inner_dims)]) if has_chain else None
        self.heads = nn.ModuleList([OutputHead(vocab_size, width)])
        self.emb_scale = embedding_scale(config.n_predict, merge)
        self.merge_width = merge

    def start(self, hidden: Tensor) -> DraftState:
        cell = hidden.new_zeros(*hidden.shape[:-1], self.merge_width)
        if self.config.scale_input:
            hidden = rms_normalise(hidden) / math.sqrt(2)
        return DraftState(hidden, cell, 0)

    def _gates(self, state: DraftState, token: Tensor) -> list[Tensor]:
        """P_g s + α·E_g[x] for each of GATES, [T, M] each."""
        later = min(state.depth, 1)
        if self.config.tie_lstm_embs:
            embedded = [self.forget_emb[0](token)] * len(GATES)
        else:
            embedded = [getattr(self, f"{gate}_emb")[0](token) for gate in GATES]
        return [
            getattr(self, f"{gate}_proj")[later](state.output) + self.emb_scale * emb
            for gate, emb in zip(GATES, embedded, strict=True)
        ]

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        forget, admit, release, candidate = self._gates(state, token)
        cell = state.cell * torch.sigmoid(forget) + F.gelu(self.cell_ln[0](candidate)) * torch.sigmoid(admit)
        output = F.gelu(self.state_ln[0](cell)) * torch.sigmoid(release)
        return DraftState(output if self.ln is None else self.ln[0](output), cell, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self.heads[0].weight

    def checkpoint_keys(self) -> dict[str, str]:
        keys = with_head_names(super().checkpoint_keys(), self.n_predict, tied=True)
        if self.config.tie_lstm_embs:
            shared = [(key, name) for key, name in keys.items() if name.startswith("forget_emb.")]
            keys |= {key.replace("forget", gate, 1): name for gate in GATES[1:] for key, name in shared}
        return keys
