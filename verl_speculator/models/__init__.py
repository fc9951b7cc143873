"""The speculator families. `build_speculator` makes one; their table is `verl_speculator.config.families`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch

from verl_speculator.config.families import FAMILIES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.speculator import DraftState, Slot, Speculator

__all__ = ["DraftState", "Slot", "Speculator", "build_speculator", "family_class"]


def family_class(method: str) -> type[Speculator]:
    """The class that implements `method`, a key of `FAMILIES`."""
    module, _, name = FAMILIES[method].target.partition(":")
    return getattr(importlib.import_module(module), name)


def build_speculator(
    config: SpeculatorConfig,
    *,
    hidden_size: int,
    vocab_size: int,
    block_shapes: Mapping[str, Sequence[int]] | None = None,
    logit_cap: float | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Speculator:
    """A freshly initialised speculator.

    Args:
        config: family and shape.
        hidden_size: width D of the base's hidden states.
        vocab_size: V, the rows of the base's output head.
        block_shapes: of the parameters of the base's block that an early exit trains, by name.
        logit_cap: the base's soft cap of its logits; ignored by families whose heads read states unlike the base's.
        seed: of the initialisation; None draws from torch's global generator.
        device: where the parameters live; `"meta"` skips the initialisation.
        dtype: of the parameters, float32 by default.

    Returns:
        A module with `unroll(hidden [T, D], tokens [T, K]) -> states [K, T, E]`, `head(k) -> weight [V, E]`, and
        `start` and `step` for decoding.
    """
    more = {"block_shapes": block_shapes} if block_shapes else {}
    with torch.device("meta"):
        speculator = family_class(config.method)(config, hidden_size=hidden_size, vocab_size=vocab_size, **more)
    speculator.logit_cap = logit_cap if speculator.keeps_head_scale else None
    device, dtype = torch.device(device or "cpu"), dtype or torch.float32
    frozen = speculator.frozen()
    # By hand: `nn.Module.to` cannot convert where tensors are only reckoned with (FakeTensorMode).
    for path, module in speculator.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
            trained = f"{path}.{name}" not in frozen
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=trained))
    if device.type == "meta":
        return speculator
    speculator.reset_parameters(None if seed is None else torch.Generator().manual_seed(seed))
    return speculator if device.type == "cpu" else speculator.to(device)
