"""Checks of the optimizer's settings, by making a small one of the same kind. Imports torch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_speculator.config.hydra import compose
from verl_speculator.config.objective import is_number
from verl_speculator.preflight.settings import say
from verl_speculator.utils.errors import UserError, nearest

OVERRIDES = "optim.override_optimizer_config"
DEPRECATED = ("grad_clip",)  # verl reads it, and its own configuration does not list it


@functools.cache
def _known_names() -> tuple[str, ...]:
    return (*map(str, compose([]).optim), *DEPRECATED)


def check_optimizer(config: DictConfig) -> None:
    """Whether an optimizer of this kind exists and takes these settings.

    Raises:
        UserError: naming the setting.
    """
    optim, known = config.optim, _known_names()
    for name in map(str, optim):
        if name not in known:
            raise UserError(
                f"optim.{name} is not a setting{nearest(name, known)}; arguments of the optimizer's own go into "
                f"{OVERRIDES}={{{name}: …}}"
            )
    _check_betas(optim.betas)
    if not isinstance(optim.override_optimizer_config, (DictConfig, type(None))):
        raise UserError(f"{OVERRIDES}={optim.override_optimizer_config}: expected settings such as {{eps: 1e-6}}")
    _make_optimizer(optim)


def _check_betas(betas: Any) -> None:
    listed = list(betas) if isinstance(betas, ListConfig) else None
    if listed is None or len(listed) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in listed):
        shown = say(betas if listed is None else listed)
        raise UserError(f"optim.betas={shown}: expected two numbers of at least 0 and below 1, such as [0.9,0.95]")


def _optimizer_class(optim: DictConfig) -> Any:
    import torch

    setting = f"optim.optimizer_impl={optim.optimizer_impl}"
    try:
        module = importlib.import_module(str(optim.optimizer_impl))
    except (ImportError, ValueError) as error:
        raise UserError(f"{setting}: {error}; expected a module of optimizers, such as torch.optim") from None
    found = getattr(module, str(optim.optimizer), None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = [name for name, kind in vars(module).items() if isinstance(kind, type) and name != "Optimizer"]
        raise UserError(
            f"optim.optimizer={optim.optimizer}: {optim.optimizer_impl} has no such optimizer"
            f"{nearest(str(optim.optimizer), known)}"
        )
    return found


def _make_optimizer(optim: DictConfig) -> None:
    """Make one for a matrix and a vector, as verl makes the run's, and take a step with torch's own."""
    import torch

    kind = _optimizer_class(optim)
    arguments = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if "adam" in optim.optimizer.lower() or "ademamix" in optim.optimizer.lower():
        arguments["betas"] = tuple(optim.betas)
    if optim.override_optimizer_config is not None:
        arguments |= OmegaConf.to_container(optim.override_optimizer_config)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    try:
        optimizer = kind(parameters, **arguments)
        # Others may want an accelerator for it, and so does a capturable one.
        if kind.__module__.startswith("torch.optim") and not arguments.get("capturable"):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    except Exception as error:  # whatever an optimizer's author checks with: ValueError, TypeError, RuntimeError, …
        reason = " ".join(str(error).split())[:200]
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise UserError(f"optim.optimizer={optim.optimizer}: not with {given}: {reason}") from None
