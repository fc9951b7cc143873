"""What a run leaves in its folder, what it prints, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from helpers.training_runs import SCRIPT, environment, overrides, train
from verl_speculator.checkpoint.format import latest_step
from verl_speculator.training.run_output import RunOutput, console_line, read_metrics, summarise_run
from verl_speculator.utils.process import StopRequest


def run_script(folder, settings, **popen):
    command = [str(SCRIPT), "1", str(folder), *settings]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


@pytest.fixture(scope="module")
def finished(base, chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = {"trainer__total_training_steps": 3, "data__val_files": chat, "data__val_max_samples": 8}
    process = run_script(folder, overrides(base, chat, **more, model__speculator__draft_vocab_size=60))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return folder, out, err


def test_a_run_leaves_metrics_a_plot_and_a_summary(finished, base, chat):
    folder, out, err = finished
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"train/loss", "train/depth2_accuracy", "train/coverage"} <= set(records[0])
    assert "val/expected_accept_length" in records[-1]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    box = err[err.index("speculator trained") :]
    for title in ("checkpoint", "speculator loss", "accuracy", "acceptance", "data", "coverage"):
        assert title in box
    assert re.search(r"24 rows read, \d+% of the data", box)
    spec = folder / "global_step_3"
    assert f"verl-speculator evaluate --base {base} --speculator {spec} --prompts {chat} --out " in box
    assert f"verl-speculator generate --base {base} --speculator {spec} --prompt" in box
    assert f"verl-speculator serve --base {base} --speculator {spec}" in box
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and "expected τ" in lines[0] and "validation loss" in lines[2]
    assert "_target_" not in out + err and "Monkey patch" not in out + err and "NUMA" not in out + err


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun's workers are found through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(base, chat, tmp_path, number):
    settings = overrides(base, chat, trainer__total_training_steps=4000, trainer__total_epochs=1000)
    settings.append("trainer.save_freq=-1")
    process = run_script(tmp_path / "run", settings)
    deadline = time.monotonic() + 200
    while len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    step = latest_step(tmp_path / "run")
    assert step >= 3 and err.count(f"interrupted after step {step}: saved; the same command goes on") == 1
    assert "Traceback" not in err and (tmp_path / "run" / "training.png").is_file()
    found = train(1, tmp_path / "run", [*settings, f"trainer.total_training_steps={step + 1}"])
    assert list(found) == [step + 1]
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, step + 2))


def test_a_checkpoint_is_saved_by_time(base, chat, tmp_path):
    settings = overrides(base, chat, trainer__total_training_steps=3, trainer__save_minutes=1e-6)
    train(1, tmp_path / "run", [*settings, "trainer.save_freq=-1"])
    assert sorted(entry.name for entry in (tmp_path / "run").glob("global_step_*")) == [
        f"global_step_{step}" for step in (1, 2, 3)
    ]


def test_a_resumed_run_drops_the_records_that_it_makes_again(tmp_path):
    output = RunOutput(tmp_path, 0)
    metrics = {"train/speculator_loss": 2.0, "train/loss": 2.0, "train/expected_accept_length": 1.5}
    for step in (1, 2, 3):
        output.log(step, metrics)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    again = RunOutput(tmp_path, 2)
    again.log(3, metrics | {"train/loss": 1.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["train/loss"] == 1.0


def test_lines_have_four_digits_at_most():
    metrics = {"train/loss": 5.998459792, "train/depth0_accuracy": 0.5432, "train/depth1_accuracy": 0.1}
    metrics |= {"train/expected_accept_length": 1.23456, "train/lr": 0.00123456, "perf/tokens_per_second": 2414.5936}
    line = "step 7/10  loss 5.998  accuracy 54% 10%  expected τ 1.23  lr 0.00123  2,415 tokens/s"
    assert console_line(7, 10, metrics) == line


def test_a_summary_averages_the_first_and_last_steps(tmp_path):
    records = [
        {
            "step": i,
            "train/speculator_loss": 10.0 - i,
            "train/expected_accept_length": 1.5,
            "train/depth0_accuracy": 0.4,
        }
        for i in range(30)
    ]
    named = {"base": "my base", "prompts": "p.parquet"}
    lines = summarise_run(records, tmp_path / "global_step_30", rows_seen=240, rows=100, **named)
    assert (
        lines["speculator loss"] == "5.5 → -14.5"
        and lines["data"] == "240 rows read, 2.4 times all of the data (100 rows)"
    )
    assert lines["accuracy"] == "40% by depth (training)" and "'my base'" in lines["evaluate"]
    assert "coverage" not in lines


def test_a_second_signal_ends_at_once(monkeypatch):
    """But not the same one that came twice: from a scheduler, and passed on by torchrun."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        monkeypatch.setattr("verl_speculator.utils.process.SAME_REQUEST", -1.0)
        with pytest.raises(SystemExit) as error:
            signal.raise_signal(signal.SIGTERM)
    assert error.value.code == 130 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
