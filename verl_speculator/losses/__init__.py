"""Losses of a speculator: `reference` defines them, `speculator_loss` computes the same in bounded memory."""

from verl_speculator.losses.chunked import DraftLoss, DraftSums, pair_counts, speculator_loss

__all__ = ["DraftLoss", "DraftSums", "pair_counts", "speculator_loss"]
