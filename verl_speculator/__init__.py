"""Speculators for language models, trained inside VERL's SFT trainer.

Importing this package imports neither torch nor verl nor transformers; what needs them imports them when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_speculator.checkpoint.format import load_speculator, save_speculator
    from verl_speculator.config.schema import SpeculatorConfig
    from verl_speculator.models import build_speculator

__version__ = "0.1.0"
__all__ = ["SpeculatorConfig", "build_speculator", "load_speculator", "save_speculator"]

_HOMES = {
    "SpeculatorConfig": "verl_speculator.config.schema",
    "build_speculator": "verl_speculator.models",
    "load_speculator": "verl_speculator.checkpoint.format",
    "save_speculator": "verl_speculator.checkpoint.format",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
