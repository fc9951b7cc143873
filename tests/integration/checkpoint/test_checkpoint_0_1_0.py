"""A checkpoint that version 0.1.0 wrote: later versions load it, decode with it and resume its run.

tests/fixtures/checkpoint_0_1_0 holds the base model, the data, step 60 of the run and expected.json: what the same
version drafted and generated with the checkpoint, and the losses of the run's four remaining steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.drafters import load_base, states_of
from helpers.training_runs import read_log, script
from verl_speculator import SpeculatorConfig, load_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.decoding import speculative_generate

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "checkpoint_0_1_0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture(scope="module")
def base_model():
    return load_base(FIXTURE / "base", torch.float32)


@pytest.fixture(scope="module")
def speculator():
    return load_speculator(FIXTURE, base=FIXTURE / "base")


def test_checkpoint_0_1_0_is_loaded_with_its_configuration(speculator):
    assert speculator.config == SpeculatorConfig(
        method="sum_lstm", n_predict=3, inner_dim=8, emb_dim=8, proj_dim=8, tie_weights=True, tie_lstm_embs=True
    )
    assert read_checkpoint_info(FIXTURE).provenance["versions"]["verl_speculator"] == "0.1.0"


@pytest.mark.parametrize("text", EXPECTED["texts"])
def test_checkpoint_0_1_0_gives_the_recorded_draft_tokens(base_model, speculator, text):
    """At every position t of the answer the drafts of x_{t+2}, x_{t+3}, x_{t+4}, given the tokens before each."""
    tokens = torch.tensor([*text["prompt"], *text["tokens"]])
    depths, first = speculator.config.n_predict, len(text["prompt"]) - 1
    following = tokens.unfold(0, depths, 1)[first + 1 :]
    hidden = states_of(base_model, tokens.tolist())[first : len(tokens) - depths]
    with torch.no_grad():
        states = speculator.unroll(hidden, following)
        drafts = torch.stack([speculator.logits(k, states[k]).argmax(-1) for k in range(depths)], dim=1)
    assert drafts.tolist() == text["drafts"]


@pytest.mark.parametrize("text", EXPECTED["texts"])
def test_checkpoint_0_1_0_generates_the_recorded_text(base_model, speculator, text):
    generation = speculative_generate(base_model, speculator, text["prompt"], max_new_tokens=len(text["tokens"]))
    assert generation.tokens == text["tokens"]
    assert [round.accepted for round in generation.rounds] == text["accepted"]


def test_checkpoint_0_1_0_is_resumed_by_the_launcher(tmp_path):
    """The launcher compares the run with the checkpoint's record, then trains the remaining steps."""
    run, log = tmp_path / "run", tmp_path / "log.jsonl"
    shutil.copytree(FIXTURE / "global_step_60", run / "global_step_60")
    shutil.copy(FIXTURE / "latest_checkpointed_iteration.txt", run)
    inputs = [f"model.partial_pretrain={FIXTURE / 'base'}", f"data.train_files={FIXTURE / 'train.parquet'}"]
    result = script(1, run, *inputs, *EXPECTED["settings"], "trainer.logger=file", VERL_FILE_LOGGER_PATH=str(log))
    assert result.returncode == 0, result.stderr[-3000:]
    losses = {str(step): metrics["train/loss"] for step, metrics in read_log(log).items()}
    assert losses == pytest.approx(EXPECTED["train/loss"], rel=1e-3)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "64"
