"""Unroll, head and loss in one module's forward: the unit that FSDP shards.

Outside that forward a sharded speculator's parameters are shards, so nothing else may touch them while training.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from verl_speculator.losses.reference import cross_entropy
from verl_speculator.models.base import Speculator


@dataclass(frozen=True)
class DraftSums:
    """Sums over rows, per depth: what micro-batches and ranks add up before anything is divided.

    Attributes:
        loss: [K] sum of the loss over valid pairs. The only one that carries a gradient.
        pairs: [K] number of valid pairs.
        correct: [K] pairs whose most likely token is the target.
        reached: [K] pairs whose earlier depths were all correct.
        accepted: [K] pairs that were reached and are correct themselves.
    """

    loss: Tensor
    pairs: Tensor
    correct: Tensor
    reached: Tensor
    accepted: Tensor

    def stack(self) -> Tensor:
        """[5, K] float32 without a gradient: add these, over micro-batches and ranks."""
        return torch.stack([getattr(self, f.name).detach().float() for f in fields(self)])

    @classmethod
    def unstack(cls, sums: Tensor) -> DraftSums:
        """From what `stack` gives."""
        return cls(*sums.unbind(0))

    def metrics(self) -> dict[str, float]:
        """`speculator_loss`, `depth{k}_loss`, `depth{k}_accuracy` and `expected_accept_length`.

        The expected accept length is 1 + Σ_k Π_{j≤k} a_j, with a_j the share of rows right at depth j among those that
        were right at all earlier depths. A depth without a single pair ends the sum and has no entry of its own.
        """
        values = {"speculator_loss": float(mean_loss(self.loss, self.pairs))}
        expected, chain = 1.0, 1.0
        for k, (pairs, reached) in enumerate(zip(self.pairs.tolist(), self.reached.tolist(), strict=True)):
            if pairs:
                values[f"depth{k}_loss"] = float(self.loss[k]) / pairs
                values[f"depth{k}_accuracy"] = float(self.correct[k]) / pairs
            chain *= float(self.accepted[k]) / reached if reached else 0.0
            expected += chain
        values["expected_accept_length"] = expected
        return values


def mean_loss(loss: Tensor, pairs: Tensor) -> Tensor:
    """The mean over the valid pairs of each depth, then over the depths that have any; 0 where none has.

    Args:
        loss: [K] summed loss of each depth, of a part of a batch or all of it.
        pairs: [K] number of valid pairs of each depth in the whole batch: the parts' results then add up to the
            whole's, however it is cut.
    """
    return (loss / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


class DraftLoss(nn.Module):
    """Cross-entropy of every draft against the text, summed per depth."""

    def __init__(self, speculator: Speculator) -> None:
        super().__init__()
        self.speculator = speculator

    def forward(self, hidden: Tensor, tokens: Tensor, targets: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """
        Args:
            hidden: [R, D] the base's states of the rows of `alignment.DraftRows`, whose other arguments these are.
            tokens: [R, K]
            targets: [K, R]
            valid: [K, R]

        Returns:
            The fields of `DraftSums`, as a dictionary: sharding wrappers look for tensors there, and not in a class.
            With no row at all the loss is 0 and its gradient zeros, so that every rank takes part in every reduction.
        """
        states = self.speculator.unroll(hidden, tokens)
        sums: dict[str, list[Tensor]] = {f.name: [] for f in fields(DraftSums)}
        alive = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for k, state in enumerate(states):
            row = valid[k].nonzero().squeeze(-1)
            logits = state[row] @ self.speculator.head(k).T
            logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            hit = torch.zeros_like(alive)
            hit[row] = logits.detach().argmax(-1) == targets[k, row]
            reached = alive & valid[k]
            alive = reached & hit
            sums["loss"].append(cross_entropy(logits, targets[k, row]).sum())
            for name, flags in (("pairs", valid[k]), ("correct", hit), ("reached", reached), ("accepted", alive)):
                sums[name].append(flags.sum())
        return {name: torch.stack(values) for name, values in sums.items()}
