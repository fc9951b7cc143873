"""Where two runs part: traces of modules, and what their comparison says.

with trace(model, "a.trace", modules=["layers.*"]):
    model(tokens)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_speculator.diagnosis.comparison import compare
    from verl_speculator.diagnosis.recorder import trace
    from verl_speculator.diagnosis.tracefile import read_trace

__all__ = ["compare", "read_trace", "trace"]

_HOMES = {"compare": "comparison", "read_trace": "tracefile", "trace": "recorder"}


def __getattr__(name: str):
    # On first use: the command line reads this room's names without torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"verl_speculator.diagnosis.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
