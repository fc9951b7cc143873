"""How many drafts were accepted, as our proposer or vLLM itself counts them, and a training step's metrics from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# vLLM's counters of an engine's drafts, on either runner, since the engine started.
COUNTERS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


@dataclass
class AcceptanceStats:
    """Counts of one worker's drafts since they were last taken.

    Attributes:
        version: of the speculator: 0 as loaded, then that of the last weight update.
        rounds: verifications of a request that had drafts.
        drafted: draft tokens in them.
        accepted: draft tokens of them that were accepted.
    """

    version: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> None:
        """Add one step of the engine. A request without drafts or without a token is no round."""
        if num_draft_tokens is None:
            return
        for tokens, drafts in zip(sampled, num_draft_tokens, strict=True):
            if drafts and tokens:
                self.rounds += 1
                self.drafted += drafts
                self.accepted += len(tokens) - 1

    def take(self) -> dict[str, Any]:
        """The counts as a dictionary; they restart at 0."""
        counts = asdict(self)
        self.rounds = self.drafted = self.accepted = 0
        return counts


def engine_counts(metrics: Iterable[Any]) -> dict[str, Any]:
    """vLLM's own counts of an engine's drafts since it started.

    Args:
        metrics: `LLM.get_metrics()`, of an engine with `disable_log_stats=False`.

    Returns:
        By the names of `AcceptanceStats`, with `accepted_per_position` [K]. All 0 before the first draft.
    """
    counters = {metric.name: metric for metric in metrics}
    counts: dict[str, Any] = {}
    for key, name in COUNTERS.items():
        none, attribute = ([], "values") if key == "accepted_per_position" else (0, "value")
        counts[key] = getattr(counters[name], attribute) if name in counters else none
    return counts


class EngineStats:
    """`AcceptanceStats` of an engine whose drafter does not count, as in the V2 runner, from vLLM's own counters. Call
    `take` between a training rollout and a validation, to keep the two apart.

    Args:
        get_metrics: `LLM.get_metrics` of the engine.
    """

    def __init__(self, get_metrics: Callable[[], Iterable[Any]]) -> None:
        self._get_metrics, self._before = get_metrics, engine_counts(get_metrics())

    def take(self, version: int) -> dict[str, Any]:
        """The counts since the last call, for `rollout_metrics`.

        Args:
            version: of the speculator that drafted (`update_speculator`).
        """
        before, self._before = self._before, engine_counts(self._get_metrics())
        names = ("rounds", "drafted", "accepted")
        return {"version": version} | {name: int(self._before[name] - before[name]) for name in names}


def rollout_metrics(
    stats: Sequence[dict[str, Any]], *, trainer_version: int | None = None, prefix: str = "rollout"
) -> dict[str, float]:
    """Metrics of a training step, or of a validation, from the statistics of all workers.

    Counts are added before they are divided. Tensor-parallel workers count the same requests: no ratio changes.

    Args:
        stats: `AcceptanceStats.take` of every worker that drafts.
        trainer_version: the version that the trainer has.
        prefix: of the metrics' names.

    Returns:
        `rollout/speculator_version`, the oldest version that drafted (or that is served, if nothing was drafted); with
        `trainer_version` also `rollout/speculator_lag`, the staleness in versions. If anything was drafted,
        `rollout/accepted_length` (τ, tokens per forward pass of the target model) and `rollout/accept_rate` (accepted
        share of the draft tokens). Empty without stats.
    """
    if not stats:
        return {}
    drafting = [worker_stats for worker_stats in stats if worker_stats["rounds"]]
    oldest = min(worker_stats["version"] for worker_stats in drafting or stats)
    metrics: dict[str, float] = {f"{prefix}/speculator_version": oldest}
    if trainer_version is not None:
        metrics[f"{prefix}/speculator_lag"] = trainer_version - oldest
    rounds, drafted, accepted = (sum(a[name] for a in stats) for name in ("rounds", "drafted", "accepted"))
    if rounds:
        metrics |= {f"{prefix}/accepted_length": 1 + accepted / rounds, f"{prefix}/accept_rate": accepted / drafted}
    return metrics
