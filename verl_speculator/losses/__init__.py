"""Losses of a speculator: `reference` defines them, `speculator_loss` computes the same in bounded memory."""

from verl_speculator.losses.chunked import DraftSums, speculator_loss
from verl_speculator.losses.module import DraftLoss

__all__ = ["DraftLoss", "DraftSums", "speculator_loss"]
