"""sum_rnn: Snowflake's variant of IBM's MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import (
    OutputHead,
    embedding_chain,
    embedding_scale,
    inner_chain,
    projection_chain,
    rms_normalise,
    scaled_sum,
    with_head_names,
)
from verl_speculator.models.speculator import DraftState, Slot, Speculator


class SumRNN(Speculator):
    """The state is projected, the newest token's embedding is added, and a norm and GELU give the next state.

        s = GELU(LN_k(P_k s + α·E_k[x_{t+1+k}])),   logits_k = W_k s

    With `tie_weights` the depths share E, LN and W, and P from the second on.
    """

    method = "sum_rnn"

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        merge, width = config.emb_dims[-1], config.inner_dims[-1]
        shared = 1 if config.tie_weights else config.n_predict
        projections = min(config.n_predict, 2) if config.tie_weights else config.n_predict
        self.emb = nn.ModuleList(embedding_chain(vocab_size, config.emb_dims) for _ in range(shared))
        self.proj = nn.ModuleList(
            projection_chain(width if k else hidden_size, config.proj_dims) for k in range(projections)
        )
        self.ln = nn.ModuleList(inner_chain(merge, config.inner_dims) for _ in range(shared))
        self.heads = nn.ModuleList(OutputHead(vocab_size, width) for _ in range(shared))
        self.emb_scale = embedding_scale(config.n_predict, merge)

    def _layer(self, modules: nn.ModuleList, depth: int) -> nn.Module:
        """The depth's own module, or the last of those that tied depths share."""
        return modules[min(depth, len(modules) - 1)]

    def start(self, hidden: Tensor) -> DraftState:
        if self.config.scale_input:
            hidden = rms_normalise(hidden) / math.sqrt(2)
        return DraftState(hidden, None, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        projected = self._layer(self.proj, state.depth)(state.output)
        merged = scaled_sum(projected, self._layer(self.emb, state.depth)(token), self.emb_scale)
        return DraftState(F.gelu(self._layer(self.ln, state.depth)(merged)), None, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self._layer(self.heads, depth).weight

    def checkpoint_slots(self) -> dict[str, Slot]:
        return with_head_names(super().checkpoint_slots(), self.n_predict, tied=self.config.tie_weights)
