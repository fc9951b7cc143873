"""Unroll, head and loss in one module's forward: the unit that FSDP shards.

Outside of that forward the parameters of a sharded speculator are shards, so nothing else may use them in training.
"""

from __future__ import annotations

from torch import Tensor, nn

from verl_speculator.config.objective import Objective
from verl_speculator.losses.chunked import Head, speculator_loss
from verl_speculator.models.speculator import Speculator


class DraftLoss(nn.Module):
    """A speculator and its loss.

    Args:
        speculator: any family.
        objective: what is minimised.
        chunk_rows: as in `speculator_loss`.
        compiled: as in `speculator_loss`.
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
            hidden: [R, D] hidden states of the rows of `alignment.DraftRows`; with `rows` what `HiddenStateHook` took.
            tokens: [R, K], as in `DraftRows`.
            targets: [K, R], as in `DraftRows`.
            valid: [K, R], as in `DraftRows`.
            rows: [R] their indices in the flattened batch; None if `hidden` already holds these rows.
            counts: [K] as in `speculator_loss`.
            teacher_hidden: [T, D] hidden states of the base model, for objectives that compare with it.
            teacher_rows: [K, R] the row of `teacher_hidden` that predicts each target.
            base_head: from those states to logits.

        Returns:
            `total`, which carries the gradient, and the fields of `DraftSums`. A dictionary, because sharding wrappers
            look for tensors in it but not in a class. Without any row the loss is 0 and its gradients are zeros, so
            that every rank takes part in every reduction.
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
