"""The hidden states of a base model that a speculator reads, and the modules that they come from.

post_norm         after the final norm: the input of the LM head
pre_norm          before the final norm
block_output.3    the output of decoder layer 3
block_input.3     the input of decoder layer 3, with the other arguments of the call
block_inputs.1.3  the inputs of decoder layers 1 and 3, side by side; after the last layer's number the next one is the
                  input of the final norm
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.utils.settings import UserError

POST_NORM, PRE_NORM, BLOCK_OUTPUT, BLOCK_INPUT = "post_norm", "pre_norm", "block_output", "block_input"
BLOCK_INPUTS = "block_inputs"
# Names of the final norm and of the list of decoder layers in transformers' architectures.
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
BLOCK_NAMES = ("layers", "h", "blocks")
# Settings of architectures that pass several states of each token from layer to layer: the number of these states.
STREAMS = ("altup_num_inputs", "hc_mult")
TOLERANCE = 1e-2


class BlockCall(NamedTuple):
    """The arguments of a decoder layer: the hidden state [B, T, D], and positions, mask and others by name."""

    state: Tensor
    arguments: dict[str, Any]


def block_list(decoder: nn.Module, method: str = "early_exit") -> tuple[str, nn.ModuleList]:
    """The decoder layers of a base model's inner model, and the name of their attribute. Raises UserError if there is
    no such list, or its layers do not pass on a single state that a head could read."""
    method = f"model.speculator.method={method}: {type(decoder).__name__}"
    for name in STREAMS:
        if (count := getattr(getattr(decoder, "config", None), name, None) or 1) > 1:
            what = f"passes {count} states of each token between its blocks ({name})"
            raise UserError(f"{method} {what}; expected a base that passes one")
    for name in BLOCK_NAMES:
        if isinstance(blocks := getattr(decoder, name, None), nn.ModuleList):
            return name, blocks
    raise UserError(f"{method} has no list of blocks that is known here (looked for {', '.join(BLOCK_NAMES)})")


def block_of(base: nn.Module, layer: int) -> nn.Module:
    """Decoder layer number `layer`, from 0. Raises UserError if the base model has no such layer."""
    _, blocks = block_list(base.base_model)
    if layer < (count := len(blocks)):
        return blocks[layer]
    where = f"model.speculator.exit_layer={layer}: {type(base).__name__}"
    raise UserError(f"{where} has {count} blocks; expected 0 to {count - 1}")


def layer_or_norm(base: nn.Module, layer: int) -> nn.Module:
    """Decoder layer number `layer`; after the last one, the module behind it: the final norm."""
    _, blocks = block_list(base.base_model, "eagle3")
    return final_norm(base) if layer == len(blocks) else blocks[layer]


def final_norm(base: nn.Module) -> nn.Module:
    """The RMS norm before the LM head of a Hugging Face causal language model. Raises UserError if it has none."""
    setting, decoder = f"a copy of the final norm: {type(base).__name__}", base.base_model
    norm = next((getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name)), None)
    if norm is None:
        raise UserError(f"{setting} has no final norm that is known here (looked for {', '.join(NORM_NAMES)})")
    if isinstance(norm, nn.LayerNorm) or not hasattr(norm, "weight"):
        raise UserError(f"{setting} ends with {type(norm).__name__}; expected an RMS norm")
    return norm


class FrozenNorm(nn.Module):
    """A copy of the base model's final RMS norm, w ⊙ x · rsqrt(mean(x²) + ε); saved with the speculator, not trained.

    ε is a parameter too, so that a checkpoint describes the norm completely. `width` is D, the input's last axis.
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
        """Copy weight and ε of another RMS norm. Raises UserError if the norm does not compute an RMS norm."""
        options = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        eps = float(next(getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)))
        # Some architectures store the weight as a difference from 1: norm(1) = w · rsqrt(1 + ε) in all of them.
        weight = norm(torch.ones(1, len(self.weight), **options))[0].double() * (1 + eps) ** 0.5
        self.weight.copy_(weight)
        self.eps.fill_(eps)
        probe = torch.linspace(-3, 3, len(self.weight), **options)[None]
        expected, actual = norm(probe).float(), self(probe.to(self.weight)).float().to(probe.device)
        if (expected - actual).abs().max() > TOLERANCE * expected.abs().max():
            raise UserError(f"a copy of the final norm: {type(norm).__name__} is no RMS norm")


class HiddenStateHook:
    """Context manager that records hidden states of a base model's forward passes, with their autograd graph.

    `hidden_state_source` is one of the list above, as in `Speculator`. Raises UserError if there is no such module.
    """

    def __init__(self, base: nn.Module, hidden_state_source: str) -> None:
        self.kind, _, layer = hidden_state_source.partition(".")
        if self.kind == POST_NORM:
            # Some architectures, such as OPT, call this part of their inner model and never the inner model itself.
            self.modules = [base.base_model.get_decoder()]
        elif self.kind == PRE_NORM:
            self.modules = [final_norm(base)]
        elif self.kind == BLOCK_INPUTS:
            self.modules = [layer_or_norm(base, int(number)) for number in layer.split(".")]
        else:
            self.modules = [block_of(base, int(layer))]
        self._recorded: dict[nn.Module, Tensor | BlockCall] = {}

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._recorded[module] = output if isinstance(output, Tensor) else output[0]

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        state = inputs[0] if inputs else arguments["hidden_states"]
        others = {name: value for name, value in arguments.items() if name != "hidden_states"}
        self._recorded[module] = BlockCall(state, others) if self.kind == BLOCK_INPUT else state

    def __enter__(self) -> HiddenStateHook:
        if self.kind in (POST_NORM, BLOCK_OUTPUT):
            self._hooks = [module.register_forward_hook(self._after) for module in self.modules]
        else:
            self._hooks = [m.register_forward_pre_hook(self._before, with_kwargs=True) for m in self.modules]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor | BlockCall:
        """Return the state [B, T, D] of the last forward pass and forget it; for `block_input` the layer's call, for
        `block_inputs` the states of all layers, [B, T, A·D]."""
        recorded, self._recorded = [self._recorded[module] for module in self.modules], {}
        return recorded[0] if len(recorded) == 1 else torch.cat(recorded, dim=-1)
