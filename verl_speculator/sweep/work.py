"""One point, trained by the launcher and measured by the evaluation in processes of their own; what is done is kept."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

from verl_speculator.files import remove_directory
from verl_speculator.sweep.child import run_child
from verl_speculator.sweep.failures import explain
from verl_speculator.sweep.jobs import DIVERGED, DONE, EVALUATION, FAILED, POINT, TRAINING, Job, write_record
from verl_speculator.sweep.metrics import LOSS, DivergenceWatch, divergence, new_file, read_metrics, seconds

TRAINING_LOG, EVALUATION_LOG = "training.log", "evaluation.log"
# A point trains on one machine, whatever the sweep was started by.
OTHER_MACHINES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# Figures of further prompt sets and texts, each with its interval.
BEHAVIOUR = ("tau", "accepted", "accept_rate", "overlap", "tv", "speedup", "prompts_used")
QUALITY = ("ce", "perplexity", "kl", "top1", "top5", "text_rows")


def work(job: Job) -> None:
    """Train and measure a point as far as that is not done; whatever goes wrong is recorded with it."""
    job.directory.mkdir(parents=True, exist_ok=True)
    write_record(job.directory / POINT, {"label": job.label, "settings": job.values, "identity": job.identity})
    try:
        if job.training().get("status") != DONE:
            write_record(job.directory / TRAINING, _train(job))
        if job.training()["status"] == DONE and job.evaluation().get("status") != DONE:
            record = _measure(job)
            write_record(job.directory / EVALUATION, record | {"measured": job.measured})
    except Exception as error:  # one point's trouble, such as a full disk, is not the others'
        fail(job, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def fail(job: Job, reason: str) -> None:
    """Record that a point failed outside its training and its evaluation."""
    trained = job.training().get("status") == DONE
    more = {"measured": job.measured} if trained else {}
    write_record(job.directory / (EVALUATION if trained else TRAINING), {"status": FAILED, "reason": reason} | more)


def _train(job: Job) -> dict[str, Any]:
    """The account of a training. A killed one goes on from its last checkpoint, one that diverged begins anew."""
    if job.training().get("status") == DIVERGED:
        if job.run.exists():
            remove_directory(job.run)
        for path in job.directory.glob("metrics-*.jsonl"):
            path.unlink()
    log, metrics = job.directory / TRAINING_LOG, new_file(job.directory)
    start, watch = log.stat().st_size if log.exists() else 0, DivergenceWatch(metrics)
    command = [sys.executable, "-m", "verl_speculator.launch", str(job.processes), str(job.run), *job.overrides]
    code = run_child(command, log, _environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}, watch)
    found = read_metrics(job.directory)
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
    from verl_speculator.checkpoint import read_checkpoint_info, read_weights

    info = read_checkpoint_info(job.run)
    parameters = sum(tensor.numel() for tensor in read_weights(info).values())
    return {"status": DONE, "checkpoint": str(info.directory), "parameters": parameters} | account


def _measure(job: Job) -> dict[str, Any]:
    """The account of an evaluation: the figures of the first prompt set and text, and those of the others by name."""
    log = job.directory / EVALUATION_LOG
    checkpoint = job.training()["checkpoint"]
    figures: dict[str, Any] = {}
    for call in job.measurements:
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
        if call is not job.measurements[0]:
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
