"""Checks of verl's logging backends: installed, logged in, and with a place to write to. Nothing is sent."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_speculator.utils.atomic_io import check_metrics_file, check_writable
from verl_speculator.utils.errors import UserError, nearest

# verl's logging backends, with the package that each needs.
PACKAGES = {
    **{name: None for name in ("console", "file")},
    **{name: name for name in ("wandb", "mlflow", "swanlab", "clearml", "trackio", "tensorboard")},
    "vemlp_wandb": "volcengine_ml_platform",
    "rl_insight": "rl_insight",
}
VOLCENGINE = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")


def check_loggers(config: DictConfig) -> None:
    """Whether every backend of `trainer.logger` can start on this machine.

    Raises:
        UserError: naming the backend and what it lacks.
    """
    for name in logger_names(config.trainer.logger):
        setting, package = f"trainer.logger={name}", PACKAGES[name]
        # verl leaves rl_insight alone unless it is switched on.
        if name == "rl_insight" and os.environ.get("VERL_RL_INSIGHT_ENABLE") != "1":
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{setting}: the package {package} is not installed")
        if name in CHECKS:
            CHECKS[name](setting, config.trainer)


def logger_names(given: Any) -> list[str]:
    """The backends that `trainer.logger` names.

    Raises:
        UserError: for one that verl does not have, or for null.
    """
    names = [given] if isinstance(given, str) or given is None else list(given)
    for name in names:
        if name not in PACKAGES:
            shown = "null" if name is None else name
            raise UserError(
                f"trainer.logger={shown}: expected one or several of {', '.join(PACKAGES)}"
                + nearest(str(name), PACKAGES)
            )
    return names


def _check_wandb(setting: str, trainer: DictConfig) -> None:
    import wandb

    otherwise = "; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
    try:
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        if "prompt" in inspect.signature(wandb.login).parameters:
            logged_in = wandb.login(prompt=False, verify=False)
        else:  # before wandb 0.31
            logged_in = bool(wandb.api.api_key)
    except Exception as error:  # wandb's own errors, which have no common class but this
        raise UserError(f"{setting}: {' '.join(str(error).split())[:200]}{otherwise}") from None
    finally:
        wandb.teardown()  # the process that trains reads its settings anew
    if not logged_in:
        raise UserError(f"{setting}: not logged in{otherwise}")


def _check_swanlab(setting: str, trainer: DictConfig) -> None:
    if os.environ.get("SWANLAB_MODE", "cloud") not in ("cloud", "online") or os.environ.get("SWANLAB_API_KEY"):
        return
    places = [Path(os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"), Path(".swanlab")]
    if not any((place / name).is_file() for place in places for name in (".netrc", "netrc")):
        raise UserError(
            f"{setting}: not logged in; run `swanlab login`, set SWANLAB_API_KEY, or set SWANLAB_MODE=local"
        )


def _check_clearml(setting: str, trainer: DictConfig) -> None:
    environment = os.environ
    named = environment.get("CLEARML_CONFIG_FILE") or environment.get("TRAINS_CONFIG_FILE")
    known = any(environment.get(f"{prefix}_API_ACCESS_KEY") for prefix in ("CLEARML", "TRAINS"))
    offline = environment.get("CLEARML_OFFLINE_MODE", "0").lower() not in ("", "0", "false")
    files = [Path(named)] if named else [Path.home() / "clearml.conf", Path.home() / "trains.conf"]
    if not (known or offline or any(file.expanduser().is_file() for file in files)):
        raise UserError(f"{setting}: no credentials; run `clearml-init`, or set CLEARML_API_ACCESS_KEY and its secret")


def _check_volcengine(setting: str, trainer: DictConfig) -> None:
    if missing := [name for name in VOLCENGINE if name not in os.environ]:
        raise UserError(f"{setting}: no credentials; set {', '.join(missing)}")


def _check_tensorboard(setting: str, trainer: DictConfig) -> None:
    default = f"tensorboard_log/{trainer.project_name}/{trainer.experiment_name}"
    check_writable(setting, Path(os.environ.get("TENSORBOARD_DIR", default)))


def _check_file(setting: str, trainer: DictConfig) -> None:
    check_metrics_file(setting, trainer.project_name, trainer.experiment_name)


CHECKS: dict[str, Callable[[str, DictConfig], None]] = {
    "wandb": _check_wandb,
    "swanlab": _check_swanlab,
    "clearml": _check_clearml,
    "vemlp_wandb": _check_volcengine,
    "tensorboard": _check_tensorboard,
    "file": _check_file,
}
