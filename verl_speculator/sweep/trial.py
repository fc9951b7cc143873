"""One trial: a point trained by the launcher and measured by `evaluate`, in subprocesses; what is done is kept."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from verl_speculator.sweep.settings import Values
from verl_speculator.utils.atomic_io import atomic_file, remove_directory

POINTS = "points"
TRAINING, EVALUATION, POINT = "training.json", "evaluation.json", "point.json"
TRAINING_LOG, EVALUATION_LOG = "training.log", "evaluation.log"
METRICS, LOSS = "metrics-*.jsonl", "train/loss"
DONE, DIVERGED, OUT_OF_MEMORY, FAILED, WAITING = "done", "diverged", "out of memory", "failed", "waiting"
# Columns of further prompt sets and of further texts, each with its interval.
BEHAVIOUR = ("tau", "accepted", "accept_rate", "overlap", "tv", "speedup", "prompts_used")
QUALITY = ("ce", "perplexity", "kl", "top1", "top5", "text_rows")
# A trial trains on one machine, even if the sweep is part of a job on several.
OTHER_MACHINES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
POLL_SECONDS = 0.5
# torchrun gives its workers 30 seconds before it kills them.
GRACE_SECONDS = 40.0

Record = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One call of `verl-speculator evaluate`."""

    directory: Path  # of its results
    arguments: tuple[str, ...]  # of the command, without the checkpoint
    prompt_sets: dict[str, str]  # names of the reported prompt sets, by file
    text: str | None  # name of the reported text


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, with its state on the disk."""

    label: str  # in tables and messages
    values: Values  # the point's settings
    overrides: tuple[str, ...]  # all settings of its training
    identity: Record  # equal for a finished training that need not be repeated
    directory: Path  # of all its files
    processes: int  # of its training
    measurements: tuple[Measurement, ...]  # the first one's figures have no suffix
    measured: Record  # equal for a finished evaluation that need not be repeated

    def training(self) -> Record:
        """Status and figures of its training; empty before."""
        return read_record(self.directory / TRAINING)

    def evaluation(self) -> Record:
        """Status and figures of its evaluation; empty before, or if something else was measured."""
        record = read_record(self.directory / EVALUATION)
        return record if record.get("measured") == self.measured else {}

    @property
    def status(self) -> str:
        """DONE, WAITING, or how it failed."""
        training, evaluation = (record.get("status", WAITING) for record in (self.training(), self.evaluation()))
        return evaluation if training == DONE else training

    @property
    def reason(self) -> str:
        """Why it failed, empty if it did not."""
        return self.training().get("reason") or self.evaluation().get("reason") or ""

    def write_outcome(self, record: Record) -> None:
        """Record the outcome of the training, or of the evaluation where the training is done."""
        if self.training().get("status") == DONE:
            write_record(self.directory / EVALUATION, record | {"measured": self.measured})
        else:
            write_record(self.directory / TRAINING, record)

    def write_failure(self, error: str) -> None:
        """Record an error outside of training and evaluation."""
        self.write_outcome(failure(FAILED, error))


def failure(status: str, reason: str) -> Record:
    """The record of a failure, with the reason in one line."""
    return {"status": status, "reason": " ".join(reason.split())[:300]}


def digest(identity: Mapping[str, Any]) -> str:
    """A short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def trial_directory(out: Path, label: str, identity: Mapping[str, Any]) -> Path:
    """The directory of an identity, whatever its label was, or else a new one that begins with the label."""
    key = digest(identity)
    existing = sorted((out / POINTS).glob(f"*-{key}"))
    slug = re.sub(r"[^\w.=-]+", "_", label)[:60]
    return (existing[0] if existing else out / POINTS / f"{slug}-{key}").absolute()


def read_record(path: Path) -> Record:
    """A JSON file; empty if it does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, default=str) + "\n")


def run_trial(trial: Trial) -> None:
    """Train and evaluate a trial as far as that is not done; every failure is recorded."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    write_record(trial.directory / POINT, {"label": trial.label, "settings": trial.values, "identity": trial.identity})
    try:
        if trial.training().get("status") != DONE:
            trial.write_outcome(_train(trial))
        if trial.training()["status"] == DONE and trial.evaluation().get("status") != DONE:
            trial.write_outcome(_evaluate(trial))
    except Exception as error:  # such as a full disk; the other trials go on
        trial.write_failure(f"{type(error).__name__}: {error}")


def _train(trial: Trial) -> Record:
    """Outcome of a training. A killed one goes on from its last checkpoint, a diverged one begins anew."""
    run_directory = trial.directory / "run"  # the launcher's save path
    if trial.training().get("status") == DIVERGED:
        if run_directory.exists():
            remove_directory(run_directory)
        for path in trial.directory.glob(METRICS):
            path.unlink()
    log = trial.directory / TRAINING_LOG
    # A file for each attempt: verl's logger empties the file that it opens.
    attempt = len(list(trial.directory.glob(METRICS))) + 1
    metrics_file = trial.directory / METRICS.replace("*", f"{attempt:03d}")
    command = ("verl_speculator.preflight.launch", str(trial.processes), str(run_directory), *trial.overrides)
    environment = _environment() | {"VERL_FILE_LOGGER_PATH": str(metrics_file)}
    stopped = run_subprocess((sys.executable, "-m", *command), log, environment, lambda: has_diverged(metrics_file))
    metrics = read_metrics(trial.directory)
    last_step = max(metrics, default=0)
    figures = {
        "training_seconds": round(training_seconds(metrics), 3),
        "steps": last_step,
        "final_loss": metrics[last_step].get(LOSS) if metrics else None,
        "log": str(log),
    }
    if reason := divergence(metrics):
        return {"status": DIVERGED, "reason": reason} | figures
    if stopped:
        return stopped | figures
    from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights

    info = read_checkpoint_info(run_directory)
    parameters = sum(tensor.numel() for tensor in read_weights(info).values() if tensor.is_floating_point())
    return {"status": DONE, "checkpoint": str(info.directory), "parameters": parameters} | figures


def _evaluate(trial: Trial) -> Record:
    """Outcome of an evaluation: figures of the first prompt set and text, and those of the others with a suffix."""
    log, checkpoint = trial.directory / EVALUATION_LOG, trial.training()["checkpoint"]
    figures: Record = {}
    for measurement in trial.measurements:
        output = ("--speculator", checkpoint, "--out", str(measurement.directory))
        command = (sys.executable, "-m", "verl_speculator", "evaluate", *measurement.arguments, *output)
        if stopped := run_subprocess(command, log, _environment()):
            return stopped | {"reason": f"evaluation: {stopped['reason']}", "log": str(log)}
        with (measurement.directory / "results.csv").open(newline="") as file:
            # The first row of each prompt set.
            rows: dict[str, Record] = {}
            for row in csv.DictReader(file):
                if row["speculator"] == checkpoint:
                    rows.setdefault(row["prompts"], row)
        if not rows:
            return {"status": FAILED, "reason": "evaluation: no prompt fits the base", "log": str(log)}
        prompt_sets = list(measurement.prompt_sets.items())
        if measurement is trial.measurements[0]:
            figures |= rows.get(prompt_sets[0][0], {})
        else:
            figures |= _with_suffix(next(iter(rows.values())), QUALITY, measurement.text)
        for path, name in prompt_sets[1:]:
            figures |= _with_suffix(rows.get(path, {}), BEHAVIOUR, name)
    return {"status": DONE, "figures": figures}


def _with_suffix(row: dict[str, str], names: tuple[str, ...], suffix: str | None) -> dict[str, str]:
    """Figures with their intervals, as `name@suffix`."""
    columns = [f"{name}{end}" for name in names for end in ("", "_lo", "_hi")]
    return {f"{column}@{suffix}": row[column] for column in columns if column in row}


def _environment() -> dict[str, str]:
    """Of a command that runs on this machine alone."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OTHER_MACHINES and not name.startswith(("PET_", "TORCHELASTIC_"))
    }


def run_subprocess(
    command: Sequence[str], log: Path, environment: Mapping[str, str], should_stop: Callable[[], bool] = lambda: False
) -> Record:
    """Run a command until it ends or should stop, and end all its descendants; its output is appended to a log.

    Returns status and reason of a failure; empty for exit code 0.
    """
    # Ends the command when this process is gone.
    parent_death = (sys.executable, "-m", "verl_speculator.utils.process", str(os.getpid()))
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    descendants: set[psutil.Process] = set()
    with log.open("ab") as output:
        # In a session of its own: a Ctrl-C reaches this process alone, which then ends the command in order.
        process = subprocess.Popen(
            [*parent_death, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            while process.poll() is None and not should_stop():
                with suppress(psutil.NoSuchProcess):
                    # Collected on the way: a worker whose torchrun was killed has no parent any more.
                    descendants.update(psutil.Process(process.pid).children(recursive=True))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            _end(process, descendants)
    return failure_of(process.returncode, log, start) if process.returncode else {}


def _end(process: subprocess.Popen, descendants: set[psutil.Process]) -> None:
    """Ask a process to end, wait, and kill what is left of it and of its descendants."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            descendants.update(psutil.Process(process.pid).children(recursive=True))
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = [descendant for descendant in descendants if descendant.is_running()]
    for act in (psutil.Process.terminate, psutil.Process.kill):
        for descendant in left:
            with suppress(psutil.NoSuchProcess):
                act(descendant)
        _, left = psutil.wait_procs(left, timeout=3)


TAIL_BYTES = 200_000
MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|Cannot allocate memory|\bMemoryError\b",
    re.IGNORECASE,
)
# torchrun's own summary of a worker that failed names no cause.
RAISED = re.compile(
    r"^(?:\[rank\d+\]: ?)?(?!(?:[\w.]+\.)?ChildFailedError)((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)$"
)
USER_ERROR = re.compile(r"^error: (.*)$")


def failure_of(code: int, log: Path, start: int = 0) -> Record:
    """Status and reason in one line, from an exit code (negative for a signal) and the log from byte `start` on."""
    text = _tail(log, start)
    lines = [line.strip() for line in text.splitlines()]
    raised, user_errors = ([m[1] for line in lines if (m := form.match(line))] for form in (RAISED, USER_ERROR))
    if memory := [line for line in raised if MEMORY.search(line)]:
        return failure(OUT_OF_MEMORY, memory[0])
    if user_errors or raised:
        reason = (user_errors or raised)[-1]
    elif code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Signal 9 (SIGKILL)" in text:
        reason = "killed by SIGKILL, which is what the system does when memory runs out"
    else:
        reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return failure(FAILED, reason)


def _tail(file: Path, start: int = 0) -> str:
    with file.open("rb") as content:
        content.seek(max(start, file.stat().st_size - TAIL_BYTES))
        return content.read().decode(errors="replace").replace("\r", "\n")


def read_metrics(directory: Path) -> dict[int, Record]:
    """Metrics by step, over all attempts; of a repeated step those of the last attempt."""
    lines = "\n".join(path.read_text() for path in sorted(directory.glob(METRICS)))
    return dict(sorted(_parse_metrics(lines).items()))


def _parse_metrics(text: str) -> dict[int, Record]:
    """Metrics by step of all whole lines."""
    metrics = {}
    for line in text.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            metrics[entry["step"]] = entry["data"]
    return metrics


def divergence(metrics: Mapping[int, Record]) -> str | None:
    """Where the loss stopped being finite; verl's logger writes null for that. None where it never did."""
    for step, values in metrics.items():
        if LOSS in values and (values[LOSS] is None or not math.isfinite(values[LOSS])):
            return f"the loss is not finite from step {step} on"
    return None


def has_diverged(metrics_file: Path) -> bool:
    """Whether the run that writes this file has diverged lately; half a last line is ignored."""
    return metrics_file.exists() and divergence(_parse_metrics(_tail(metrics_file))) is not None


def training_seconds(metrics: Mapping[int, Record]) -> float:
    """Time spent in training steps, without starting, validating and saving."""
    return sum(
        values["train/global_tokens"] / values["perf/tokens_per_second"]
        for values in metrics.values()
        if values.get("perf/tokens_per_second")
    )
