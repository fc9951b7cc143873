"""Statistics, hash and sketch of a tensor."""

from __future__ import annotations

import pytest
import torch

from verl_speculator.diagnose.trace_file import distance, stats_of


@pytest.mark.parametrize("count", [1, 63, 64, 1000, (1 << 20) + 77])
def test_stats_of_random_values_equal_torch(count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 3 + 1
    wide, stats = x.double(), stats_of(x)
    assert stats.mean == pytest.approx(wide.mean().item(), rel=1e-12)
    assert stats.std == pytest.approx(wide.std(correction=0).item(), rel=1e-9, abs=1e-12)
    assert stats.absmax == wide.abs().max() and stats.norm == pytest.approx(wide.norm().item(), rel=1e-12)
    assert set(stats.samples) <= set(wide.tolist())


def test_hash_any_changed_value_differs_and_a_wider_type_does_not():
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert stats_of(x).hash == stats_of(x.float()).hash == stats_of(x.float().view(1, -1)).hash
    assert distance(stats_of(x), stats_of(x.double())) == 0
    assert stats_of(torch.tensor([0.0])).same_values(stats_of(torch.tensor([-0.0])))
    for place in (0, 50_000, 100_002):
        other = x.clone()
        other[place] = other[place] + 1
        assert stats_of(other).hash != stats_of(x).hash
    assert stats_of(x.flip(0)).hash != stats_of(x).hash
    assert distance(stats_of(torch.tensor([1, 2])), stats_of(torch.tensor([1, 3]))) == float("inf")


@pytest.mark.parametrize("change", [1e-6, 1e-3, 0.3])
def test_distance_estimates_the_relative_difference(change):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 50_000, generator=generator, dtype=torch.float64)
    for other in (x + change * noise, x * (1 + change)):
        true = ((x - other).norm() / x.norm()).item()
        assert distance(stats_of(x), stats_of(other)) == pytest.approx(true, rel=0.4)
    # A difference in a single value is measured too.
    other = x.clone()
    other[777] += change * x.norm()
    assert distance(stats_of(x), stats_of(other)) == pytest.approx(change, rel=0.4)


def test_stats_of_non_finite_values_counts_and_excludes_them():
    x = torch.tensor([1.0, float("nan"), 3.0, float("inf"), -float("inf")])
    stats = stats_of(x)
    assert (stats.nan, stats.inf, stats.mean, stats.absmax) == (1, 2, 2.0, 3.0)
    assert distance(stats, stats_of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))) == float("inf")
    assert distance(stats, stats_of(x.clone())) == 0
