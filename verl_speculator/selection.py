"""Which rows of a file a sample takes."""

from __future__ import annotations


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices at even distances, so that a file sorted by category is sampled whole; 0 for all."""
    wanted = min(wanted, count) or count
    return [i * count // wanted for i in range(wanted)]
