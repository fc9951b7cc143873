"""Acceptance from vLLM's own counters."""

from __future__ import annotations

from types import SimpleNamespace

from verl_speculator.vllm_plugin.acceptance import COUNTERS, EngineStats, engine_counts, rollout_metrics


class Engine:
    """An engine whose counters only grow."""

    def __init__(self) -> None:
        self.metrics: list[SimpleNamespace] = []

    def work(self, rounds: int, accepted_per_position: list[int]) -> None:
        now = engine_counts(self.metrics)
        per_position = now["accepted_per_position"] or [0] * len(accepted_per_position)
        values = {
            "rounds": now["rounds"] + rounds,
            "drafted": now["drafted"] + rounds * len(accepted_per_position),
            "accepted": now["accepted"] + sum(accepted_per_position),
        }
        self.metrics = [SimpleNamespace(name=COUNTERS[key], value=float(value)) for key, value in values.items()]
        totals = [a + b for a, b in zip(per_position, accepted_per_position, strict=True)]
        self.metrics += [
            SimpleNamespace(name=COUNTERS["accepted_per_position"], values=totals),
            SimpleNamespace(name="vllm:prompt_tokens", value=9.0),
        ]


def test_a_validation_between_two_rollouts_counts_for_neither():
    engine = Engine()
    engine.work(5, [5, 5])  # before anything is measured
    stats = EngineStats(lambda: engine.metrics)
    engine.work(10, [6, 2])
    assert rollout_metrics([stats.take(3)], trainer_version=3) == {
        "rollout/speculator_version": 3,
        "rollout/speculator_lag": 0,
        "rollout/accepted_length": 1.8,
        "rollout/accept_rate": 0.4,
    }
    engine.work(4, [4, 4])
    assert rollout_metrics([stats.take(3)], prefix="val")["val/accepted_length"] == 3
    engine.work(10, [1, 0])
    assert rollout_metrics([stats.take(3)], trainer_version=4) == {
        "rollout/speculator_version": 3,
        "rollout/speculator_lag": 1,
        "rollout/accepted_length": 1.1,
        "rollout/accept_rate": 0.05,
    }


def test_an_engine_that_has_not_drafted_has_no_counters():
    stats = EngineStats(lambda: [])
    assert stats.take(2) == {"version": 2, "rounds": 0, "drafted": 0, "accepted": 0}
    assert rollout_metrics([stats.take(2)]) == {"rollout/speculator_version": 2}
