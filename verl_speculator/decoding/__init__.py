"""Lossless speculative decoding with any base and any family of speculator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_speculator.decoding.generate import GenerationStream, speculative_generate, speculative_stream
    from verl_speculator.decoding.outputs import Generation, Round
    from verl_speculator.decoding.sampling_policy import SamplingPolicy
    from verl_speculator.decoding.tree import DraftTree, read_tree
    from verl_speculator.decoding.verification import verify, verify_greedy

__all__ = [
    "DraftTree",
    "Generation",
    "GenerationStream",
    "Round",
    "SamplingPolicy",
    "read_tree",
    "speculative_generate",
    "speculative_stream",
    "verify",
    "verify_greedy",
]

_HOMES = {name: "verl_speculator.decoding.generate" for name in __all__} | {
    "DraftTree": "verl_speculator.decoding.tree",
    "Generation": "verl_speculator.decoding.outputs",
    "Round": "verl_speculator.decoding.outputs",
    "SamplingPolicy": "verl_speculator.decoding.sampling_policy",
    "read_tree": "verl_speculator.decoding.tree",
    "verify": "verl_speculator.decoding.verification",
    "verify_greedy": "verl_speculator.decoding.verification",
}


def __getattr__(name: str):
    # On first use: the policy alone is read by checks that should load neither torch nor transformers.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
