"""The sweep: check all points, work on those that are not done, and keep one table up to date."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from verl_speculator.errors import UserError
from verl_speculator.sweep.check import check_sweep
from verl_speculator.sweep.executors import executor_of
from verl_speculator.sweep.jobs import DONE, Job
from verl_speculator.sweep.report import Row, number, write_results
from verl_speculator.sweep.settings import SweepSettings
from verl_speculator.sweep.work import TRAINING_LOG, work

LOCK = ".lock"


def plan(settings: SweepSettings) -> list[Job]:
    """All points as jobs, checked. Nothing is written.

    Raises:
        UserError: for the first thing that is wrong.
    """
    with executor_of(settings) as executor:
        return executor.once(check_sweep, settings)


def sweep(settings: SweepSettings, say: Callable[[str], None]) -> list[Row]:
    """Train and measure every point that is not done yet.

    Args:
        settings: of the sweep.
        say: is told of each point in a line when it is begun and when it is done.

    Returns:
        The rows of `results.csv`, which is written anew after each point.

    Raises:
        UserError: for what is wrong, before any point is trained.
    """
    with executor_of(settings) as executor:
        jobs = executor.once(check_sweep, settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        with _alone(settings.out):
            rows = write_results(settings.out, jobs)
            due = [job for job in jobs if job.status != DONE]
            if len(due) < len(jobs):
                say(f"{len(jobs) - len(due)} of {len(jobs)} points are done already")
            place = {job.directory: f"[{i}/{len(jobs)}] {job.label}" for i, job in enumerate(jobs, 1)}

            def begin(job: Job) -> None:
                say(f"{place[job.directory]}: {job.directory / TRAINING_LOG}")

            for job in executor.each(work, due, begin):
                rows = write_results(settings.out, jobs)
                say(f"{place[job.directory]}: {_outcome(rows[jobs.index(job)])}")
    return rows


def _outcome(row: Row) -> str:
    if row["status"] != DONE:
        return f"{row['status']}: {row['reason']}"
    return f"τ {number(row, 'tau'):.2f}, speedup {number(row, 'speedup'):.2f}, loss {number(row, 'final_loss'):.3f}"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second sweep out of a directory, as long as this process lives."""
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out={out}: another sweep is at work there") from None
        yield


def failed(rows: Sequence[Row]) -> list[Row]:
    """The points that came to nothing."""
    return [row for row in rows if row["status"] != DONE]
