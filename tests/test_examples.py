"""The examples, as a user starts them."""

from __future__ import annotations

import subprocess

import pyarrow.parquet as pq
from runs import ROOT, environment

from verl_speculator.checkpoint import read_checkpoint_info

SCRIPT = ROOT / "examples" / "train_for_acceptance.sh"


def test_train_for_acceptance(base, chat, tmp_path):
    small = [f"model.speculator.{name}_dim=16" for name in ("inner", "emb", "proj")]
    result = subprocess.run(
        [
            *(SCRIPT, "1", tmp_path / "run", base, chat, "data.train_batch_size=8", "trainer.device=cpu"),
            *("trainer.total_training_steps=1", "data.num_workers=0", *small),
        ],
        env=environment(REGENERATE="--max-new-tokens 12 --keep-unfinished"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answers = pq.read_table(tmp_path / "run.answers.parquet")["messages"].to_pylist()
    assert answers and all(talk[-1]["role"] == "assistant" for talk in answers)
    training = read_checkpoint_info(tmp_path / "run").provenance["training"]
    assert training["loss"] == {"kl": 1.0, "tv": 1.0} and training["depth_weights"] == "gain"


def test_without_arguments_it_says_what_it_takes():
    result = subprocess.run([SCRIPT, "1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "train_for_acceptance.sh <nproc> <save_path> BASE TRAIN.parquet" in result.stderr
