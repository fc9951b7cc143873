"""Losses of a speculator: `reference` holds the definitions, `speculator_loss` is fast and gives the same."""

from verl_speculator.losses.chunked import speculator_loss
from verl_speculator.losses.module import DraftLoss, DraftSums

__all__ = ["DraftLoss", "DraftSums", "speculator_loss"]
