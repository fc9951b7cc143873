"""What `regenerate` is asked to do, checked before anything heavy loads."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_speculator.decoding.policy import SamplingPolicy
from verl_speculator.errors import UserError, nearest
from verl_speculator.files import check_writable

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class RegenerateSettings:
    """Everything that decides what is written; all of it is recorded.

    Attributes:
        base: directory or hub name.
        data: parquet with the prompts.
        out: parquet to write.
        backend: of BACKENDS.
        max_new_tokens: the most tokens of an answer.
        temperature, top_p, top_k: the sampling policy.
        seed: of sampling.
        keep_unfinished: keep rows with an answer that did not end. The chat template writes an end token behind it all
            the same, and so teaches an end that the base did not make.
        num_rows: rows of the file, at even distances; 0 for all.
        batch_size: prompts at a time, for Hugging Face's loop.
        shard_rows: rows that are kept together, and that a kill can cost.
        dtype, device: `auto` or a name.
        vllm_args: further arguments of `vllm.LLM`.
        overwrite: replace `out`, and shards of other settings.
    """

    base: str
    data: Path
    out: Path
    backend: str = "hf"
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    keep_unfinished: bool = False
    num_rows: int = 0
    batch_size: int = 16
    shard_rows: int = 512
    dtype: str = "auto"
    device: str = "auto"
    vllm_args: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.policy  # noqa: B018
        for name, least in (("max_new_tokens", 1), ("seed", 0), ("num_rows", 0), ("batch_size", 1), ("shard_rows", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected a number ≥ {least}")
        if self.backend not in BACKENDS:
            hint = nearest(self.backend, BACKENDS)
            raise UserError(f"backend={self.backend}: expected {' or '.join(BACKENDS)}{hint}")
        if self.backend == "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise UserError("backend=vllm: vLLM is not installed; expected `pip install vllm`, or --backend hf")
            if self.device != "auto":
                raise UserError(f"device={self.device}: vLLM chooses its device itself, expected auto")
        elif self.vllm_args:
            raise UserError(f"vllm_args={json.dumps(self.vllm_args)}: only for --backend vllm")

    @property
    def policy(self) -> SamplingPolicy:
        """Temperature, top-p and top-k."""
        return SamplingPolicy(self.temperature, self.top_p, self.top_k)

    def check_output(self) -> None:
        """Refuse an output that is there already or cannot be written, without making anything."""
        if self.out.is_dir():
            raise UserError(f"out={self.out}: a directory, expected a name for a parquet file")
        if self.out.suffix != ".parquet":
            raise UserError(f"out={self.out}: expected a name that ends in .parquet")
        if self.out.exists() and self.data.exists() and self.out.samefile(self.data):
            raise UserError(f"out={self.out}: is the data itself, expected another file")
        if self.out.exists() and not self.overwrite:
            raise UserError(f"out={self.out}: exists already; expected a new name, or --overwrite")
        check_writable(f"out={self.out}", self.out.parent)
