"""A trace on disk: one safetensors file, whose header holds what is text and whose tensors hold the numbers.

No pickle, and a file that was cut off is known by its length. `header["trace"]` is JSON:

    calls:    [{name, kind, index, parent, inside, start, end, inputs, outputs}], facts as rows of the two tensors
    weights:  [facts], changed: names of those that the run itself changed
    tokens, top, environment, caches, kept, notes
    numbers [n, 85] and hashes [n]; kept/<i>/<j>: the tensors that --keep asked for
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verl_speculator.diagnose.tensor_stats import NUMBERS, Observation, TensorFacts, facts_of
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

FORMAT = "verl_speculator.trace"
VERSION = "1"


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        name: of the module, empty for the model itself.
        kind: the module's class.
        index: how many calls of this module came before.
        parent: position in the trace of the call that this one was made in, None for an outermost one.
        start, end: when it began and ended, on a clock that counts beginnings and ends.
        inputs, outputs: every tensor, by the name of its argument.
        inside: whether the traced model itself was running.
    """

    name: str
    kind: str
    index: int
    parent: int | None
    start: int
    end: int
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    inside: bool = True


@dataclass(frozen=True)
class Trace:
    """What `read_trace` gives.

    Attributes:
        path: of the file.
        model: class of the traced model.
        calls: in the order in which they began.
        weights: parameters and buffers by name, as they were when the trace began.
        changed: names of weights that were others when it ended.
        tokens: the integers that the first call was given.
        top: [(token, logit)] of the last logits, the five largest.
        environment: versions, flags, threads, attention implementation.
        caches: layout of every KV cache that was seen.
        kept: [{call, structure}] of the modules of `--keep`; structures name tensors of the file.
        notes: whatever the writer added.
    """

    path: Path
    model: str
    calls: tuple[Call, ...]
    weights: dict[str, TensorFacts]
    changed: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    top: tuple[tuple[int, float], ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    caches: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def called_inside(self) -> frozenset[str]:
        """Names of modules that were called while the traced model itself was running."""
        return frozenset(call.name for call in self.calls if call.inside)

    def kept_tensors(self) -> dict[str, Tensor]:
        """The tensors that `kept` names."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith("kept/")}  # noqa: SIM118


class StatsBuffer:
    """Collects observations, and gives each the number of its row."""

    def __init__(self) -> None:
        self.rows: list[Observation] = []

    def add(self, observation: Observation) -> int:
        """Its row."""
        self.rows.append(observation)
        return len(self.rows) - 1

    def tensors(self) -> dict[str, Tensor]:
        """All rows on the CPU, in one transfer for each device."""
        numbers = torch.zeros(len(self.rows), NUMBERS, dtype=torch.float64)
        hashes = torch.zeros(len(self.rows), dtype=torch.int64)
        for device in {row.numbers.device for row in self.rows}:
            places = [i for i, row in enumerate(self.rows) if row.numbers.device == device]
            numbers[places] = torch.stack([self.rows[i].numbers for i in places]).cpu()
            hashes[places] = torch.stack([self.rows[i].hash for i in places]).cpu()
        return {"numbers": numbers, "hashes": hashes}


def write_trace(path: Path, content: dict[str, Any], ledger: StatsBuffer, kept: dict[str, Tensor]) -> None:
    """Write a whole trace, or nothing.

    Raises:
        UserError: if the disk is full, or the file cannot be written.
    """
    from safetensors.torch import save

    content = content | {"facts": [row.meta for row in ledger.rows]}
    data = save(ledger.tensors() | kept, metadata={"format": FORMAT, "version": VERSION, "trace": json.dumps(content)})
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"out={path}: a trace of {len(data):,} bytes cannot be written: {error.strerror or error}; nothing is left "
            "behind; expected a disk with room (fewer modules, or no --keep, make a smaller trace)"
        ) from None


def read_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        UserError: if there is none, it was cut off, or it is something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a trace that `verl-speculator diagnose trace` wrote")
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"{path}: a file of tensors, but no trace (no format={FORMAT} in its header)")
            if header.get("version") != VERSION:
                raise UserError(f"{path}: a trace of version {header.get('version')}, expected version {VERSION}")
            numbers, hashes = file.get_tensor("numbers"), file.get_tensor("hashes")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cut off, or no trace ({' '.join(str(error).split())[:120]})") from None
    return _trace(path, json.loads(header["trace"]), numbers, hashes)


def _trace(path: Path, content: dict[str, Any], numbers: np.ndarray, hashes: np.ndarray) -> Trace:
    facts = [facts_of(meta, numbers[i], hashes[i]) for i, meta in enumerate(content.pop("facts"))]
    calls = tuple(
        Call(**one | {key: tuple(facts[i] for i in one[key]) for key in ("inputs", "outputs")})
        for one in content.pop("calls")
    )
    weights = {facts[i].name: facts[i] for i in content.pop("weights")}
    top = tuple((int(token), float(logit)) for token, logit in content.pop("top"))
    tokens, changed = tuple(content.pop("tokens")), tuple(content.pop("changed"))
    return Trace(path, calls=calls, weights=weights, top=top, tokens=tokens, changed=changed, **content)


PACKAGES = ("torch", "transformers", "vllm", "verl", "flash-attn")
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "VLLM_ATTENTION_BACKEND", "VLLM_BATCH_INVARIANT")


def environment(model: nn.Module) -> dict[str, Any]:
    """Everything that can make the same weights give other numbers."""
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    attention = set()
    for module in model.modules():
        attention.add(getattr(getattr(module, "config", None), "_attn_implementation", None))
        if hasattr(backend := getattr(module, "attn_backend", None), "get_name"):  # as vLLM's layers have it
            attention.add(backend.get_name())
    return found | {
        "attention": ", ".join(sorted(map(str, attention - {None}))) or "unknown",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "reduced_precision_bf16": bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "cudnn": {"benchmark": torch.backends.cudnn.benchmark, "deterministic": torch.backends.cudnn.deterministic},
        "sdpa": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        },
        "autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        "training": model.training,
        "devices": sorted({str(p.device) for p in model.parameters()}),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def is_cache(value: Any) -> bool:
    """Whether this is a KV cache as transformers has them: layers with keys and values."""
    return isinstance(getattr(value, "layers", None), list) and hasattr(value, "get_seq_length")


def cached_tensors(cache: Any, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Keys and values of one layer, where there are any yet."""
    if layer < len(cache.layers):
        for name in ("keys", "values"):
            tensor = getattr(cache.layers[layer], name, None)
            if isinstance(tensor, Tensor):
                yield f"cache.{name}", tensor


def cache_layout(cache: Any) -> dict[str, Any]:
    """Layers of one layout are a group; `slots` is how many tokens a layer holds."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        shape = tuple(keys.shape) if isinstance(keys, Tensor) else ()
        kind = (type(layer).__name__, shape, str(getattr(keys, "dtype", "")), getattr(layer, "sliding_window", None))
        groups.setdefault((*kind, int(layer.get_seq_length())), []).append(i)
    return {
        "kind": type(cache).__name__,
        "groups": [
            {"layers": layers, "kind": kind, "shape": list(shape), "dtype": dtype, "window": window, "slots": slots}
            for (kind, shape, dtype, window, slots), layers in groups.items()
        ],
    }
