"""From points to trials: each point's settings resolved and checked as the launcher would, before the first is trained.

Runs in a process of its own, on a machine like those that will train, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.loading import check_base_name
from verl_speculator.checkpoint.format import WEIGHTS_FILE, resolve_checkpoint
from verl_speculator.checkpoint.provenance import file_fingerprint, weights_fingerprint
from verl_speculator.config.hydra import RunConfig, load_run_config
from verl_speculator.decoding.draft_length import check_length
from verl_speculator.evaluation.prompts import read_prompts, read_texts
from verl_speculator.preflight import check_run
from verl_speculator.sweep.grid import Values, hydra_value, labels_of
from verl_speculator.sweep.settings import SweepSettings
from verl_speculator.sweep.trial import DONE, Measurement, Trial, digest, point_directory
from verl_speculator.utils.errors import UserError

# Settings that decide where and how a run writes, and nothing of what it learns.
INDIFFERENT = (
    *("trainer.default_local_dir", "trainer.logger", "trainer.project_name", "trainer.experiment_name"),
    *("trainer.save_freq", "trainer.test_freq", "trainer.max_ckpt_to_keep", "trainer.resume_mode", "data.num_workers"),
)
# Known by what they hold, wherever that lies.
FILES = ("data.train_files", "data.val_files", "model.path", "model.partial_pretrain", "model.speculator.path")


def check_sweep(settings: SweepSettings) -> list[Trial]:
    """Every point as a trial, each once, in the order in which they are to be trained.

    Raises:
        UserError: naming the point where it is a point's, for the first thing that the launcher or the evaluation
            would refuse.
    """
    check_base_name(settings.base)
    _check_machine(settings)
    prompts = {name: read_prompts(path) for name, path in settings.prompts.items()}
    trials: dict[str, Trial] = {}
    read: set[str] = set()
    for label, values in zip(labels_of(settings.points), settings.points, strict=True):
        try:
            trial, run = _make_job(settings, label, values)
            if digest(trial.identity) in trials:
                continue
            if trial.training().get("status") != DONE:
                _check_training(settings, run, read)
            _check_drafts(settings, run)
        except UserError as error:
            raise UserError(f"point {label}: {error}") from None
        trials[digest(trial.identity)] = trial
    if settings.texts and prompts:
        from verl_speculator.base_model.loading import load_tokenizer

        tokenizer = load_tokenizer(settings.base)
        for path in settings.texts.values():
            read_texts(path, tokenizer)
    return list(trials.values())


def _make_job(settings: SweepSettings, label: str, values: Values) -> tuple[Trial, RunConfig]:
    overrides = {"model.partial_pretrain": hydra_value(settings.base), "trainer.max_ckpt_to_keep": "1"}
    if settings.train_files:
        overrides["data.train_files"] = hydra_value(list(settings.train_files))
    overrides |= settings.settings | values
    lines = [f"{name}={value}" for name, value in overrides.items()]
    run = load_run_config([*lines, "trainer.default_local_dir=."])
    config = run.tree
    # The sweep reads what the run logs to a file, whatever else it logs to.
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers or [])
    lines.append(f"trainer.logger={hydra_value([*loggers, *({'file'} - set(loggers))])}")
    identity = identify(config)
    directory = point_directory(settings.out, label, identity)
    config.trainer.default_local_dir = str(directory / "run")
    measured = {
        "options": settings.evaluation,
        **{
            kind: {name: [str(path), file_fingerprint(path)] for name, path in files.items() if path.is_file()}
            for kind, files in (("prompts", settings.prompts), ("texts", settings.texts))
        },
    }
    trial = Trial(
        label=label,
        values=values,
        overrides=tuple(lines),
        identity=identity,
        directory=directory,
        processes=settings.nproc,
        measurements=_measurements(settings, directory, measured),
        measured=measured,
    )
    return trial, run


def identify(config: DictConfig) -> dict[str, Any]:
    """What makes a training this one: its resolved settings, the data and the base by what they hold."""
    resolved = {name: value for name, value in _flat(OmegaConf.to_container(config)) if name not in INDIFFERENT}
    base = resolved["model.path"]
    files = {name: resolved.pop(name, None) for name in FILES}
    start = files["model.speculator.path"]
    return {
        "settings": resolved,
        "base": weights_fingerprint(base) or base,
        **{name: [_fingerprint(Path(file)) for file in files[name]] for name in ("data.train_files", "data.val_files")},
        "start": None if start is None else _fingerprint(resolve_checkpoint(start) / WEIGHTS_FILE),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        nested = isinstance(value, dict) and value
        found += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return found


def _fingerprint(path: Path) -> str:
    """Of what lies there; the name of what does not, for the checks to refuse."""
    return file_fingerprint(path) if path.is_file() else str(path)


def _check_training(settings: SweepSettings, run: RunConfig, read: set[str]) -> None:
    """The launcher's checks; the rows of the same files, read the same way, once for all points."""
    data, template = OmegaConf.to_container(run.tree.data), run.tree.model.custom_chat_template
    rows = digest({"data": data, "template": template})
    check_run(run, processes=settings.nproc, processes_per_node=settings.nproc, read_rows=rows not in read)
    read.add(rows)


def _check_drafts(settings: SweepSettings, run: RunConfig) -> None:
    """Whether the evaluation can draft as many tokens as it is asked to with the speculator of this point."""
    try:
        check_length(settings.evaluation.get("draft_length"), run.speculator.config.n_predict)
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def _check_machine(settings: SweepSettings) -> None:
    """Whether the evaluation's device and dtype exist here: it would refuse them only after the first training."""
    from verl_speculator.base_model.loading import choose_device, choose_dtype

    options = settings.evaluation_settings()
    try:
        choose_dtype(options.dtype, choose_device(options.device))
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def _measurements(settings: SweepSettings, directory: Path, measured: Mapping[str, Any]) -> tuple[Measurement, ...]:
    """One call for all prompt sets and the first text, and one for each further text, with as little to decode as can
    be: an evaluation reads one text."""
    files = {str(path): name for name, path in settings.prompts.items()}
    texts = list(settings.texts.items())
    options = [text for name, value in settings.evaluation.items() for text in _option(name, value)]
    # A larger sample goes on from what a smaller one has measured; anything else begins anew.
    same = {name: value for name, value in settings.evaluation.items() if name not in ("num_prompts", "num_texts")}
    place = directory / "evaluation" / digest(dict(measured) | {"options": same})
    common = ("--base", settings.base, "--baselines", "", "--no-plots", *options)
    prompts = [text for path in files for text in ("--prompts", path)]
    first = texts[0] if texts else None
    calls = [
        Measurement(
            place / "main",
            (*common, *prompts, *(("--text", str(first[1])) if first else ())),
            files,
            first[0] if first else None,
        )
    ]
    few = ("--num-prompts", "1", "--max-new-tokens", "2", "--warmup-steps", "0", "--num-trials", "1")
    for name, path in texts[1:]:
        arguments = (*common, *prompts[:2], *few, "--text", str(path))
        calls.append(Measurement(place / f"text_{name}", arguments, {}, name))
    return tuple(calls)


def _option(name: str, value: Any) -> list[str]:
    """An option of the evaluation's command line; None and false are its defaults."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    return [flag] if value is True else [flag, str(value)]
