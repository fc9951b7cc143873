"""sum_rnn: Snowflake's variant of IBM's MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import (
    OutputHead,
    TokenEmbedding,
    embedding_scale,
    inner_chain,
    scale_hidden,
    scaled_sum,
    widen,
    with_head_names,
)
from verl_speculator.models.speculator import DraftState, Slot, Speculator


class SumRNN(Speculator):
    """The sum of the projected state and the newest token's embedding, after a norm and GELU, is the next state.

        s = GELU(LN_k(P_k s + α·E_k[x_{t+1+k}])),   logits_k = W_k s

    With `tie_weights` all depths share E, LN and W, and all but the first share P.
    """

    method = "sum_rnn"

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        emb, proj, merge, width = config.emb_dims, config.proj_dims, config.emb_dims[-1], config.inner_dims[-1]
        shared = 1 if config.tie_weights else config.n_predict
        inputs = [hidden_size, *[width] * (config.n_predict - 1)][: shared + 1]
        self.emb = nn.ModuleList(widen(TokenEmbedding(vocab_size, emb[0]), emb) for _ in range(shared))
        self.proj = nn.ModuleList(widen(nn.Linear(before, proj[0], bias=False), proj) for before in inputs)
        self.ln = nn.ModuleList(inner_chain(merge, config.inner_dims) for _ in range(shared))
        self.heads = nn.ModuleList(OutputHead(vocab_size, width) for _ in range(shared))
        self.emb_scale = embedding_scale(config.n_predict, merge)

    def _layer(self, modules: nn.ModuleList, depth: int) -> nn.Module:
        """The module of a depth; tied depths share the last one."""
        return modules[min(depth, len(modules) - 1)]

    def start(self, hidden: Tensor) -> DraftState:
        return DraftState(scale_hidden(hidden) if self.config.scale_input else hidden, None, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        projected = self._layer(self.proj, state.depth)(state.output)
        merged = scaled_sum(projected, self._layer(self.emb, state.depth)(token), self.emb_scale)
        return DraftState(F.gelu(self._layer(self.ln, state.depth)(merged)), None, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self._layer(self.heads, depth).weight

    def checkpoint_slots(self) -> dict[str, Slot]:
        return with_head_names(super().checkpoint_slots(), self.n_predict, tied=self.config.tie_weights)
