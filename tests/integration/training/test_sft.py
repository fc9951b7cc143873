"""Training as users start it: torchrun, verl's trainer, real files."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers.tiny_models import WORDS, make_chat_rows, write_parquet
from helpers.training_runs import SCRIPT, environment, overrides, read_log, script, train
from verl_speculator import load_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.config.hydra import load_settings
from verl_speculator.preflight import launch
from verl_speculator.utils.settings import UserError

STEPS = 6
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "loss_curve.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(base, chat):
    def make(**more):
        steps = {"trainer__total_training_steps": STEPS, "trainer__save_freq": 3, "optim__lr_warmup_steps_ratio": 0.5}
        return overrides(base, chat, **(steps | more))

    return make


@pytest.fixture(scope="module")
def uninterrupted(runs, settings, chat):
    """Six steps on one process, saved after three; validated on 11 rows, no multiple of a micro-batch."""
    validation = {"data__val_files": chat, "data__val_max_samples": 11}
    return train(1, runs / "one", settings(**validation))


def interrupted(runs, source: str, name: str) -> Path:
    """A copy of a run as it was after its third step."""
    shutil.copytree(runs / source / "global_step_3", runs / name / "global_step_3")
    (runs / name / "latest_checkpointed_iteration.txt").write_text("3")
    return runs / name


def assert_same(found, expected, steps, tolerance):
    for step in steps:
        for key in ("train/loss", "train/grad_norm", "train/depth2_loss", "train/expected_accept_length"):
            assert found[step][key] == pytest.approx(expected[step][key], rel=tolerance), (step, key)


def test_the_loss_falls_and_metrics_are_scalars(uninterrupted):
    assert sorted(uninterrupted) == list(range(1, STEPS + 1))
    assert uninterrupted[STEPS]["train/loss"] < 0.9 * uninterrupted[1]["train/loss"]
    keys = {"loss", "speculator_loss", "expected_accept_length", "grad_norm", "lr", "depth0_loss", "depth2_accuracy"}
    for metrics in uninterrupted.values():
        assert {f"train/{key}" for key in keys} | {"perf/tokens_per_second"} <= set(metrics)
        assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert {"val/speculator_loss", "val/depth0_accuracy"} <= set(uninterrupted[STEPS])


def test_golden_loss_curve(uninterrupted):
    """A refactoring does not move the numbers. To renew the file on purpose, write what this test finds into it."""
    golden = json.loads(GOLDEN.read_text())
    found = [uninterrupted[step]["train/loss"] for step in sorted(uninterrupted)]
    assert found == pytest.approx(golden["train/loss"], rel=1e-3), f"recorded with {golden['environment']}"


def test_learning_rate_warms_up_and_ends_at_a_tenth(uninterrupted):
    rates = [metrics["train/lr"] for metrics in uninterrupted.values()]
    peak = 5e-2
    assert rates[:2] == pytest.approx([peak / 3, peak * 2 / 3])
    assert rates[2] == pytest.approx(peak)
    assert rates[2] > rates[3] > rates[4] > rates[5]
    assert rates[5] == pytest.approx(peak / 10)
    optim = load_settings(["trainer.default_local_dir=x", "trainer.device=cpu"]).optim
    assert (optim.lr, optim.lr_warmup_steps_ratio, optim.min_lr_ratio) == (1e-4, 0.05, 0.1)


@pytest.mark.parametrize(
    ("more", "shares"),
    [
        ({"optim__lr_scheduler_type": "constant", "optim__lr_warmup_steps": 3}, [1 / 3, 2 / 3, 1, 1]),
        ({"optim__lr_scheduler_type": "constant", "optim__lr_warmup_steps": 0}, [1, 1, 1, 1]),
        ({"optim__warmup_style": "constant", "optim__lr_warmup_steps": 2}, [1 / 2, 1, 1, 1]),  # the older name
    ],
)
def test_constant_schedule_first_step_learns(runs, settings, more, shares):
    more |= {"trainer__total_training_steps": 4}
    found = train(1, runs / f"constant_{more['optim__lr_warmup_steps']}", settings(**more))
    assert [found[step]["train/lr"] for step in (1, 2, 3, 4)] == pytest.approx([5e-2 * share for share in shares])


def test_checkpoint_holds_the_speculator_alone(uninterrupted, runs, base):
    folder = runs / "one" / f"global_step_{STEPS}"
    assert {entry.name for entry in folder.iterdir()} == {"config.json", "pytorch_model.bin", "training_state"}
    info = read_checkpoint_info(runs / "one")
    assert info.directory == folder
    keys = set(torch.load(folder / "pytorch_model.bin", weights_only=True))
    parts = ("emb.0.0", "proj.0.0", "proj.1.0", "ln.0.0", "head.0", "head.1", "head.2")
    assert keys == {f"{part}.weight" for part in parts} | {"ln.0.0.bias"}
    optimizer = torch.load(folder / "training_state" / "optimizer.pt", weights_only=True)
    assert optimizer["state"]
    assert all(name.startswith("draft.speculator.") for name in optimizer["state"])
    assert info.provenance["training"]["step"] == STEPS
    assert info.provenance["data"]["train_rows"] == 40
    assert len(info.provenance["base"]["weights_fingerprint"]) == 32
    load_speculator(folder, base=base)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 400_000


def test_two_processes_give_the_same_losses(uninterrupted, runs, settings, chat):
    validation = {"data__val_files": chat, "data__val_max_samples": 11}
    found = train(2, runs / "two", settings(**validation))
    assert_same(found, uninterrupted, range(1, STEPS + 1), 1e-3)
    for key in ("val/loss", "val/depth0_accuracy", "val/expected_accept_length"):
        assert found[STEPS][key] == pytest.approx(uninterrupted[STEPS][key], rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_continues_the_same_losses(uninterrupted, runs, settings, processes):
    run = interrupted(runs, "one", f"resumed_{processes}")
    found = train(processes, run, settings())
    assert sorted(found) == [4, 5, 6]
    assert_same(found, uninterrupted, found, 1e-5 if processes == 1 else 1e-3)
    again, before = load_speculator(run), load_speculator(runs / "one")
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


def test_more_steps_follow_the_longer_schedule(uninterrupted, runs, settings):
    """Three steps of six, then on to eight: the rates are those of a run of eight."""
    longer = settings(optim__lr_warmup_steps_ratio=0, trainer__total_training_steps=8)
    found = train(1, interrupted(runs, "one", "longer"), longer)
    rates = [5e-2 * (0.45 * math.cos(math.pi * step / 8) + 0.55) for step in (4, 5, 6, 7, 8)]
    assert [found[step]["train/lr"] for step in sorted(found)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("replaced", "more", "words"),
    [
        (True, {}, "the contents of data.train_files"),
        (False, {"model__speculator_loss_coeff": 2}, "model.speculator_loss_coeff (1.0, 2.0)"),
    ],
)
def test_resume_other_data_or_objective_refused(uninterrupted, runs, settings, tmp_path, replaced, more, words):
    data = write_parquet(tmp_path / "chat.parquet", make_chat_rows(40, seed=int(replaced)))
    given = settings(data__train_files=data, **more)
    with pytest.raises(UserError) as error:
        launch.launch(["1", str(interrupted(runs, "one", tmp_path.name)), *given])
    assert f"(its own, this run's): {words};" in str(error.value), "the only difference"
    assert "\n" not in str(error.value)


def test_resume_optimizer_takes_this_runs_values(uninterrupted, runs, settings):
    changed = settings(optim__lr=1e-3, optim__weight_decay=0.5, optim__betas="[0.8,0.9]")
    found = train(1, interrupted(runs, "one", "changed"), changed)
    ratio = 1e-3 / 5e-2
    for step in (4, 5, 6):
        assert found[step]["train/lr"] == pytest.approx(ratio * uninterrupted[step]["train/lr"])
    state = torch.load(runs / "changed" / f"global_step_{STEPS}" / "training_state" / "optimizer.pt", weights_only=True)
    (group,) = state["param_groups"]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.8, 0.9))


@pytest.fixture(scope="module")
def joint(settings, bases):
    return settings(model__freeze_base_model="false", model__partial_pretrain=bases["qwen2_untied"])


@pytest.fixture(scope="module")
def joint_run(runs, joint):
    return train(1, runs / "joint", joint)


def test_joint_training_saves_the_base(joint_run, runs, bases):
    from transformers import AutoModelForCausalLM

    full = joint_run
    assert {"train/base_loss", "train/speculator_loss"} <= set(full[1])
    metrics = full[1]
    assert metrics["train/loss"] == pytest.approx(metrics["train/base_loss"] + metrics["train/speculator_loss"])
    folder = runs / "joint" / "global_step_3"
    saved = AutoModelForCausalLM.from_pretrained(folder / "huggingface").state_dict()
    original = AutoModelForCausalLM.from_pretrained(bases["qwen2_untied"]).state_dict()
    assert set(saved) == set(original)
    assert all(not torch.equal(saved[name], original[name]) for name in saved if name.endswith("q_proj.weight"))
    assert not any("base" in key for key in torch.load(folder / "pytorch_model.bin", weights_only=True))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_joint_training_resumes(joint_run, runs, joint, processes):
    resumed = train(processes, interrupted(runs, "joint", f"joint_resumed_{processes}"), joint)
    assert_same(resumed, joint_run, [4], 1e-3 if processes > 1 else 1e-5)
    assert_same(resumed, joint_run, [5, 6], 1e-2 if processes > 1 else 1e-5)


def test_last_step_saved_before_it_is_validated(runs, settings):
    """A validation that fails, on a row beyond the length, does not cost the training."""
    long = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two " * 500}]
    data = write_parquet(runs / "long.parquet", [{"messages": long}])
    with pytest.raises(Exception, match="max_length"):
        train(1, runs / "saved", settings(trainer__total_training_steps=2, data__val_files=data, data__max_length=256))
    assert (runs / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert load_speculator(runs / "saved").n_predict == 3


def test_logger_that_fails_stops_before_the_base_loads(runs, settings, base):
    """What the checks cannot know is still found before anything heavy. Here the log is a folder, and the base model
    has weights that nobody can read: they would be the error if they were read first."""
    broken = shutil.copytree(base, runs / "broken")
    (broken / "model.safetensors").write_text("no weights")
    runs.joinpath("refused.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^trainer.logger=file: .* is a directory, expected a file"):
        train(1, runs / "refused", settings(model__partial_pretrain=broken))


def test_log_of_an_earlier_run_outlives_a_run_that_does_not_train(uninterrupted, runs, settings, base):
    """One that ends while its base model loads, and one whose last step is reached already."""
    broken = shutil.copytree(base, runs / "unreadable")
    (broken / "model.safetensors").write_text("no weights")
    log = shutil.copy(runs / "one.jsonl", runs / "failed.jsonl")
    before = log.read_bytes()
    with pytest.raises(UserError, match="cannot be loaded"):
        train(1, runs / "failed", settings(model__partial_pretrain=broken))
    assert log.read_bytes() == before
    assert train(1, runs / "one", settings()) == uninterrupted


def test_plain_text_beyond_the_epochs_keeping_one_checkpoint(runs, base):
    """A text column; more steps than epochs give; no validation files; a limit on checkpoints."""
    rows = [{"text": " ".join(WORDS[i % 7 : i % 7 + 9])} for i in range(24)]
    parquet = write_parquet(runs / "text.parquet", rows)
    more = {"trainer__total_training_steps": 5, "trainer__save_freq": 2, "trainer__max_ckpt_to_keep": 1}
    found = train(1, runs / "text", overrides(base, parquet, trainer__test_freq=2, **more))
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert [entry.name for entry in (runs / "text").glob("global_step_*")] == ["global_step_5"]
    assert not any(key.startswith("val/") for metrics in found.values() for key in metrics)


@pytest.mark.slow
def test_the_guides_commands(runs, base, chat):
    """With a small local base in place of the named ones, and few rows; all else as the guide has it."""
    val = write_parquet(runs / "val.parquet", make_chat_rows(6, seed=1))
    small = ("data.train_batch_size=16", "trainer.device=cpu", "trainer.logger=[console,file]")
    commands = [
        (2, "speculator-checkpoints", [f"data.train_files={chat}", f"data.val_files={val}"]),
        (2, "speculator-qwen", ["n_predict=3", "inner_dim=512", "emb_dim=512", "proj_dim=512", "method=sum_rnn"]),
        (
            4,
            "speculator-lstm",
            [
                *("n_predict=5", 'inner_dim="1024.2048"', 'emb_dim="1024.2048"', "proj_dim=1024.2048"),
                *("method=sum_lstm", "tie_lstm_embs=true", "optim.lr=5e-5", "trainer.total_epochs=3"),
            ],
        ),
    ]
    for processes, name, given in commands:
        named = [text if text.split("=")[0].count(".") else f"model.speculator.{text}" for text in given]
        data = [] if any(text.startswith("data.") for text in given) else [f"data.train_files={chat}"]
        micro = "data.micro_batch_size_per_gpu=4"
        log = runs / f"{name}.jsonl"
        result = script(
            *(processes, runs / name, f"model.partial_pretrain={base}", *named, *data, *small, micro),
            VERL_FILE_LOGGER_PATH=str(log),
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "verl_speculator.train: device cpu, compute type fp32, attention sdpa" in result.stderr
        metrics = read_log(log)
        losses = [metrics[step]["train/loss"] for step in sorted(metrics)]
        assert losses[-1] < losses[0]
        assert load_speculator(runs / name).n_predict == (3 if name == "speculator-qwen" else 5)
    config = json.loads((runs / "speculator-lstm" / "global_step_6" / "config.json").read_text())
    assert [config[f"{dim}_dim"] for dim in ("inner", "emb", "proj")] == ["1024.2048"] * 3
    assert not Path("outputs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent dies")
def test_workers_end_when_the_launcher_is_killed(settings, tmp_path):
    """By SIGKILL, which torchrun cannot pass on (docs/troubleshooting.md)."""
    log = tmp_path / "log.jsonl"
    arguments = settings(trainer__total_training_steps=100_000, trainer__save_freq=100_000, trainer__logger="file")
    command = [SCRIPT, "2", str(tmp_path / "out"), *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment(VERL_FILE_LOGGER_PATH=str(log)), **quiet)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    try:
        workers = [child for child in children if "verl_speculator.train" in child.cmdline()]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert len(workers) == 2
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    finally:
        for child in children:
            if child.is_running():
                child.kill()
