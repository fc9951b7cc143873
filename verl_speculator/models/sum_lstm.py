"""sum_lstm: Snowflake's Arctic LSTM speculator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import (
    GateChains,
    OutputHead,
    RMSNormWithBias,
    TokenEmbedding,
    embedding_scale,
    inner_chain,
    scale_hidden,
    scaled_sum,
    with_head_names,
)
from verl_speculator.models.speculator import DraftState, Slot, Speculator

GATES = ("forget", "input", "output", "cell")


class SumLSTM(Speculator):
    """An LSTM whose gates are sums of the projected state and the newest token's embedding; all depths share weights.

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
        self.emb = GateChains(TokenEmbedding(vocab_size, tables * config.emb_dims[0]), config.emb_dims, tables)
        self.cell_ln = nn.ModuleList([RMSNormWithBias(merge)])
        self.state_ln = nn.ModuleList([RMSNormWithBias(merge)])
        has_chain = config.inner_dims != (merge,)
        self.ln = nn.ModuleList([inner_chain(merge, config.inner_dims)]) if has_chain else None
        self.heads = nn.ModuleList([OutputHead(vocab_size, width)])
        self.emb_scale = embedding_scale(config.n_predict, merge)
        self.merge_width = merge

    def start(self, hidden: Tensor) -> DraftState:
        cell = hidden.new_zeros(*hidden.shape[:-1], self.merge_width)
        return DraftState(scale_hidden(hidden) if self.config.scale_input else hidden, cell, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        projected, embedded = self.proj[min(state.depth, 1)](state.output), self.emb(token)
        forget, admit, release, candidate = scaled_sum(projected, embedded, self.emb_scale).unbind(-2)
        cell = state.cell * torch.sigmoid(forget) + F.gelu(self.cell_ln[0](candidate)) * torch.sigmoid(admit)
        output = F.gelu(self.state_ln[0](cell)) * torch.sigmoid(release)
        return DraftState(output if self.ln is None else self.ln[0](output), cell, state.depth + 1)

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
