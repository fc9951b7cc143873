"""Unroll, head and loss in one module's forward: the unit that FSDP shards.

Outside that forward a sharded speculator's parameters are shards, so nothing else may touch them while training.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from verl_speculator.config.objective import Objective
from verl_speculator.losses.chunked import Head, depth_scale, speculator_loss
from verl_speculator.models.speculator import Speculator


@dataclass(frozen=True)
class DraftSums:
    """Sums over rows, per depth: what micro-batches and ranks add up before anything is divided.

    Attributes:
        loss: [K] sum of the loss over valid pairs.
        weighted: [K] the same with the weight of each pair, where the objective gives them one.
        pairs: [K] number of valid pairs.
        correct: [K] pairs whose most likely token is the target.
        reached: [K] pairs whose earlier depths were all correct.
        accepted: [K] pairs that were reached and are correct themselves.
    """

    loss: Tensor
    weighted: Tensor
    pairs: Tensor
    correct: Tensor
    reached: Tensor
    accepted: Tensor

    def stack(self) -> Tensor:
        """[6, K] float32 without a gradient: add these, over micro-batches and ranks."""
        return torch.stack([getattr(self, f.name).detach().float() for f in fields(self)])

    @classmethod
    def unstack(cls, sums: Tensor) -> DraftSums:
        """From what `stack` gives."""
        return cls(*sums.unbind(0))

    def metrics(self, objective: Objective | None = None) -> dict[str, float]:
        """`speculator_loss`, `depth{k}_loss`, `depth{k}_accuracy` and `expected_accept_length`.

        The expected accept length is 1 + Σ_k Π_{j≤k} a_j, with a_j the share of rows right at depth j among those that
        were right at all earlier depths. A depth without a single pair ends the sum and has no entry of its own.
        """
        weights = (objective or Objective()).depths(len(self.pairs))
        values = {"speculator_loss": float((self.weighted * depth_scale(self.pairs, weights)).sum())}
        expected, chain = 1.0, 1.0
        for k, (pairs, reached) in enumerate(zip(self.pairs.tolist(), self.reached.tolist(), strict=True)):
            if pairs:
                values[f"depth{k}_loss"] = float(self.loss[k]) / pairs
                values[f"depth{k}_accuracy"] = float(self.correct[k]) / pairs
            chain *= float(self.accepted[k]) / reached if reached else 0.0
            expected += chain
        values["expected_accept_length"] = expected
        return values


class DraftLoss(nn.Module):
    """The loss of every draft, and what is reported of it.

    Args:
        speculator: any family.
        objective: what is minimised.
        chunk_rows: rows at a time; None for a number that keeps the blocks of logits small.
        compiled: whether torch.compile fuses what is computed for them.
    """

    def __init__(
        self,
        speculator: Speculator,
        objective: Objective | None = None,
        chunk_rows: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.speculator = speculator
        self.objective = objective or Objective()
        self.chunk_rows = chunk_rows
        self.compiled = compiled

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        valid: Tensor,
        *,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_rows: Tensor | None = None,
        base_head: Head | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            hidden: [R, D] the base's states of the rows of `alignment.DraftRows`, whose next three these are; with
                `rows`, what `HiddenStateHook` took instead.
            tokens: [R, K]
            targets: [K, R]
            valid: [K, R]
            rows: [R] where in the flattened batch they are, None if `hidden` is already theirs.
            counts: [K] valid pairs of the whole batch, of which this may be a part.
            teacher_hidden: [T, D] states of the base, for objectives that compare with it.
            teacher_rows: [K, R] which of them predicts each target.
            base_head: from those states to logits.

        Returns:
            `total`, which carries the gradient, and the fields of `DraftSums`, as a dictionary: sharding wrappers look
            for tensors there, and not in a class. With no row at all the loss is 0 and its gradient zeros, so that
            every rank takes part in every reduction.
        """
        if rows is not None:
            hidden = self.speculator.prepare_hidden_states(hidden)
            hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
        total, sums = speculator_loss(
            self.speculator,
            hidden,
            tokens,
            targets.T,
            valid.T,
            teacher_hidden=teacher_hidden,
            teacher_rows=None if teacher_rows is None else teacher_rows.T,
            base_head=base_head,
            counts=counts,
            loss=self.objective,
            chunk_rows=self.chunk_rows,
            compiled=self.compiled,
        )
        return {"total": total, **sums}
