"""Hugging Face's own loop, told what to do and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from verl_speculator.decoding.policy import SamplingPolicy


@contextmanager
def generation_settings(base: nn.Module, policy: SamplingPolicy, **settings: Any) -> Iterator[None]:
    """While the block lasts `base.generate` follows these settings alone.

    `generate` takes what a call leaves open from the base's own configuration, which may hold penalties: another
    distribution. So that is replaced, and put back.

    Args:
        base: a Hugging Face causal language model.
        policy: of sampling.
        settings: of `GenerationConfig`.
    """
    from transformers import GenerationConfig

    if not policy.greedy:
        settings |= {"do_sample": True, "temperature": policy.temperature}
        settings |= {"top_p": policy.top_p, "top_k": policy.top_k}
    own, base.generation_config = base.generation_config, GenerationConfig(**settings)
    try:
        yield
    finally:
        base.generation_config = own
