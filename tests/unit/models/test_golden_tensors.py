"""Parity with Snowflake's own module: the same tensors give the same logits and gradients, to 1e-10 in float64.

The files of tests/golden hold figures that ArcticTraining's module computed; their settings stand in their metadata.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.checkpoint.format import join_slots
from verl_speculator.losses import DraftLoss

GOLDEN = sorted((Path(__file__).resolve().parents[2] / "golden").glob("*.safetensors"))
FLAGS = ("tie_weights", "scale_input", "tie_lstm_embs")


def test_golden_files_are_all_present():
    assert len(GOLDEN) == 8


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with safe_open(request.param, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dictionary
        meta = file.metadata()
    config = SpeculatorConfig(
        method=meta.get("method", "sum_rnn"),
        n_predict=int(meta["n_predict"]),
        inner_dim=meta["inner"],
        emb_dim=meta["emb"],
        proj_dim=meta["proj"],
        **{flag: meta[flag] == "True" for flag in FLAGS if flag in meta},
    )
    speculator = build_speculator(
        config, hidden_size=int(meta["hidden"]), vocab_size=int(meta["vocab"]), dtype=torch.float64
    )
    return speculator, tensors


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_golden_names_logits_and_gradients_equal_snowflakes(golden):
    speculator, tensors = golden
    weights, slots = part(tensors, "weight."), speculator.checkpoint_slots()
    assert set(weights) == set(slots)
    shapes = {name: p.shape for name, p in speculator.named_parameters()}
    speculator.load_state_dict(join_slots({slot: weights[key] for key, slot in slots.items()}, shapes))

    states = speculator.unroll(tensors["hidden"], tensors["tokens"])
    logits = torch.stack([state @ speculator.head(k).T for k, state in enumerate(states)])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-10)

    valid = torch.ones_like(tensors["targets"], dtype=torch.bool)
    DraftLoss(speculator)(tensors["hidden"], tensors["tokens"], tensors["targets"], valid)["total"].backward()
    gradients = part(tensors, "grad.")
    grads = {name: p.grad for name, p in speculator.named_parameters()}
    for key, gradient in gradients.items():
        torch.testing.assert_close(slots[key].of(grads), gradient, rtol=0, atol=1e-10)
