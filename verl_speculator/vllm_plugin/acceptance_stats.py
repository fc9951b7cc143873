"""What a served speculator did since it was last asked, and the metrics of a training step that come of it.

Imports no torch: workers count, the trainer's process divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class AcceptanceStats:
    """Of one worker.

    Attributes:
        version: of the speculator that drafts: 0 as loaded, then what each update said.
        rounds: verifications of a request that had drafts.
        drafted: draft tokens in them.
        accepted: those of them that were kept.
    """

    version: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> None:
        """Add one step of the engine. A request without drafts, or without a token, was no round."""
        if num_draft_tokens is None:
            return
        for tokens, drafts in zip(sampled, num_draft_tokens, strict=True):
            if drafts and tokens:
                self.rounds += 1
                self.drafted += drafts
                self.accepted += len(tokens) - 1

    def take(self) -> dict[str, Any]:
        """What was counted, as plain values; counting starts anew."""
        taken = asdict(self)
        self.rounds = self.drafted = self.accepted = 0
        return taken


def rollout_metrics(
    accounts: Sequence[dict[str, Any]], *, trainer_version: int | None = None, prefix: str = "rollout"
) -> dict[str, float]:
    """Metrics of a training step, or of a validation, from the accounts of all workers.

    Counts are added before they are divided, so that a worker weighs as much as it decoded; those of tensor-parallel
    workers, which all count the same requests, leave the ratios as they are.

    Args:
        accounts: `AcceptanceStats.take` of every worker that drafts.
        trainer_version: the version that the trainer holds.
        prefix: of the metrics' names.

    Returns:
        `rollout/speculator_version`, the oldest that drafted anywhere (or could have, where none did); with
        `trainer_version` also `rollout/speculator_lag`, how many versions it is behind. Where anything was drafted
        `rollout/accepted_length` (τ, tokens per pass of the base) and `rollout/accept_rate` (accepted share of
        drafts). Empty without accounts.
    """
    if not accounts:
        return {}
    drafting = [account for account in accounts if account["rounds"]]
    oldest = min(account["version"] for account in drafting or accounts)
    metrics: dict[str, float] = {f"{prefix}/speculator_version": oldest}
    if trainer_version is not None:
        metrics[f"{prefix}/speculator_lag"] = trainer_version - oldest
    rounds, drafted, accepted = (sum(a[name] for a in accounts) for name in ("rounds", "drafted", "accepted"))
    if rounds:
        metrics |= {f"{prefix}/accepted_length": 1 + accepted / rounds, f"{prefix}/accept_rate": accepted / drafted}
    return metrics
