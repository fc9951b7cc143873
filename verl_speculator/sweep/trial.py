"""One point, trained by the launcher and measured by the evaluation in processes of their own; what is done is kept."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from verl_speculator.sweep.grid import Values
from verl_speculator.utils.atomic_io import atomic_file, remove_directory

POINTS = "points"
TRAINING, EVALUATION, POINT = "training.json", "evaluation.json", "point.json"
DONE, DIVERGED, OUT_OF_MEMORY, FAILED, WAITING = "done", "diverged", "out of memory", "failed", "waiting"


@dataclass(frozen=True)
class Measurement:
    """One call of the evaluation.

    Attributes:
        directory: of its results.
        arguments: of `verl-speculator evaluate`, without the checkpoint.
        behaviour: names of the prompt sets that are reported, by file.
        quality: name of the text whose figures are reported, None for none.
    """

    directory: Path
    arguments: tuple[str, ...]
    behaviour: dict[str, str]
    quality: str | None


@dataclass(frozen=True)
class Trial:
    """One point of a sweep.

    Attributes:
        label: what a person calls it.
        values: its settings.
        overrides: all settings of its training.
        identity: what makes its training this one.
        directory: all that belongs to it.
        processes: of its training.
        measurements: calls of the evaluation; the first one's figures are the point's own.
        measured: what makes its evaluation this one.
    """

    label: str
    values: Values
    overrides: tuple[str, ...]
    identity: dict[str, Any]
    directory: Path
    processes: int
    measurements: tuple[Measurement, ...]
    measured: dict[str, Any]

    @property
    def run(self) -> Path:
        """The launcher's save path."""
        return self.directory / "run"

    def training(self) -> dict[str, Any]:
        """The account of its training, empty if there is none."""
        return read_record(self.directory / TRAINING)

    def evaluation(self) -> dict[str, Any]:
        """The account of its evaluation, empty if there is none, or of another one."""
        found = read_record(self.directory / EVALUATION)
        return found if found.get("measured") == self.measured else {}

    @property
    def status(self) -> str:
        """DONE, WAITING, or how it failed."""
        for record in (self.training(), self.evaluation()):
            if record.get("status") != DONE:
                return record.get("status", WAITING)
        return DONE

    @property
    def reason(self) -> str:
        """Why it failed, empty if it did not."""
        return self.training().get("reason") or self.evaluation().get("reason") or ""


def digest(identity: Mapping[str, Any]) -> str:
    """A short name of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def point_directory(out: Path, label: str, identity: Mapping[str, Any]) -> Path:
    """Where a point lies: found by its identity under whatever label, else a new place that begins with this one."""
    key = digest(identity)
    found = sorted((out / POINTS).glob(f"*-{key}"))
    slug = re.sub(r"[^\w.=-]+", "_", label)[:60]
    return (found[0] if found else out / POINTS / f"{slug}-{key}").absolute()


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file, empty if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON file, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, default=str) + "\n")


TRAINING_LOG, EVALUATION_LOG = "training.log", "evaluation.log"
# A point trains on one machine, whatever the sweep was started by.
OTHER_MACHINES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# Figures of further prompt sets and texts, each with its interval.
BEHAVIOUR = ("tau", "accepted", "accept_rate", "overlap", "tv", "speedup", "prompts_used")
QUALITY = ("ce", "perplexity", "kl", "top1", "top5", "text_rows")


def work(trial: Trial) -> None:
    """Train and measure a point as far as that is not done; whatever goes wrong is recorded with it."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    write_record(trial.directory / POINT, {"label": trial.label, "settings": trial.values, "identity": trial.identity})
    try:
        if trial.training().get("status") != DONE:
            write_record(trial.directory / TRAINING, _train(trial))
        if trial.training()["status"] == DONE and trial.evaluation().get("status") != DONE:
            record = _measure(trial)
            write_record(trial.directory / EVALUATION, record | {"measured": trial.measured})
    except Exception as error:  # one point's trouble, such as a full disk, is not the others'
        fail(trial, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def fail(trial: Trial, reason: str) -> None:
    """Record that a point failed outside its training and its evaluation."""
    trained = trial.training().get("status") == DONE
    more = {"measured": trial.measured} if trained else {}
    write_record(trial.directory / (EVALUATION if trained else TRAINING), {"status": FAILED, "reason": reason} | more)


def _train(trial: Trial) -> dict[str, Any]:
    """The account of a training. A killed one goes on from its last checkpoint, one that diverged begins anew."""
    if trial.training().get("status") == DIVERGED:
        if trial.run.exists():
            remove_directory(trial.run)
        for path in trial.directory.glob("metrics-*.jsonl"):
            path.unlink()
    log, metrics = trial.directory / TRAINING_LOG, new_file(trial.directory)
    start, watch = log.stat().st_size if log.exists() else 0, DivergenceWatch(metrics)
    command = [
        sys.executable,
        "-m",
        "verl_speculator.preflight.launch",
        str(trial.processes),
        str(trial.run),
        *trial.overrides,
    ]
    code = run_child(command, log, _environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}, watch)
    found = read_metrics(trial.directory)
    account = {
        "training_seconds": round(seconds(found), 3),
        "steps": max(found, default=0),
        "final_loss": found[max(found)].get(LOSS) if found else None,
        "log": str(log),
    }
    if reason := divergence(found):
        return {"status": DIVERGED, "reason": reason} | account
    if code:
        status, reason = explain(code, log, start)
        return {"status": status, "reason": reason} | account
    from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights

    info = read_checkpoint_info(trial.run)
    parameters = sum(tensor.numel() for tensor in read_weights(info).values())
    return {"status": DONE, "checkpoint": str(info.directory), "parameters": parameters} | account


def _measure(trial: Trial) -> dict[str, Any]:
    """The account of an evaluation: the figures of the first prompt set and text, and those of the others by name."""
    log = trial.directory / EVALUATION_LOG
    checkpoint = trial.training()["checkpoint"]
    figures: dict[str, Any] = {}
    for call in trial.measurements:
        start = log.stat().st_size if log.exists() else 0
        where = ("--speculator", checkpoint, "--out", str(call.directory))
        command = [sys.executable, "-m", "verl_speculator", "evaluate", *call.arguments, *where]
        if code := run_child(command, log, _environment()):
            status, reason = explain(code, log, start)
            return {"status": status, "reason": f"evaluation: {reason}", "log": str(log)}
        rows = {row["prompts"]: row for row in _rows(call.directory / "results.csv", checkpoint)}
        if not rows:
            return {"status": FAILED, "reason": "evaluation: no prompt fits the base", "log": str(log)}
        if not figures:
            figures = dict(rows.get(next(iter(call.behaviour)), {}))
        for path, name in list(call.behaviour.items())[1:]:
            figures |= _further(rows.get(path, {}), BEHAVIOUR, name)
        if call is not trial.measurements[0]:
            figures |= _further(next(iter(rows.values())), QUALITY, call.quality)
    return {"status": DONE, "figures": figures}


def _rows(path: Path, checkpoint: str) -> list[dict[str, str]]:
    """The lines of a table of the evaluation that are this checkpoint's, the first of each prompt set last."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["speculator"] == checkpoint][::-1]


def _further(row: dict[str, str], figures: tuple[str, ...], name: str) -> dict[str, str]:
    """Figures with their intervals, under their names and the set's."""
    wanted = [f"{figure}{end}" for figure in figures for end in ("", "_lo", "_hi")]
    return {f"{figure}@{name}": row[figure] for figure in wanted if figure in row}


def _environment() -> dict[str, str]:
    """Of a command that this machine runs alone."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OTHER_MACHINES and not name.startswith(("PET_", "TORCHELASTIC_"))
    }


POLL = 0.5
# torchrun gives its workers 30 seconds before it kills them.
GRACE = 40.0


def run_child(
    command: Sequence[str], log: Path, environment: Mapping[str, str], give_up: Callable[[], bool] = lambda: False
) -> int:
    """The exit code of a command; its output is appended to a log.

    Args:
        command: with all its arguments.
        log: gets standard output and standard error.
        environment: of the command.
        give_up: asked now and then whether to end it before it ends by itself.
    """
    leash = (sys.executable, "-m", "verl_speculator.utils.process", str(os.getpid()))
    log.parent.mkdir(parents=True, exist_ok=True)
    seen: set[psutil.Process] = set()
    with log.open("ab") as output:
        # In a session of its own: a Ctrl-C reaches this process alone, which then ends the command in order.
        process = subprocess.Popen(
            [*leash, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            while not give_up():
                with suppress(psutil.NoSuchProcess):
                    # A worker whose torchrun was killed is nobody's child any more.
                    seen.update(psutil.Process(process.pid).children(recursive=True))
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL)
        finally:
            _end(process, seen)
    return process.returncode


def _end(process: subprocess.Popen, seen: set[psutil.Process]) -> None:
    """Ask a process to end, wait, and kill what is left of it and of its descendants."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen.update(psutil.Process(process.pid).children(recursive=True))
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = [one for one in seen if one.is_running()]
    for act in (psutil.Process.terminate, psutil.Process.kill):
        for one in left:
            with suppress(psutil.NoSuchProcess):
                act(one)
        _, left = psutil.wait_procs(left, timeout=3)


TAIL = 200_000
MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|Cannot allocate memory|\bMemoryError\b",
    re.IGNORECASE,
)
RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")
USERS = re.compile(r"^error: (.*)$")
# torchrun's own account of a worker that failed.
NOT_IT = ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError", "ChildFailedError")


def explain(code: int, log: Path, start: int = 0) -> tuple[str, str]:
    """A status and a reason in a line.

    Args:
        code: exit code of the command, negative for a signal.
        log: its output.
        start: where in the log it began.
    """
    text = _tail(log, start)
    lines = [line.strip() for line in text.splitlines()]
    raised = [m[1] for line in lines if (m := RAISED.match(line)) and not m[1].startswith(NOT_IT)]
    users = [m[1] for line in lines if (m := USERS.match(line))]
    if memory := [line for line in raised if MEMORY.search(line)]:
        return OUT_OF_MEMORY, _short(memory[0])
    said = next((found[-1] for found in (users, raised) if found), None)
    if said is None and (code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Signal 9 (SIGKILL)" in text):
        said = "killed by SIGKILL, which is what the system does when memory runs out"
    elif said is None and code < 0:
        said = f"ended by {signal.Signals(-code).name}"
    return FAILED, _short(said or f"exit code {code}")


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - TAIL))
        return file.read().decode(errors="replace").replace("\r", "\n")


def _short(line: str) -> str:
    return " ".join(line.split())[:300]


LOSS = "train/loss"


def new_file(directory: Path) -> Path:
    """A place for the next attempt's metrics: verl's file logger empties the file that it opens."""
    number = len(list(directory.glob("metrics-*.jsonl"))) + 1
    return directory / f"metrics-{number:03d}.jsonl"


def read_metrics(directory: Path) -> dict[int, dict[str, Any]]:
    """Metrics by step, over all attempts; a step that was done again counts as it was done last."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(directory.glob("metrics-*.jsonl")):
        found |= {entry["step"]: entry["data"] for entry in _entries(path.read_bytes())}
    return dict(sorted(found.items()))


def divergence(metrics: dict[int, dict[str, Any]]) -> str | None:
    """Where the loss stopped being a number; None where it never did."""
    for step, values in metrics.items():
        if LOSS in values and (values[LOSS] is None or not math.isfinite(values[LOSS])):
            return f"the loss is not finite from step {step} on"
    return None


def seconds(metrics: dict[int, dict[str, Any]]) -> float:
    """Time spent in training steps, without starting, validating and saving."""
    return sum(
        values["train/global_tokens"] / values["perf/tokens_per_second"]
        for values in metrics.values()
        if values.get("perf/tokens_per_second")
    )


class DivergenceWatch:
    """Whether a run that is going on has diverged; reads what is new in its file."""

    def __init__(self, path: Path) -> None:
        self.path, self.read, self.diverged = path, 0, False

    def __call__(self) -> bool:
        if not self.diverged and self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.read)
                whole, newline, _ = file.read().rpartition(b"\n")
            self.read += len(whole + newline)
            self.diverged = divergence({entry["step"]: entry["data"] for entry in _entries(whole)}) is not None
        return self.diverged


def _entries(content: bytes) -> Iterator[dict[str, Any]]:
    """Without half a last line."""
    for line in content.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
