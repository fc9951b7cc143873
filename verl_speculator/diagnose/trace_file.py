"""A trace on disk: one safetensors file. Its header holds all text, its tensors the numbers.

It needs no pickle, and its length shows whether it is complete. `header["trace"]` is JSON: `facts` holds name, shape,
strides, dtype and device of n tensors; all else is as in `Trace`, with indices into `facts` for tensors. The file's
tensors are `numbers` [n, 85], `hashes` [n], and `kept/…`: arguments and outputs of the modules of `--keep`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_speculator.diagnose.tensor_stats import NUMBERS, DeviceStats, TensorStats
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

FORMAT = "verl_speculator.trace"
VERSION = "1"
# Arguments of a call that tell an attention layer which cache slots and blocks to use. The allocator chooses them, so
# different ones in two runs are no fault by themselves.
CACHE_PLACES = ("cache.slot_mapping", "cache.block_table")


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        name: of the module, empty for the model itself.
        kind: the module's class.
        index: number of earlier calls of this module.
        parent: index into `Trace.calls` of the enclosing call, None for an outermost one.
        start, end: times on a clock that counts starts and ends of calls; `end` is 0 if the call raised.
        inputs, outputs: every tensor, by the name of its argument.
        inside: whether the traced model itself was running.
    """

    name: str
    kind: str
    index: int
    parent: int | None
    start: int
    end: int
    inputs: tuple[TensorStats, ...]
    outputs: tuple[TensorStats, ...]
    inside: bool = True


@dataclass(frozen=True)
class Trace:
    """The content of a trace file.

    Attributes:
        path: of the file.
        model: class of the traced model.
        calls: in the order in which they started.
        weights: parameters and buffers by name, as they were when the trace began.
        changed: names of weights that had other values when it ended.
        tokens: the integers that the first call was given.
        top: [(token, logit)] of the last logits, the five largest.
        environment: versions, flags, threads, attention implementation.
        caches: layout of every KV cache.
        kept: [{call, inputs, outputs}] of the modules of `--keep`; the structures name tensors of the file.
        notes: what the writer added.
    """

    path: Path
    model: str
    calls: tuple[Call, ...]
    weights: dict[str, TensorStats]
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


def write_trace(path: Path, content: dict[str, Any], stats: Sequence[DeviceStats], kept: dict[str, Tensor]) -> None:
    """Write a whole trace, or nothing.

    Raises:
        UserError: if the disk is full, or the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        "numbers": torch.zeros(len(stats), NUMBERS, dtype=torch.float64),
        "hashes": torch.zeros(len(stats), dtype=torch.int64),
    }
    for device in {row.numbers.device for row in stats}:  # one transfer for each device
        rows = [i for i, row in enumerate(stats) if row.numbers.device == device]
        tensors["numbers"][rows] = torch.stack([stats[i].numbers for i in rows]).cpu()
        tensors["hashes"][rows] = torch.stack([stats[i].hash for i in rows]).cpu()
    content = content | {"facts": [row.meta for row in stats]}
    data = save(tensors | kept, metadata={"format": FORMAT, "version": VERSION, "trace": json.dumps(content)})
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"out={path}: a trace of {len(data):,} bytes cannot be written: {error.strerror or error}; nothing is left "
            "behind; expected a disk with free space (fewer modules, or no --keep, make a smaller trace)"
        ) from None


def read_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        UserError: if there is no such file, it was cut off, or it is no trace.
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
    content = json.loads(header["trace"])
    metas = content.pop("facts")
    stats = [TensorStats.from_numbers(*row) for row in zip(metas, numbers, hashes, strict=True)]
    calls = (
        call | {key: tuple(stats[i] for i in call[key]) for key in ("inputs", "outputs")} for call in content["calls"]
    )
    return Trace(
        **content
        | {
            "path": path,
            "calls": tuple(Call(**call) for call in calls),
            "weights": {stats[i].name: stats[i] for i in content["weights"]},
            "top": tuple((int(token), float(logit)) for token, logit in content["top"]),
            "tokens": tuple(content["tokens"]),
            "changed": tuple(content["changed"]),
        }
    )


def to_structure(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON. Copies of its tensors go to `tensors`; any other object becomes the name of its class."""
    if isinstance(value, Tensor):
        key = f"kept/{len(tensors)}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"dict": {str(k): to_structure(v, tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [to_structure(v, tensors) for v in value]}
    return {"object": type(value).__name__}


def from_structure(structure: Mapping[str, Any], tensors: Mapping[str, Tensor], lost: list[str]) -> Any:
    """The value of `to_structure`. Objects become None; their classes are appended to `lost`."""
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: from_structure(item, tensors, lost) for key, item in value.items()}
    if kind in ("tuple", "list"):
        items = [from_structure(item, tensors, lost) for item in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "object":
        lost.append(value)
        return None
    return value
