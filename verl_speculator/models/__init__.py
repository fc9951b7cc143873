"""The speculator families and `build_speculator`. Their registry is `verl_speculator.config.families`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name

import torch

from verl_speculator.config.families import FAMILIES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.speculator import DraftState, Slot, Speculator

__all__ = ["DraftState", "Slot", "Speculator", "build_speculator", "family_class"]


def family_class(method: str) -> type[Speculator]:
    """The class that implements `method`, a key of `FAMILIES`."""
    return resolve_name(FAMILIES[method].target)


def build_speculator(
    config: SpeculatorConfig,
    *,
    hidden_size: int,
    vocab_size: int,
    draft_tokens: Sequence[int] | torch.Tensor | None = None,
    block_shapes: Mapping[str, Sequence[int]] | None = None,
    logit_cap: float | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Speculator:
    """Build a speculator with freshly initialised parameters.

    Args:
        config: family and widths.
        hidden_size: width D of the base model's hidden states.
        vocab_size: V, the number of rows of the base model's LM head.
        draft_tokens: the draft vocabulary, `config.draft_vocab_size` ascending token ids. Without it all ids are 0,
            which is enough for the device "meta" or to load a checkpoint.
        block_shapes: parameter shapes of the decoder layer that an early exit trains a copy of, by name.
        logit_cap: soft cap of the base model's logits; ignored by families without `keeps_head_scale`.
        seed: of the initialisation; None draws from torch's global generator.
        device: of the parameters; `"meta"` skips the initialisation.
        dtype: of the parameters, float32 by default.

    Raises:
        ValueError: if an early exit trains a copy of a decoder layer and `block_shapes` is missing, or `draft_tokens`
            are not as the configuration says.
    """
    shapes = {"block_shapes": block_shapes} if block_shapes else {}
    with torch.device("meta"):
        speculator = family_class(config.method)(config, hidden_size=hidden_size, vocab_size=vocab_size, **shapes)
    speculator.logit_cap = logit_cap if speculator.keeps_head_scale else None
    device, dtype = torch.device(device or "cpu"), dtype or torch.float32
    frozen = speculator.frozen()
    # Not `nn.Module.to_empty`: it cannot convert under FakeTensorMode, with which memory is estimated.
    for path, module in speculator.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=f"{path}.{name}" not in frozen))
    if speculator.draft_tokens is not None:
        speculator.draft_tokens = _check_draft_tokens(draft_tokens, speculator).to(device)
    if device.type == "meta":
        return speculator
    speculator.reset_parameters(None if seed is None else torch.Generator().manual_seed(seed))
    return speculator if device.type == "cpu" else speculator.to(device)


def _check_draft_tokens(tokens: Sequence[int] | torch.Tensor | None, speculator: Speculator) -> torch.Tensor:
    """[V′] the draft vocabulary as a tensor."""
    if tokens is None:
        return torch.zeros(speculator.head_size, dtype=torch.long)
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    if len(tokens) != speculator.head_size or tokens[0] < 0 or tokens[-1] >= speculator.vocab_size:
        raise ValueError(
            f"draft_tokens: {len(tokens)} ids from {tokens[0]} to {tokens[-1]}, expected {speculator.head_size} below "
            f"{speculator.vocab_size}"
        )
    if (tokens.diff() <= 0).any():
        raise ValueError("draft_tokens: expected ascending ids")
    return tokens
