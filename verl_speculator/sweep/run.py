"""The sweep: check all points, work on those that are not done, and keep one table up to date."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from verl_speculator.sweep.check import check_sweep
from verl_speculator.sweep.report import Row, number, write_results
from verl_speculator.sweep.settings import SweepSettings
from verl_speculator.sweep.trial import DONE, GRACE, TRAINING_LOG, Trial, fail, work
from verl_speculator.utils.errors import UserError

# Ray's names of what it counts, by the name of the device.
RESOURCES = {"cuda": "GPU", "npu": "NPU"}
DEVICE = "trainer.device"


class Executor(Protocol):
    """A place to work."""

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns in a process of its own, on a machine like those that train."""
        ...

    def each(
        self, work: Callable[[Trial], None], trials: Sequence[Trial], begin: Callable[[Trial], None]
    ) -> Iterator[Trial]:
        """Run all trials; yields each as soon as it is done. `begin` is called with a trial when it starts."""
        ...


class Local:
    """One after another, in this process. What a point needs much memory for runs in processes of its own."""

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`Executor.once`"""
        # Not forked, and not here: a look at the device may hold on to it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()

    def each(
        self, work: Callable[[Trial], None], trials: Sequence[Trial], begin: Callable[[Trial], None]
    ) -> Iterator[Trial]:
        """`Executor.each`"""
        for trial in trials:
            begin(trial)
            work(trial)
            yield trial


class OverRay:
    """As many at a time as Ray's cluster has room for; `out` must lie where all its machines see it.

    Args:
        ray: the module, with a cluster.
        settings: how many processes a point has, and on which device.
    """

    def __init__(self, ray: Any, settings: SweepSettings) -> None:
        self.ray = ray
        devices = {values[DEVICE] for values in (settings.settings, *settings.points) if DEVICE in values} or {"auto"}
        there = ray.cluster_resources()
        wanted = [RESOURCES.get(device, "") for device in devices]
        wanted += [name for name in RESOURCES.values() if "auto" in devices and name in there]
        accelerator = next(filter(None, wanted), None)
        self.options: dict[str, Any] = {"num_cpus": settings.nproc, "max_retries": 0}
        if accelerator == "GPU":
            self.options["num_gpus"] = settings.nproc
        elif accelerator:
            self.options["resources"] = {accelerator: settings.nproc}

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`Executor.once`"""
        try:
            return self.ray.get(self.ray.remote(**self.options)(function).remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def each(
        self, work: Callable[[Trial], None], trials: Sequence[Trial], begin: Callable[[Trial], None]
    ) -> Iterator[Trial]:
        """`Executor.each`"""
        task = self.ray.remote(**self.options)(work)
        pending = {task.remote(trial): trial for trial in trials}
        try:
            while pending:
                (done,), _ = self.ray.wait(list(pending), num_returns=1)
                trial = pending.pop(done)
                try:
                    self.ray.get(done)
                except self.ray.exceptions.RayError as error:
                    fail(trial, f"Ray: {str(error).strip().splitlines()[-1][:300]}")
                yield trial
        finally:
            for reference in pending:
                self.ray.cancel(reference)
            if pending:
                self.ray.wait(list(pending), num_returns=len(pending), timeout=GRACE)


@contextmanager
def executor_of(settings: SweepSettings) -> Iterator[Executor]:
    """The place that the settings name; a cluster that RAY_ADDRESS names is used, else one is started here."""
    if settings.executor == "local":
        yield Local()
        return
    import ray

    ours = not ray.is_initialized()
    if ours:
        ending = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False)
        signal.signal(signal.SIGTERM, ending)  # Ray's own would abort
    try:
        yield OverRay(ray, settings)
    finally:
        if ours:
            ray.shutdown()


LOCK = ".lock"


def plan(settings: SweepSettings) -> list[Trial]:
    """All points as trials, checked. Nothing is written.

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
        trials = executor.once(check_sweep, settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        with _alone(settings.out):
            rows = write_results(settings.out, trials)
            due = [trial for trial in trials if trial.status != DONE]
            if len(due) < len(trials):
                say(f"{len(trials) - len(due)} of {len(trials)} points are done already")
            place = {trial.directory: f"[{i}/{len(trials)}] {trial.label}" for i, trial in enumerate(trials, 1)}

            def begin(trial: Trial) -> None:
                say(f"{place[trial.directory]}: {trial.directory / TRAINING_LOG}")

            for trial in executor.each(work, due, begin):
                rows = write_results(settings.out, trials)
                say(f"{place[trial.directory]}: {_outcome(rows[trials.index(trial)])}")
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
