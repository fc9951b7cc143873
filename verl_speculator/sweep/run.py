"""A sweep: check all points as the launcher would, run the trials that are not done, keep one table up to date."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.loading import check_base_name, choose_device, choose_dtype, load_tokenizer
from verl_speculator.checkpoint.format import WEIGHTS_FILE, resolve_checkpoint
from verl_speculator.checkpoint.provenance import file_fingerprint, weights_fingerprint
from verl_speculator.config.hydra import RunConfig, load_run_config, walk_settings
from verl_speculator.decoding.options import check_length
from verl_speculator.evaluation.prompts import read_prompts, read_texts
from verl_speculator.preflight.launch import check_run
from verl_speculator.sweep.report import Row, number, write_results
from verl_speculator.sweep.settings import SweepSettings, Values, hydra_value, labels_of
from verl_speculator.sweep.trial import (
    DONE,
    GRACE_SECONDS,
    TRAINING_LOG,
    Measurement,
    Trial,
    digest,
    run_trial,
    trial_directory,
)
from verl_speculator.utils.settings import UserError

# Settings of where and how a run writes, which do not change what it learns.
WITHOUT_EFFECT = (
    *("trainer.default_local_dir", "trainer.logger", "trainer.project_name", "trainer.experiment_name"),
    *("trainer.save_freq", "trainer.test_freq", "trainer.max_ckpt_to_keep", "trainer.resume_mode", "data.num_workers"),
)
# Identified by their content, not by their path.
FILES = ("data.train_files", "data.val_files", "model.path", "model.partial_pretrain", "model.speculator.path")


def check_sweep(settings: SweepSettings) -> list[Trial]:
    """Every point as a trial, each once, in the order of training. Writes nothing.

    Raises:
        UserError: for the first thing that the launcher or the evaluation would refuse, naming the point if it is a
            point's.
    """
    check_base_name(settings.base)
    options = settings.evaluation_settings()
    with _named_option():
        # The evaluation would refuse them only after the first training.
        choose_dtype(options.dtype, choose_device(options.device))
    for path in settings.prompts.values():
        read_prompts(path)
    trials: dict[str, Trial] = {}
    checked_data: set[str] = set()
    processes = {"processes": settings.nproc, "processes_per_node": settings.nproc}
    for label, values in zip(labels_of(settings.points), settings.points, strict=True):
        try:
            trial, run = _make_trial(settings, label, values)
            if digest(trial.identity) in trials:
                continue
            if trial.training().get("status") != DONE:
                # Points with the same data settings read the same rows.
                template = run.tree.model.custom_chat_template
                data = digest({"data": OmegaConf.to_container(run.tree.data), "template": template})
                check_run(run, **processes, read_rows=data not in checked_data)
                checked_data.add(data)
            with _named_option():
                check_length(options.draft_length, run.speculator.config.n_predict)
        except UserError as error:
            raise UserError(f"point {label}: {error}") from None
        trials[digest(trial.identity)] = trial
    if settings.texts:
        tokenizer = load_tokenizer(settings.base)
        for path in settings.texts.values():
            read_texts(path, tokenizer)
    return list(trials.values())


@contextmanager
def _named_option() -> Iterator[None]:
    """Errors name the option as the sweep has it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def _make_trial(settings: SweepSettings, label: str, values: Values) -> tuple[Trial, RunConfig]:
    """A point's trial, and the run configuration of its training."""
    overrides = {"model.partial_pretrain": hydra_value(settings.base), "trainer.max_ckpt_to_keep": "1"}
    if settings.train_files:
        overrides["data.train_files"] = hydra_value(list(settings.train_files))
    overrides |= settings.settings | values
    lines = [f"{name}={value}" for name, value in overrides.items()]
    run = load_run_config([*lines, "trainer.default_local_dir=."])
    config = run.tree
    # The sweep reads the metrics of verl's file logger.
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers or [])
    lines.append(f"trainer.logger={hydra_value(list(dict.fromkeys([*loggers, 'file'])))}")
    identity = _identity(config)
    directory = trial_directory(settings.out, label, identity)
    config.trainer.default_local_dir = str(directory / "run")
    measured: dict[str, Any] = {"options": settings.evaluation}
    for kind, files in (("prompts", settings.prompts), ("texts", settings.texts)):
        measured[kind] = {name: [str(path), file_fingerprint(path)] for name, path in files.items() if path.is_file()}
    measurements = _measurements(settings, directory, measured)
    return Trial(label, values, tuple(lines), identity, directory, settings.nproc, measurements, measured), run


def _identity(config: DictConfig) -> dict[str, Any]:
    """What makes two trainings the same: resolved settings, and the content of data, base model and start."""
    values = dict(walk_settings(OmegaConf.to_container(config)))
    resolved = {n: v for n, v in values.items() if n not in WITHOUT_EFFECT and (v == {} or not isinstance(v, dict))}
    base = resolved["model.path"]
    files = {name: resolved.pop(name, None) for name in FILES}
    start = files["model.speculator.path"]
    return {
        "settings": resolved,
        "base": weights_fingerprint(base) or base,
        **{name: [_fingerprint(Path(file)) for file in files[name]] for name in ("data.train_files", "data.val_files")},
        "start": None if start is None else _fingerprint(resolve_checkpoint(start) / WEIGHTS_FILE),
    }


def _fingerprint(path: Path) -> str:
    """Of a file's content; the path of one that does not exist, for the checks to refuse."""
    return file_fingerprint(path) if path.is_file() else str(path)


def _measurements(settings: SweepSettings, directory: Path, measured: Mapping[str, Any]) -> tuple[Measurement, ...]:
    """One call for all prompt sets and the first text, and one for each further text that decodes as little as
    possible: an evaluation reads one text."""
    prompt_sets = {str(path): name for name, path in settings.prompts.items()}
    prompts = [text for path in prompt_sets for text in ("--prompts", path)]
    options = ["--base", settings.base, "--baselines", "", "--no-plots"]
    for name, value in settings.evaluation.items():
        # None and false are defaults.
        if value is not None and value is not False:
            options += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    # A larger sample goes on from a smaller one; any other change begins anew.
    fixed = {name: value for name, value in settings.evaluation.items() if name not in ("num_prompts", "num_texts")}
    place = directory / "evaluation" / digest(dict(measured) | {"options": fixed})
    few = ("--num-prompts", "1", "--max-new-tokens", "2", "--warmup-steps", "0", "--num-trials", "1")
    texts = [(name, ("--text", str(path))) for name, path in settings.texts.items()] or [(None, ())]
    first, text = texts[0]
    measurements = [Measurement(place / "main", (*options, *prompts, *text), prompt_sets, first)]
    for name, text in texts[1:]:
        measurements.append(Measurement(place / f"text_{name}", (*options, *prompts[:2], *few, *text), {}, name))
    return tuple(measurements)


class LocalExecutor:
    """Runs trials one after another."""

    def check(self, settings: SweepSettings) -> list[Trial]:
        """`check_sweep` in a process of its own."""
        # Not forked, and not here: choosing a device may keep hold of it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(check_sweep, settings).result()

    def run(self, trials: Sequence[Trial], on_start: Callable[[Trial], None]) -> Iterator[Trial]:
        """Run all trials; yield each one when it has ended."""
        for trial in trials:
            on_start(trial)
            run_trial(trial)
            yield trial


class RayExecutor:
    """Runs as many trials at a time as fit into Ray's cluster; all its machines must see the output directory."""

    def __init__(self, ray: Any, settings: SweepSettings) -> None:
        self.ray = ray
        devices = {point.get("trainer.device") for point in (settings.settings, *settings.points)} - {None} or {"auto"}
        resources = ray.cluster_resources()
        self.options: dict[str, Any] = {"num_cpus": settings.nproc, "max_retries": 0}
        if "cuda" in devices or ("auto" in devices and "GPU" in resources):
            self.options["num_gpus"] = settings.nproc
        elif "npu" in devices or ("auto" in devices and "NPU" in resources):
            self.options["resources"] = {"NPU": settings.nproc}

    def check(self, settings: SweepSettings) -> list[Trial]:
        """`check_sweep` on a machine like those that train."""
        try:
            return self.ray.get(self.ray.remote(**self.options)(check_sweep).remote(settings))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def run(self, trials: Sequence[Trial], on_start: Callable[[Trial], None]) -> Iterator[Trial]:
        """Run all trials; yield each one when it has ended. Ray does not tell when one starts."""
        task = self.ray.remote(**self.options)(run_trial)
        pending = {task.remote(trial): trial for trial in trials}
        try:
            while pending:
                (reference,), _ = self.ray.wait(list(pending), num_returns=1)
                trial = pending.pop(reference)
                try:
                    self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    trial.write_failure(f"Ray: {str(error).strip().splitlines()[-1]}")
                yield trial
        finally:
            for reference in pending:
                self.ray.cancel(reference)
            if pending:
                self.ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_SECONDS)


@contextmanager
def make_executor(settings: SweepSettings) -> Iterator[LocalExecutor | RayExecutor]:
    """The executor that the settings name; a cluster that RAY_ADDRESS names is used, else one is started here."""
    if settings.executor == "local":
        yield LocalExecutor()
        return
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False)
        signal.signal(signal.SIGTERM, handler)  # Ray's own would abort
    try:
        yield RayExecutor(ray, settings)
    finally:
        if is_ours:
            ray.shutdown()


def plan(settings: SweepSettings) -> list[Trial]:
    """`check_sweep` on a machine like those that train."""
    with make_executor(settings) as executor:
        return executor.check(settings)


def sweep(settings: SweepSettings, log: Callable[[str], None]) -> list[Row]:
    """Train and evaluate every point that is not done yet; `log` gets a line for each trial that starts or ends.

    Returns:
        The rows of `results.csv`, which is written anew after each trial.

    Raises:
        UserError: for what is wrong, before anything is trained.
    """
    with make_executor(settings) as executor:
        trials = executor.check(settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        with _lock(settings.out):
            rows = write_results(settings.out, trials)
            due = [trial for trial in trials if trial.status != DONE]
            if len(due) < len(trials):
                log(f"{len(trials) - len(due)} of {len(trials)} points are done already")

            def name(trial: Trial) -> str:
                return f"[{trials.index(trial) + 1}/{len(trials)}] {trial.label}"

            for trial in executor.run(due, lambda trial: log(f"{name(trial)}: {trial.directory / TRAINING_LOG}")):
                rows = write_results(settings.out, trials)
                log(f"{name(trial)}: {_outcome(rows[trials.index(trial)])}")
    return rows


def _outcome(row: Row) -> str:
    if row["status"] != DONE:
        return f"{row['status']}: {row['reason']}"
    return f"τ {number(row, 'tau'):.2f}, speedup {number(row, 'speedup'):.2f}, loss {number(row, 'final_loss'):.3f}"


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep a second sweep out of a directory while this process lives."""
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out={out}: another sweep is at work there") from None
        yield
