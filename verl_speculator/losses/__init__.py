"""Losses judge what the families compute."""

from verl_speculator.losses.draft import DraftLoss, DraftSums, mean_loss

__all__ = ["DraftLoss", "DraftSums", "mean_loss"]
