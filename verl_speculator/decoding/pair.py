"""A target, and whatever drafts for it."""

from __future__ import annotations

from torch import nn

from verl_speculator.decoding.draft import Drafter, SpeculatorDrafter
from verl_speculator.decoding.policy import SamplingPolicy
from verl_speculator.decoding.shared import EarlyExitDrafter, SharedTarget
from verl_speculator.decoding.target import Target
from verl_speculator.models import Speculator


def pair(
    base: nn.Module, speculator: Speculator | None, policy: SamplingPolicy, *, sampled: bool
) -> tuple[Target, Drafter | None]:
    """The base as a target, and the drafter of a speculator: beside the base, or a part of it.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        speculator: of any family, None for the base alone.
        policy: of sampling, the same for both.
        sampled: draw the drafts; otherwise take the most likely tokens.

    Raises:
        UserError: for a base that does not go with it, or whose state cannot be rolled back.
    """
    if speculator is None:
        return Target(base), None
    if speculator.shared_blocks is None:
        return Target(base, speculator.reads), SpeculatorDrafter(speculator, policy, sampled=sampled)
    target = SharedTarget(base, speculator)
    return target, EarlyExitDrafter(speculator, target, policy, sampled=sampled)
