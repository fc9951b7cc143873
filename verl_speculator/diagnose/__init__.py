"""Find the first place where two runs differ: traces of modules, their comparison, and checks of a checkpoint.

with trace(model, "a.trace", modules=["layers.*"]):
    model(tokens)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from verl_speculator.utils.settings import Device, Option, check_minimums

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


Dtype = Annotated[str, Option("auto (fp32 on a CPU, else bf16), fp32, bf16, fp16, fp64")]
External = Annotated[
    str | None, Option("a module or a Python file to import first: own architectures, kernels, patches")
]


@dataclass(frozen=True)
class TracedModelOptions:
    """How the traced models are loaded: a base model with its speculator, or another model."""

    base: Annotated[str | None, Option("a base model, with --speculator")] = None
    speculator: Annotated[str | None, Option("its speculator: a checkpoint or a run")] = None
    external_lib: External = None
    dtype: Dtype = "auto"
    device: Device = "auto"


@dataclass(frozen=True)
class DiagnosisSettings:
    """What `diagnose speculator` checks, on which prompts."""

    checkpoint: Annotated[str, Option("a checkpoint, or a run's folder for its latest step", positional=True)]
    base: Annotated[str, Option("base model: a directory or a hub name")]
    prompts: Annotated[Path, Option("parquet or jsonl of prompts like those that are served")]
    rollout_trace: Annotated[Path | None, Option("a trace of the serving engine's draft")] = None
    train_data: Annotated[Path | None, Option("what it was trained on [as its config.json names]")] = None
    num_prompts: Annotated[int, Option("prompts of each file, at even distances", minimum=1)] = 16
    max_new_tokens: Annotated[int, Option("the most tokens of an answer", minimum=1)] = 64
    num_draft: Annotated[int | None, Option("tokens that the engine drafts a round", minimum=1)] = None
    external_lib: External = None
    dtype: Dtype = "auto"
    device: Device = "auto"

    def __post_init__(self) -> None:
        check_minimums(self)
