"""Which of the base's states a speculator reads, and where in the base they are.

post_norm         after the final norm: what the base's own head reads
pre_norm          before it
block_output.3    behind block 3
block_input.3     in front of it, with all else that the block was called with
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.utils.errors import UserError

POST_NORM, PRE_NORM, BLOCK_OUTPUT, BLOCK_INPUT = "post_norm", "pre_norm", "block_output", "block_input"
# What the architectures of transformers call their final norm.
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
BLOCK_NAMES = ("layers", "h", "blocks")
# Settings of architectures whose layers hand on several states of each token at once: how many.
STREAMS = ("altup_num_inputs", "hc_mult")
TOLERANCE = 1e-2


class BlockCall(NamedTuple):
    """What a block of the base was called with: the state [B, T, D], and positions, mask and the like."""

    state: Tensor
    arguments: dict[str, Any]


def block_list(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks of a base's inner model, and the name under which it keeps them.

    Raises:
        UserError: where none are found, or what they hand on is no single state that a head could read.
    """
    for name in STREAMS:
        if (count := getattr(getattr(decoder, "config", None), name, None) or 1) > 1:
            raise UserError(
                f"model.speculator.method=early_exit: {type(decoder).__name__} hands on {count} states of each token "
                f"between its blocks ({name}); expected a base that hands on one"
            )
    for name in BLOCK_NAMES:
        if isinstance(blocks := getattr(decoder, name, None), nn.ModuleList):
            return name, blocks
    raise UserError(
        f"model.speculator.method=early_exit: {type(decoder).__name__} has no list of blocks that is known here "
        f"(looked for {', '.join(BLOCK_NAMES)})"
    )


def block_of(base: nn.Module, layer: int) -> nn.Module:
    """One block of a base.

    Raises:
        UserError: where there is none.
    """
    _, blocks = block_list(base.base_model)
    if layer >= len(blocks):
        raise UserError(
            f"model.speculator.exit_layer={layer}: {type(base).__name__} has {len(blocks)} blocks; "
            f"expected 0 to {len(blocks) - 1}"
        )
    return blocks[layer]


def final_norm(base: nn.Module) -> nn.Module:
    """The norm whose output the base's head reads.

    Args:
        base: a Hugging Face causal language model.

    Raises:
        UserError: where none is found, or it is no RMS norm.
    """
    setting = f"a copy of the final norm: {type(base).__name__}"
    decoder = base.base_model
    norm = next((getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name)), None)
    if norm is None:
        raise UserError(f"{setting} has no final norm that is known here (looked for {', '.join(NORM_NAMES)})")
    if isinstance(norm, nn.LayerNorm) or not hasattr(norm, "weight"):
        raise UserError(f"{setting} ends with {type(norm).__name__}; expected an RMS norm")
    return norm


def last_module(base: nn.Module) -> nn.Module:
    """The module whose output the base's head reads, however the base is called: some call a part of their inner model
    and never the inner model itself (OPT).

    Args:
        base: a Hugging Face causal language model.
    """
    return base.base_model.get_decoder()


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
            raise UserError(f"a copy of the final norm: {type(norm).__name__} is no RMS norm")


class HiddenStateHook:
    """Hands over the states of a base's forward pass, with their graph, while it is entered.

    Args:
        base: a Hugging Face causal language model.
        reads: which ones, `Speculator.hidden_state_source`.

    Raises:
        UserError: where the place cannot be found in the base.
    """

    def __init__(self, base: nn.Module, hidden_state_source: str) -> None:
        kind, _, layer = hidden_state_source.partition(".")
        places = {POST_NORM: lambda: last_module(base), PRE_NORM: lambda: final_norm(base)}
        self.module = places[kind]() if kind in places else block_of(base, int(layer))
        self.kind = kind
        self._taken: Tensor | BlockCall | None = None

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._taken = output if isinstance(output, Tensor) else output[0]

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        state = inputs[0] if inputs else arguments["hidden_states"]
        others = {name: value for name, value in arguments.items() if name != "hidden_states"}
        self._taken = BlockCall(state, others) if self.kind == BLOCK_INPUT else state

    def __enter__(self) -> HiddenStateHook:
        if self.kind in (POST_NORM, BLOCK_OUTPUT):
            self._hook = self.module.register_forward_hook(self._after)
        else:
            self._hook = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def take(self) -> Tensor | BlockCall:
        """The states [B, T, D] of the last forward pass, once; for `block_input` all of the block's call."""
        taken, self._taken = self._taken, None
        return taken
