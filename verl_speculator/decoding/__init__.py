"""Lossless speculative decoding with any base model and any family of speculator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_speculator.decoding.draft_and_verify import Round
    from verl_speculator.decoding.generate import Generation, GenerationStream, speculative_generate, speculative_stream
    from verl_speculator.decoding.options import GenerationOptions, SamplingPolicy
    from verl_speculator.decoding.tree import DraftTree, read_tree
    from verl_speculator.decoding.verification import verify, verify_greedy

__all__ = [
    "DraftTree",
    "Generation",
    "GenerationOptions",
    "GenerationStream",
    "Round",
    "SamplingPolicy",
    "read_tree",
    "speculative_generate",
    "speculative_stream",
    "verify",
    "verify_greedy",
]

_MODULES = {
    "DraftTree": "tree",
    "GenerationOptions": "options",
    "Round": "draft_and_verify",
    "SamplingPolicy": "options",
    "read_tree": "tree",
    "verify": "verification",
    "verify_greedy": "verification",
}


def __getattr__(name: str):
    # Imported on first use: checks of settings need `options` and `tree` without torch and transformers.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'generate')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
