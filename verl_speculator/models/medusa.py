"""Medusa: one residual head per draft token, all on one hidden state (Cai et al. 2024, arXiv 2401.10774).

Modules are named as in vLLM's implementation, which loads the checkpoint unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import PRE_NORM, FrozenNorm
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import NORM_CONSTANTS, OutputHead
from verl_speculator.models.speculator import DraftState, Speculator


class ResidualBlock(nn.Linear):
    """x + SiLU(A x + a)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(super().forward(x))


class BottleneckBlock(nn.Module):
    """x + B SiLU(A x + a), with A to a narrower width and B back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.silu(self.down(x)))


def head_blocks(width: int, inner: int | None, num_layers: int) -> nn.Sequential:
    """The residual blocks of one head, under the name `layers`."""
    blocks = (ResidualBlock(width) if inner is None else BottleneckBlock(width, inner) for _ in range(num_layers))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*blocks)))


class Medusa(Speculator):
    """Head k reads the hidden state and no token, and predicts the token k + 2 positions ahead.

        z_k = block_k,L(… block_k,1(h)),   block(x) = x + SiLU(A x + a),   logits_k = W_k z_k

    A is initialised to zero and W_k to the LM head, so every untrained head repeats the base model's next token.
    """

    method = "medusa"
    reads_tokens: ClassVar[bool] = False
    keeps_head_scale: ClassVar[bool] = True

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        self.norm = FrozenNorm(hidden_size) if config.hidden_state == PRE_NORM else None
        self.blocks = nn.ModuleList(
            head_blocks(hidden_size, config.inner_dim, config.num_layers) for _ in range(config.n_predict)
        )
        heads = config.n_predict if config.head == "copy" else 1
        self.lm_heads = nn.ModuleList(OutputHead(self.head_size, hidden_size) for _ in range(heads))

    @property
    def hidden_state_source(self) -> str:
        return self.config.hidden_state

    def start(self, hidden: Tensor) -> DraftState:
        hidden = hidden if self.norm is None else self.norm(hidden)
        return DraftState(hidden, hidden, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        return DraftState(self.blocks[state.depth](state.cell), state.cell, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self.lm_heads[min(depth, len(self.lm_heads) - 1)].weight

    def frozen(self) -> frozenset[str]:
        prefixes = ("norm.", "lm_heads.") if self.config.head == "frozen_shared" else ("norm.",)
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(prefixes))

    def constants(self) -> dict[str, float]:
        """Every block starts as the identity: all of it is 0 but the projection into a bottleneck."""
        names = [name for name, _ in self.named_parameters() if name.startswith("blocks.")]
        zeros = {name: 0.0 for name in names if not name.endswith("down.weight")}
        return zeros if self.norm is None else zeros | NORM_CONSTANTS
