"""The sweep: points, files, failures, tables and pictures by themselves, then whole sweeps on a tiny base."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helpers.sweep_trials import finish_without_training
from helpers.training_runs import environment
from verl_speculator.evaluation.plots import STYLE
from verl_speculator.sweep.report import axis_figures, is_sweep, number, plot_sweep, read_results, recommendations
from verl_speculator.sweep.run import check_sweep, sweep
from verl_speculator.sweep.settings import (
    EVALUATION_KEYS,
    Refinement,
    SweepOptions,
    SweepSettings,
    hydra_value,
    labels_of,
    make_points,
    read_settings,
    split_list,
    unquoted,
)
from verl_speculator.sweep.trial import (
    divergence,
    failure_of,
    has_diverged,
    read_metrics,
    read_record,
    run_subprocess,
    training_seconds,
    trial_directory,
)
from verl_speculator.utils.settings import UserError

DEPTH, LR, METHOD = "model.speculator.n_predict", "optim.lr", "model.speculator.method"

# Points.


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from("123456"), min_size=1, unique=True), min_size=1)
)
@hypothesis_settings(deadline=None)
def test_make_points_axes_give_their_product_each_point_once(axes):
    points = make_points(axes)
    count = 1
    for values in axes.values():
        count *= len(values)
    assert len(points) == count == len({tuple(sorted(point.items())) for point in points})
    assert all(point[name] in values for point in points for name, values in axes.items())


def test_make_points_listed_points_are_combined_with_the_axes():
    listed = [{METHOD: "sum_rnn"}, {METHOD: "sum_lstm", "model.speculator.tie_lstm_embs": "true"}]
    points = make_points({DEPTH: ["2", "3"]}, listed)
    assert points == [one | {DEPTH: depth} for one in listed for depth in ("2", "3")]
    assert make_points({}, listed) == listed
    with pytest.raises(UserError, match=r"points\[1\]: model.speculator.tie_lstm_embs is an axis too"):
        make_points({"model.speculator.tie_lstm_embs": ["true"]}, listed)


def test_make_points_refined_axis_puts_coarse_values_first():
    refine = Refinement("exit", ("3", "1"), ("0", "1", "2", "3"))
    points = make_points({"t": ["1", "2"]}, (), refine)
    assert [(p["t"], p["exit"]) for p in points[:4]] == [("1", "3"), ("1", "1"), ("2", "3"), ("2", "1")]
    assert [(p["t"], p["exit"]) for p in points[4:]] == [("1", "0"), ("1", "2"), ("2", "0"), ("2", "2")]
    with pytest.raises(UserError, match=r"refine\.axis=t: is one of axes too"):
        make_points({"t": ["1"]}, (), Refinement("t", ("1",), ("1",)))


def test_labels_of_points_name_the_settings_that_differ():
    points = [{METHOD: "sum_rnn", DEPTH: "3", LR: "1e-3"}, {METHOD: "sum_lstm", DEPTH: "2", LR: "1e-3"}]
    assert labels_of(points) == ["sum_rnn, n_predict=3", "sum_lstm, n_predict=2"]
    assert labels_of(points[:1]) == ["sum_rnn, n_predict=3, lr=1e-3"]
    assert labels_of([{"a.x": "1", "b.x": "1"}, {"a.x": "2", "b.x": "1"}]) == ["a.x=1", "a.x=2"]
    assert labels_of([{}]) == ["default"]


# Files and command lines.

GOOD = {
    "base": "BASE",
    "train_files": "train.parquet",
    "prompts": "prompts.parquet",
    "out": "out",
    "axes": {DEPTH: ["2", "3"]},
}


def write_sweep_file(path: Path, **more) -> Path:
    """A sweep file; what is None is left out."""
    (path / "sweep.yaml").write_text(json.dumps({k: v for k, v in (GOOD | more).items() if v is not None}))
    return path / "sweep.yaml"


def test_read_settings_yaml_values_stay_as_they_are_written(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "base: b\ntrain_files: [a.parquet, 'a file.parquet']\nprompts: {chat: p.jsonl, maths: m.jsonl}\nout: o\n"
        "text: t.parquet\nevaluation: {num_prompts: 20, temperature: 0.5, allow_untrained: true, draft_length: null}\n"
        "settings: {optim.lr: 1e-4, model.speculator.loss: {kl: 1.0, tv: 1.0}, optim.betas: [0.9, 0.95]}\n"
        "axes: {model.speculator.inner_dim: [1024.2560, 512], temperatures: [1, 2]}\nnproc: 2\n"
    )
    found = read_settings(file)
    assert found.settings == {LR: "1e-4", "model.speculator.loss": "{kl:1.0,tv:1.0}", "optim.betas": "[0.9,0.95]"}
    assert found.points[0] == {"model.speculator.inner_dim": "1024.2560", "model.speculator.kl_temperature": "1"}
    here = Path.cwd()
    assert found.train_files == (str(here / "a.parquet"), str(here / "a file.parquet")) and found.out == here / "o"
    assert found.prompts == {"chat": here / "p.jsonl", "maths": here / "m.jsonl"}
    assert found.texts == {"t": here / "t.parquet"}
    assert hydra_value("a b") == "'a b'" and unquoted("'a b'") == "a b"
    assert found.evaluation == {"num_prompts": 20, "temperature": 0.5, "allow_untrained": True, "draft_length": None}
    assert found.nproc == 2


def test_read_settings_command_line_replaces_or_extends_the_file(tmp_path):
    options = SweepOptions(
        base="other",
        axis=(f"{LR}=1",),
        exit_layers="range(0,2)",
        set=("a.b=1",),
        evaluation=("num_prompts=3",),
        nproc=4,
    )
    settings = read_settings(write_sweep_file(tmp_path, evaluation={"num_texts": "5"}), options)
    assert (settings.base, settings.nproc, settings.out) == ("other", 4, Path.cwd() / "out")
    assert settings.settings == {"a.b": "1"}
    exit_layer = "model.speculator.exit_layer"
    assert settings.points == tuple({DEPTH: n, exit_layer: e, LR: "1"} for n in "23" for e in "01")
    assert settings.evaluation == {"num_texts": 5, "num_prompts": 3}
    with pytest.raises(UserError, match="--set a: expected NAME=VALUE"):
        read_settings(write_sweep_file(tmp_path), SweepOptions(set=("a",)))
    assert split_list(LR, "1e-3,'x y'", "--axis") == ["0.001", "'x y'"]
    assert split_list(DEPTH, "range(0,4)", "--axis") == ["0", "1", "2", "3"]
    assert split_list("model.speculator.inner_dim", "1024.2560, 512", "--axis") == ["1024.2560", "512"]
    assert split_list("model.speculator.loss", "{ce: 1, kl: 2},tv", "--axis") == ["{ce:1,kl:2}", "tv"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"axis": {}}, "axis is not a key (did you mean 'axes'?); known: base, train_files,"),
        ({"axes": {DEPTH: []}}, f"axes.{DEPTH}: an empty axis, expected at least one value"),
        ({"axes": {DEPTH: "3"}}, f"axes.{DEPTH}: expected a list of values such as [1, 2], got '3'"),
        ({"axes": {DEPTH: ["3", "3"]}}, f"axes.{DEPTH}: 3 stands there twice"),
        ({"axes": {"n_predict": ["3"]}}, "n_predict is no setting (did you mean 'model.speculator.n_predict'?)"),
        ({"axes": {"temperature": ["3"]}}, "temperature is no setting (did you mean 'temperatures'?)"),
        ({"axes": {"model.path": ["x"]}}, "axes: model.path is the sweep's own base"),
        ({"axes": None}, "nothing to sweep over: expected axes, points or refine"),
        ({"axes": ["a"]}, "axes: expected settings with a list of values each"),
        ({"points": []}, "points: expected a list of points"),
        ({"points": ["a"]}, "points[0]: expected settings with a value each, got 'a'"),
        ({"refine": {"axis": LR}}, "refine: expected axis, coarse, all"),
        ({"refine": {"axis": LR, "coarse": ["1"], "all": ["1"], "al": "1"}}, "al is not a key (did you mean 'all'?)"),
        ({"base": None}, "base is not set: expected a directory or a hub name"),
        ({"train_files": None}, "train_files is not set: expected one parquet file or a list of them"),
        ({"prompts": None}, "prompts is not set: expected a parquet or jsonl file of prompts"),
        ({"prompts": ["a/x.jsonl", "b/x.jsonl"]}, "prompts: two files are called x; expected names of their own"),
        ({"nproc": "0"}, "nproc=0: expected a positive integer"),
        ({"executor": "rai"}, "executor=rai: expected one of local, ray (did you mean 'ray'?)"),
        ({"evaluation": {"num_prompt": "3"}}, "num_prompt is not a key (did you mean 'num_prompts'?)"),
        ({"evaluation": {"num_prompts": "many"}}, "evaluation.num_prompts=many: Input should be a valid integer"),
        (
            {"evaluation": {"draft_length": "some"}},
            "evaluation.draft_length=some: Input should be a valid integer, unable to parse string as an integer, "
            "or Input should be 'auto'",
        ),
        ({"evaluation": {"temperature": "-1"}}, "temperature=-1.0: expected a number ≥ 0"),
    ],
)
def test_read_settings_bad_key_or_value_is_one_line(tmp_path, more, words):
    with pytest.raises(UserError) as error:
        read_settings(write_sweep_file(tmp_path, **more))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_read_settings_file_that_is_not_a_sweep_is_refused(tmp_path):
    for content, words in (
        ("a: [", "not YAML"),
        ("out: a\nout: b\n", "out stands there twice"),
        ("a", "expected keys"),
    ):
        (tmp_path / "sweep.yaml").write_text(content)
        with pytest.raises(UserError, match=words):
            read_settings(tmp_path / "sweep.yaml")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_settings(tmp_path / "nothing.yaml")


def test_evaluation_keys_are_all_flags_of_evaluate():
    from typer.main import get_command

    from verl_speculator.__main__ import app

    flags = {flag for option in get_command(app).commands["evaluate"].params for flag in option.opts}
    assert {"--" + name.replace("_", "-") for name in EVALUATION_KEYS} <= flags


# What a training leaves behind.


def log_metrics(path: Path, steps: dict[int, float | None]) -> None:
    more = {"train/global_tokens": 100, "perf/tokens_per_second": 50.0}
    lines = [json.dumps({"step": step, "data": {"train/loss": loss} | more}) + "\n" for step, loss in steps.items()]
    path.write_text("".join(lines))


def test_read_metrics_several_attempts_keep_the_last_value_of_a_step(tmp_path):
    log_metrics(tmp_path / "metrics-001.jsonl", {1: 5.0, 2: 4.0})
    log_metrics(tmp_path / "metrics-002.jsonl", {2: 4.5, 3: 3.0})
    with (tmp_path / "metrics-002.jsonl").open("a") as file:
        file.write('{"step": 4, "da')
    found = read_metrics(tmp_path)
    assert {step: values["train/loss"] for step, values in found.items()} == {1: 5.0, 2: 4.5, 3: 3.0}
    assert training_seconds(found) == pytest.approx(6.0) and divergence(found) is None


def test_has_diverged_growing_file_is_seen_at_the_first_null_loss(tmp_path):
    """verl's file logger writes null for what is not finite."""
    path = tmp_path / "metrics-001.jsonl"
    assert not has_diverged(path)
    log_metrics(path, {1: 5.0})
    assert not has_diverged(path)
    with path.open("a") as file:
        file.write('{"step": 2, "data": {"train/lo')
    assert not has_diverged(path)
    log_metrics(path, {1: 5.0, 2: None})
    assert has_diverged(path) and divergence(read_metrics(tmp_path)) == "the loss is not finite from step 2 on"


@pytest.mark.parametrize(
    ("code", "log", "status", "reason"),
    [
        (2, "bla\nerror: optim.lr=x: expected a number\n", "failed", "optim.lr=x: expected a number"),
        (
            1,
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nChildFailedError: \n",
            "out of memory",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (
            1,
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
            "out of memory",
            "RuntimeError: [enforce fail]",
        ),
        (
            1,
            "traceback : Signal 9 (SIGKILL) received by PID 5\n",
            "failed",
            "killed by SIGKILL, which is what the system",
        ),
        (-9, "", "failed", "killed by SIGKILL, which is what the system does when memory runs out"),
        (-15, "", "failed", "ended by SIGTERM"),
        (1, "[rank0]: ValueError: no such thing\nmore\n", "failed", "ValueError: no such thing"),
        (1, "ValueError: a\ntorch.distributed.ChildFailedError: \n", "failed", "ValueError: a"),
        (3, "nothing to see\n", "failed", "exit code 3"),
    ],
)
def test_failure_of_log_gives_status_and_reason(tmp_path, code, log, status, reason):
    (tmp_path / "log").write_text("RuntimeError: of an attempt before\n" + log)
    failure = failure_of(code, tmp_path / "log", start=35)
    assert failure["status"] == status and failure["reason"].startswith(reason)


# A child, whose own children live in sessions of their own, as torchrun's do.

PARENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def end(*_):
    child.terminate()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
print(child.pid, flush=True)
time.sleep(600)
"""


def assert_ends(pid: int, within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def pid_in(log: Path) -> int:
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(log.read_text())


def test_run_subprocess_stopped_ends_its_descendants(tmp_path):
    log = tmp_path / "log"
    failure = run_subprocess((sys.executable, "-c", PARENT), log, environment(), lambda: bool(log.read_text()))
    assert failure["status"] == "failed"
    assert_ends(pid_in(log), within=1)
    for code, record in (("raise SystemExit(3)", {"status": "failed", "reason": "exit code 3"}), ("pass", {})):
        assert run_subprocess((sys.executable, "-c", code), log, environment()) == record


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_subprocess_does_not_outlive_its_parent(tmp_path, kind):
    log = tmp_path / "log"
    code = (
        "import os, signal, sys; from pathlib import Path; from verl_speculator.sweep.trial import run_subprocess\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        # A shell starts what runs in its background with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"run_subprocess([sys.executable, '-c', {PARENT!r}], Path({str(log)!r}), os.environ)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.DEVNULL)
    grandchild = pid_in(log)
    process.send_signal(kind)
    process.wait(60)
    assert_ends(grandchild)


# Tables and pictures.


def result_rows(layers=(0, 1, 2), words=("head", "head_and_block"), **more) -> list[dict]:
    from helpers.result_tables import RNN, line

    rows = []
    for layer in layers:
        for word in words:
            row = line(RNN, level=0.2 + 0.2 * layer)
            label = f"exit_layer={layer}, trainable={word}"
            head = {"point": label, "model.speculator.exit_layer": layer, "model.speculator.trainable": word}
            head |= {"status": "done", "reason": "", "training_seconds": 1.0, "parameters": 1000 * (1 + layer)}
            row |= {"accepted": row["tau"] - 1, "tv": 0.5, "top1": 0.3, "rounds": 100, "speculator": label}
            rows.append(head | row | {"text": "chat.parquet", "kl@web": 2.0, "top1@web": 0.2} | more)
    failed = {
        "point": "bad",
        "model.speculator.exit_layer": 9,
        "status": "diverged",
        "reason": "why",
        "speculator": "bad",
    }
    return [*rows, failed | {name: rows[0][name] for name in ("base", "prompts")}]


def test_plot_sweep_numeric_axis_has_quality_acceptance_and_histogram(tmp_path):
    import matplotlib

    from helpers.result_tables import write

    write(tmp_path / "results.csv", result_rows())
    assert is_sweep(tmp_path)
    drawn = {path.name for path in plot_sweep(tmp_path)}
    for name in ("exit_layer_quality", "exit_layer_acceptance", "exit_layer_histogram", "speedup_against_quality"):
        assert {f"{name}.png", f"{name}.pdf"} <= drawn
    assert not any(name.startswith("trainable") for name in drawn)
    with matplotlib.rc_context(STYLE):
        figures = dict(axis_figures(read_results(tmp_path)))
    quality = figures["exit_layer_quality"]
    # KL, CE and top-1, of the text and of the other one, which has no CE; a line for each word.
    assert len(quality.axes) == 6 and [axis.get_title(loc="left") for axis in quality.axes[::3]] == ["chat", "web"]
    assert {text.get_text() for text in quality.legends[0].get_texts()} == {
        "trainable=head",
        "trainable=head_and_block",
    }
    assert list(quality.axes[0].lines[0].get_xdata()) == [0, 1, 2]
    assert len(figures["exit_layer_histogram"].axes) == 2


def test_plot_sweep_many_points_leave_out_plots_per_point(tmp_path):
    from helpers.result_tables import write

    write(tmp_path / "results.csv", result_rows(layers=range(11)))
    drawn = {path.stem for path in plot_sweep(tmp_path)}
    assert "acceptance_per_depth" not in drawn and {"speedup_against_quality", "exit_layer_acceptance"} <= drawn


def test_plot_sweep_without_finished_point_draws_nothing(tmp_path):
    from helpers.result_tables import write

    write(tmp_path / "results.csv", result_rows()[-1:])
    assert plot_sweep(tmp_path) == []


def test_recommendations_best_and_smallest_within_tolerance():
    def row(name, tau, speedup, parameters, status="done"):
        return {"point": name, "tau": tau, "speedup": speedup, "parameters": parameters, "status": status}

    rows = [
        row("large", 3.0, 1.5, 900),
        row("small", 2.95, 1.4, 100),
        row("tiny", 2.0, 1.6, 10),
        row("x", "", "", "", "failed"),
    ]
    assert [(what, found["point"]) for what, found in recommendations(rows)] == [
        ("best τ", "large"),
        ("smallest within 2% of it", "small"),
        ("best speedup", "tiny"),
        ("smallest within 2% of it", "tiny"),
    ]
    assert recommendations(rows[3:]) == [] and number({"a": None}, "a") != number({"a": None}, "a")


# Whole sweeps.

SMALL = {
    "trainer.total_training_steps": "2",
    "trainer.device": "cpu",
    "data.train_batch_size": "8",
    "data.num_workers": "0",
    **{f"model.speculator.{name}_dim": "16" for name in ("inner", "emb", "proj")},
}


def make_settings(base_: Path, chat: Path, out: Path, points, **more) -> SweepSettings:
    few = {"num_prompts": 2, "num_texts": 2, "max_new_tokens": 6, "warmup_steps": 0}
    return SweepSettings(
        **{
            "base": str(base_),
            "train_files": (str(chat),),
            "prompts": {"chat": chat},
            "texts": {"chat": chat},
            "out": out,
            "settings": SMALL,
            "points": tuple(points),
            "evaluation": few,
        }
        | more
    )


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sweep_file(folder: Path, base: Path, chat: Path, points) -> Path:
    content = {
        "base": str(base),
        "train_files": str(chat),
        "prompts": {"chat": str(chat)},
        "text": {"chat": str(chat)},
        "out": str(folder / "out"),
        "settings": SMALL,
        "points": points,
        "evaluation": {
            **{"num_prompts": "2", "num_texts": "2", "max_new_tokens": "6", "warmup_steps": "0"},
            "draft_length": "auto",
        },
    }
    (folder / "sweep.yaml").write_text(json.dumps(content))
    return folder / "sweep.yaml"


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "verl_speculator", "sweep", *map(str, arguments)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, base, chat):
    """A good point and one that diverges; killed in the second, and started again."""
    folder = tmp_path_factory.mktemp("sweep")
    file = sweep_file(folder, base, chat, [{DEPTH: "2", LR: "5e-2"}, {DEPTH: "3", LR: "1e30"}])
    process = subprocess.Popen(command(file), env=environment(), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("[2/2]"):
            break
    time.sleep(2)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "lr=5e-2" in str(path)}
    assert left
    for child in left:
        assert_ends(child.pid, within=45)
    result = subprocess.run(command(file, "--no-plots"), env=environment(), capture_output=True, text=True)
    return folder, file, first, result


def test_sweep_failed_point_is_named_and_a_good_one_is_done(swept):
    folder, _, _, result = swept
    assert result.returncode == 1, result.stderr
    good, bad = table(folder / "out")
    assert (good["point"], good["status"], good[DEPTH], good[LR]) == ("n_predict=2, lr=5e-2", "done", "2", "5e-2")
    assert int(good["parameters"]) > 0 and float(good["training_seconds"]) > 0 and float(good["final_loss"]) > 0
    assert Path(good["checkpoint"]).name == "global_step_2" and good["method"] == "sum_rnn"
    for name in ("tau", "accept_rate", "tv", "speedup", "kl", "ce", "perplexity", "top1", "hist_0", "tau_lo", "kl_hi"):
        float(good[name])
    assert (bad["status"], bad["reason"]) == ("diverged", "the loss is not finite from step 2 on")
    assert bad["tau"] == "" and Path(bad["log"]).is_file()
    assert "diverged: n_predict=3, lr=1e30: the loss is not finite" in result.stdout
    assert "Which one to train" in result.stdout and "1 of 2 points failed" in result.stderr
    assert not (folder / "out" / "plots").exists()


def test_sweep_after_kill_keeps_finished_trials(swept):
    _, _, first, result = swept
    assert first and all(path.stat().st_mtime_ns == before for path, before in first.items())
    assert "1 of 2 points are done already" in result.stderr


def test_sweep_changed_point_alone_is_trained_again(swept, base, chat):
    folder, _, first, _ = swept
    file = sweep_file(folder, base, chat, [{DEPTH: "2", LR: "5e-2"}, {DEPTH: "3", LR: "1e-2"}])
    listed = subprocess.run(command(file, "--dry-run"), env=environment(), capture_output=True, text=True)
    assert listed.returncode == 0 and "2 points, 1 to be trained" in listed.stdout
    assert len(list((folder / "out" / "points").iterdir())) == 2
    result = subprocess.run(command(file), env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [(row["point"], row["status"]) for row in table(folder / "out")] == [
        ("n_predict=2, lr=5e-2", "done"),
        ("n_predict=3, lr=1e-2", "done"),
    ]
    assert all(path.stat().st_mtime_ns == before for path, before in first.items() if path.name != "point.json")
    drawn = {path.name for path in (folder / "out" / "plots").glob("*.pdf")}
    names = ("n_predict_quality", "n_predict_acceptance", "n_predict_histogram", "lr_quality")
    assert {f"{name}.pdf" for name in (*names, "accepted_length_histogram")} <= drawn
    assert not list(folder.rglob(".tmp.*"))


@pytest.mark.parametrize(
    ("points", "more", "words"),
    [
        ([{DEPTH: "2"}, {DEPTH: "0"}], {}, "point n_predict=0: model.speculator.n_predict=0: expected an integer"),
        ([{"optim.lrr": "1"}], {}, "point lrr=1: optim.lrr is not a setting (did you mean 'optim.lr'?)"),
        ([{DEPTH: "2"}], {"base": "/no/such/base"}, "base=/no/such/base: no such directory"),
        ([{DEPTH: "2"}], {"train_files": ("none.parquet",)}, "data.train_files=none.parquet: no such file"),
        ([{DEPTH: "2"}], {"prompts": {"a": Path("none.jsonl")}}, "none.jsonl: no such file"),
        ([{DEPTH: "2"}], {"texts": {"a": Path("none.jsonl")}}, "none.jsonl: no such file"),
        (
            [{DEPTH: "2"}],
            {"evaluation": {"draft_length": 3}},
            "point n_predict=2: evaluation.draft_length=3: expected 1 to 2, the speculator's n_predict",
        ),
        ([{DEPTH: "2"}], {"evaluation": {"dtype": "fp23"}}, "evaluation.dtype=fp23: expected auto, fp32"),
        ([{DEPTH: "2"}], {"evaluation": {"device": "gpu0"}}, "evaluation.device=gpu0: expected auto, cpu"),
        ([{"data.train_batch_size": "9"}], {"nproc": 2}, "not divisible by 2 processes"),
    ],
)
def test_check_sweep_bad_point_is_refused_before_training(base, chat, tmp_path, points, more, words):
    with pytest.raises(UserError) as error:
        check_sweep(make_settings(base, chat, tmp_path / "out", points, **more))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", ["auto", None, 2])
def test_check_sweep_draft_length_reaches_the_evaluation(base, chat, tmp_path, length):
    from verl_speculator.decoding.options import read_length

    (trial,) = check_sweep(
        make_settings(base, chat, tmp_path / "out", [{DEPTH: "2"}], evaluation={"draft_length": length})
    )
    arguments = trial.measurements[0].arguments
    given = arguments[arguments.index("--draft-length") + 1] if "--draft-length" in arguments else None
    assert read_length(given) == length


def test_sweep_command_user_error_is_one_line_and_exit_code_2(base, chat, tmp_path):
    files = ("--base", base, "--train-files", chat, "--prompts", chat, "--out", tmp_path / "out")
    arguments = (*files, "--set", "data.train_batch_size=8", "--axis", f"{DEPTH}=2,-1")
    result = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: point n_predict=-1: ") and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_check_sweep_identity_depends_on_settings_and_content_alone(base, bases, chat, tmp_path):
    def identities(points, **more):
        return [trial.identity for trial in check_sweep(make_settings(base, chat, tmp_path, points, **more))]

    (first,) = identities([{DEPTH: "3"}])
    assert identities([{DEPTH: "3"}, {DEPTH: "3", LR: "1e-4"}]) == [first]  # the default, named or not
    moved = shutil.copytree(base, tmp_path / "moved")
    same = [{"base": str(moved)}, {"settings": SMALL | {"trainer.logger": "console"}}, {"evaluation": {"num_texts": 9}}]
    assert all(identities([{DEPTH: "3"}], **more) == [first] for more in same)
    assert identities([{DEPTH: "2"}]) != [first]
    assert identities([{DEPTH: "3"}], base=str(bases["qwen2_untied"])) != [first]
    assert identities([{DEPTH: "3"}], settings=SMALL | {"trainer.total_training_steps": "3"}) != [first]
    # Found again under another label.
    place = trial_directory(tmp_path, "one", first)
    place.mkdir(parents=True)
    assert trial_directory(tmp_path, "another", first) == place.absolute()


def test_check_sweep_each_text_and_prompt_set_is_measured(base, chat, tmp_path):
    sets = {"prompts": {"a": chat, "b": chat.with_name("b.parquet")}, "texts": {"c": chat, "d": chat}}
    shutil.copy(chat, sets["prompts"]["b"])
    (trial,) = check_sweep(make_settings(base, chat, tmp_path, [{DEPTH: "2"}], **sets))
    main, further = trial.measurements
    assert main.arguments.count("--prompts") == 2 and main.text == "c" and further.text == "d"
    assert further.arguments[-2:] == ("--text", str(chat)) and further.prompt_sets == {}
    sets["prompts"] = {"a": chat}
    (other,) = check_sweep(make_settings(base, chat, tmp_path, [{DEPTH: "2"}], **sets))
    assert other.directory == trial.directory and other.measured != trial.measured


# Ray.


def test_sweep_ray_executor_names_the_trial_whose_process_died(base, chat, tmp_path, monkeypatch):
    """Two small tasks and one whose process dies, on workers of a cluster of this machine's."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the workers
    monkeypatch.setattr("verl_speculator.sweep.run.run_trial", finish_without_training)
    told: list[str] = []
    settings = make_settings(base, chat, tmp_path / "out", [{DEPTH: "2"}, {DEPTH: "3"}, {DEPTH: "4"}], executor="ray")
    rows = sweep(settings, told.append)
    assert [row["status"] for row in rows] == ["done", "done", "failed"] and len(told) == 3
    assert rows[2]["reason"].startswith("Ray: ")
    pids = {
        read_record(path)["pid"] for path in (tmp_path / "out").rglob("training.json") if "pid" in read_record(path)
    }
    assert pids and os.getpid() not in pids
