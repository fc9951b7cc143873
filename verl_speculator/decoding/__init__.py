"""Lossless speculative decoding with any base and any family of speculator."""

from verl_speculator.decoding.generate import (
    Generation,
    GenerationStream,
    Round,
    speculative_generate,
    speculative_stream,
)
from verl_speculator.decoding.sampling import SamplingPolicy
from verl_speculator.decoding.verify import verify, verify_greedy

__all__ = [
    "Generation",
    "GenerationStream",
    "Round",
    "SamplingPolicy",
    "speculative_generate",
    "speculative_stream",
    "verify",
    "verify_greedy",
]
