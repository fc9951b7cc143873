"""Find the first place where two runs differ: traces of modules, their comparison, and checks of a checkpoint.

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

_MODULES = {
    "compare": "verl_speculator.diagnose.comparison",
    "read_trace": "verl_speculator.diagnose.trace_file",
    "trace": "verl_speculator.diagnose.tracer",
}


def __getattr__(name: str):
    # Imported on first use, so that the command line starts without torch.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
