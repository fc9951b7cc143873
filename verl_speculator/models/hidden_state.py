"""Which of the base's states a speculator reads: the one after its final norm, or the one before it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.errors import UserError

POST_NORM, PRE_NORM = "post_norm", "pre_norm"
# What the architectures of transformers call their final norm.
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
TOLERANCE = 1e-2


def final_norm(base: nn.Module) -> nn.Module:
    """The norm whose output the base's head reads.

    Args:
        base: a Hugging Face causal language model.

    Raises:
        UserError: where none is found, or it is no RMS norm.
    """
    setting = f"model.speculator.hidden_state=pre_norm: {type(base).__name__}"
    decoder = base.base_model
    norm = next((getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name)), None)
    if norm is None:
        raise UserError(
            f"{setting} has no final norm that is known here (looked for {', '.join(NORM_NAMES)}); expected post_norm"
        )
    if isinstance(norm, nn.LayerNorm) or not hasattr(norm, "weight"):
        raise UserError(f"{setting} ends with {type(norm).__name__}, which is no RMS norm; expected post_norm")
    return norm


def norm_epsilon(norm: nn.Module) -> float:
    """ε of an RMS norm, under whichever name it keeps it."""
    return float(next(getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)))


class FrozenNorm(nn.Module):
    """A copy of the base's final RMS norm, `w ⊙ x · rsqrt(mean(x²) + ε)`. Saved with the speculator, never trained.

    ε is a tensor too, so that a checkpoint holds all of the norm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps.to(wide.dtype))
        return wide.to(x.dtype) * self.weight.to(x.dtype)

    @torch.no_grad()
    def copy_from(self, norm: nn.Module) -> None:
        """Take over another norm's weight and ε.

        Raises:
            UserError: for a norm that does something else.
        """
        own = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        eps = norm_epsilon(norm)
        # Some architectures keep the weight as a difference from 1: what the norm makes of ones tells.
        weight = norm(torch.ones(1, len(self.weight), **own))[0].double() * (1 + eps) ** 0.5
        self.weight.copy_(weight)
        self.eps.fill_(eps)
        probe = torch.linspace(-3, 3, len(self.weight), **own)[None]
        theirs, mine = norm(probe).float(), self(probe.to(self.weight)).float().to(probe.device)
        if (theirs - mine).abs().max() > TOLERANCE * theirs.abs().max():
            raise UserError(
                f"model.speculator.hidden_state=pre_norm: {type(norm).__name__} is no RMS norm; expected post_norm"
            )


class StateTap:
    """Hands over the states [B, T, D] of a base's forward pass, with their graph, while it is entered.

    Args:
        base: a Hugging Face causal language model.
        kind: `post_norm` or `pre_norm`.

    Raises:
        UserError: for `pre_norm`, where the final norm cannot be found.
    """

    def __init__(self, base: nn.Module, kind: str) -> None:
        self.module, self.kind = (base.base_model if kind == POST_NORM else final_norm(base)), kind
        self._states: Tensor | None = None

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._states = output[0]

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0]

    def __enter__(self) -> StateTap:
        if self.kind == POST_NORM:
            self._hook = self.module.register_forward_hook(self._after)
        else:
            self._hook = self.module.register_forward_pre_hook(self._before)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def take(self) -> Tensor:
        """The states of the last forward pass, once."""
        states, self._states = self._states, None
        return states
