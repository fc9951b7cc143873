"""Where points are worked on: here, one after another, or spread over Ray's workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

from verl_speculator.sweep.child import GRACE
from verl_speculator.sweep.jobs import Job
from verl_speculator.sweep.settings import SweepSettings
from verl_speculator.sweep.work import fail

# Ray's names of what it counts, by the name of the device.
RESOURCES = {"cuda": "GPU", "npu": "NPU"}
DEVICE = "trainer.device"


class Executor(Protocol):
    """A place to work."""

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns in a process of its own, on a machine like those that train."""
        ...

    def each(self, work: Callable[[Job], None], jobs: Sequence[Job], begin: Callable[[Job], None]) -> Iterator[Job]:
        """Work on all jobs; gives each as soon as it is done. `begin` is told of a job where it is seen to begin."""
        ...


class Local:
    """One after another, in this process. What a point needs much memory for runs in processes of its own."""

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`Executor.once`"""
        # Not forked, and not here: a look at the device may hold on to it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()

    def each(self, work: Callable[[Job], None], jobs: Sequence[Job], begin: Callable[[Job], None]) -> Iterator[Job]:
        """`Executor.each`"""
        for job in jobs:
            begin(job)
            work(job)
            yield job


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

    def each(self, work: Callable[[Job], None], jobs: Sequence[Job], begin: Callable[[Job], None]) -> Iterator[Job]:
        """`Executor.each`"""
        task = self.ray.remote(**self.options)(work)
        pending = {task.remote(job): job for job in jobs}
        try:
            while pending:
                (done,), _ = self.ray.wait(list(pending), num_returns=1)
                job = pending.pop(done)
                try:
                    self.ray.get(done)
                except self.ray.exceptions.RayError as error:
                    fail(job, f"Ray: {str(error).strip().splitlines()[-1][:300]}")
                yield job
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
