"""Where two runs part: traces of modules, and what their comparison says.

with trace(model, "a.trace", modules=["layers.*"]):
    model(tokens)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_speculator.diagnose.comparison import compare
    from verl_speculator.diagnose.trace_file import read_trace
    from verl_speculator.diagnose.tracer import trace

__all__ = ["compare", "read_trace", "trace"]

_HOMES = {
    "compare": "verl_speculator.diagnose.comparison",
    "read_trace": "verl_speculator.diagnose.trace_file",
    "trace": "verl_speculator.diagnose.tracer",
}


def __getattr__(name: str):
    # On first use: the command line reads this room's names without torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
