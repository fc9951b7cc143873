"""Training on Ray: the losses, the checkpoints and the resuming of torchrun."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.training_runs import environment, overrides, read_log, train
from verl_speculator import load_speculator

STEPS = 3


def train_on_ray(save_path: Path, settings: list[str], *, check: bool = True, workers: int = 2):
    """`python -m verl_speculator.train_ray`, from start to end; the metrics of every step."""
    log = save_path.with_suffix(".jsonl")
    command = [sys.executable, "-m", "verl_speculator.train_ray", f"trainer.default_local_dir={save_path}"]
    command += [f"trainer.n_gpus_per_node={workers}", "trainer.logger=file", *settings]
    alone = environment(VERL_FILE_LOGGER_PATH=str(log), RAY_DISABLE_MEMORY_MONITOR="1")
    alone.pop("RAY_ADDRESS", None)
    result = subprocess.run(command, env=alone, capture_output=True, text=True)
    if not check:
        return result
    assert result.returncode == 0, (result.stdout[-2000:], result.stderr[-4000:])
    return read_log(log)


@pytest.fixture(scope="module")
def settings(base, chat):
    steps = {"trainer__total_training_steps": STEPS, "trainer__save_freq": 2, "data__micro_batch_size_per_gpu": 2}
    return overrides(base, chat, data__val_files=chat, data__val_max_samples=7, **steps)


def assert_losses(found, expected):
    """The same numbers at every step of `found`."""
    for step, metrics in found.items():
        assert metrics.keys() == expected[step].keys()
        for name, value in expected[step].items():
            if not name.startswith("perf/"):
                assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), (step, name)


def test_ray_number_of_machines_refused(settings, tmp_path):
    result = train_on_ray(tmp_path / "out", [*settings, "trainer.nnodes=two"], check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "error: trainer.nnodes=two: expected an integer of at least 1\n",
    )


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """By torchrun and on Ray with two workers: the folder, and the metrics of every step."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "torchrun": (root / "torchrun", train(1, root / "torchrun", settings)),
        "ray": (root / "ray", train_on_ray(root / "ray", settings)),
    }


def test_losses_and_checkpoints_are_torchruns(runs, base):
    """Two workers; validated on 7 rows, no multiple of anything."""
    (torchrun, expected), (ray, found) = runs["torchrun"], runs["ray"]
    assert sorted(found) == sorted(expected) == [1, 2, 3]
    assert_losses(found, expected)
    for step in (2, 3):
        mine, theirs = (run / f"global_step_{step}" for run in (ray, torchrun))
        names = {"config.json", "pytorch_model.bin", "training_state"}
        assert {entry.name for entry in mine.iterdir()} == {entry.name for entry in theirs.iterdir()} == names
        mine, theirs = load_speculator(mine, base=base), load_speculator(theirs, base=base)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(mine.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_each_resumes_what_the_other_began(runs, settings, tmp_path):
    """From step 2, with another number of workers; the third step is what it was."""
    expected = runs["torchrun"][1]
    for name, (run, _) in runs.items():
        begun = tmp_path / name
        shutil.copytree(run, begun, ignore=shutil.ignore_patterns("global_step_3"))
        (begun / "latest_checkpointed_iteration.txt").write_text("2")
        resumed = train_on_ray(begun, settings, workers=1) if name == "torchrun" else train(1, begun, settings)
        assert sorted(resumed) == [3]
        assert_losses(resumed, expected)
        assert (begun / "global_step_3" / "pytorch_model.bin").is_file()
