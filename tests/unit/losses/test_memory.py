"""The memory of the loss, reckoned on fake tensors: exact, and the same on every machine."""

from __future__ import annotations

import sys

import pytest

from helpers.training_runs import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from training_memory import SETTINGS, measure

SHAPE = SETTINGS["8b"]


@pytest.mark.parametrize(("loss", "rows"), [("ce", 16384), ("kl", 2048)])
def test_what_an_8b_base_needs(loss, rows):
    """64 rows of 256 tokens, V = 128,256, widths 4,096, three depths: 4.7 GB of it are the gradients in float32."""
    assert 4.7 < measure("ours", loss, SHAPE | {"rows": rows}, "fake") < 6.0


def test_depths_hardly_matter_and_rows_do_not():
    shape = SHAPE | {"rows": 2048}
    few, many = (measure("ours", "ce", shape | {"depths": depths}, "fake") for depths in (1, 8))
    assert many < 1.2 * few
    assert measure("ours", "ce", shape | {"rows": 4096}, "fake") < 1.06 * measure("ours", "ce", shape, "fake")


def test_the_account_sees_what_the_plain_loop_holds():
    """K blocks of logits in bf16 and as many in float32, at least."""
    block = SHAPE["rows"] * SHAPE["vocab"] * SHAPE["depths"] / 1e9
    assert measure("plain", "ce", SHAPE, "fake") > (2 + 4) * block
