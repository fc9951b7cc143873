"""A trace: statistics of tensors, calls of modules, and the safetensors file that holds both.

Of a tensor a trace holds statistics, a hash for equality, and a sketch for the distance to another tensor. The sketch
is 64 sums of all values with fixed random signs: a count sketch (Charikar, Chen and Farach-Colton 2002).
‖sketch(a) − sketch(b)‖² is an unbiased estimate of ‖a − b‖² with a relative standard deviation of at most √(2/64), so
the distance is usually within a fifth. No value is left out, as it would be by sampling.

The file needs no pickle, and its length shows whether it is complete. `header["trace"]` is JSON: `tensors` holds name,
shape, strides, dtype and device of n tensors; all else is as in `Trace`, with indices into `tensors`. The tensors of
the file are `numbers` [n, 85], `hashes` [n], and `kept/…`: arguments and outputs of the modules of `--keep`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

FORMAT = "verl_speculator.trace"
VERSION = "2"
# Arguments of a call that tell an attention layer which cache slots and blocks to use. The allocator chooses them, so
# different ones in two runs are no fault by themselves.
CACHE_PLACES = ("cache.slot_mapping", "cache.block_table")
SKETCH = 64
SAMPLES = 16
CHUNK = 1 << 20
NUMBERS = 5 + SKETCH + SAMPLES
# The largest relative difference that rounding explains, by the coarsest type of a run: the unit roundoff (1e-16,
# 6e-8, 5e-4, 4e-3) times what a stack of layers makes of it, with a margin.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
# The same for the conversion of a weight alone.
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class TensorStats:
    """Statistics of a tensor's finite values, computed in float64.

    Attributes:
        name: of the argument, output or parameter.
        nan, inf: number of values that are not finite.
        norm: root of the sum of squares.
        hash: of every value: equal for equal values of types of at most 32 bits, and of 64-bit types.
        sketch: [64]
        samples: at most 16 values: the first ones of integers, otherwise values spread over the tensor.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    nan: int
    inf: int
    mean: float
    std: float
    absmax: float
    norm: float
    hash: int
    sketch: np.ndarray
    samples: np.ndarray

    @classmethod
    def from_numbers(cls, meta: dict[str, Any], numbers: np.ndarray, code: int) -> TensorStats:
        """Statistics from `DeviceStats` as a trace file holds them: numbers [NUMBERS]."""
        nan, inf, total, squares, absmax = numbers[:5].tolist()
        count = math.prod(meta["shape"])
        finite = max(count - nan - inf, 1)
        mean = total / finite
        return cls(
            **meta | {"shape": tuple(meta["shape"]), "strides": tuple(meta["strides"])},
            nan=int(nan),
            inf=int(inf),
            mean=mean,
            std=math.sqrt(max(squares / finite - mean**2, 0.0)),
            absmax=absmax,
            norm=math.sqrt(squares),
            hash=int(code),
            sketch=numbers[5 : 5 + SKETCH],
            samples=numbers[5 + SKETCH :][: min(count, SAMPLES)],
        )

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is of a floating point type, whose values round."""
        return "float" in self.dtype

    def same_values(self, other: TensorStats) -> bool:
        """Whether all values are equal by their hash, whatever the shapes."""
        return (self.count, self.nan, self.inf, self.hash) == (other.count, other.nan, other.inf, other.hash)


def distance(a: TensorStats, b: TensorStats) -> float:
    """‖a − b‖ divided by the root mean square of both norms.

    Returns:
        0 for equal values, about √2 for unrelated ones. Infinite where no number is meaningful: for different sizes,
        different counts of NaN or infinity, or integers that differ.
    """
    if a.same_values(b):
        return 0.0
    if (a.count, a.nan, a.inf) != (b.count, b.nan, b.inf) or not (a.is_float and b.is_float):
        return math.inf
    scale = math.sqrt((a.norm**2 + b.norm**2) / 2)
    return float(np.linalg.norm(a.sketch - b.sketch)) / scale if scale else 0.0


@dataclass
class DeviceStats:
    """Statistics whose numbers are still on the device: reading them one by one would synchronise each time.

    Attributes:
        meta: name, shape, strides, dtype and device, for `TensorStats`.
        numbers: [NUMBERS] nan, inf, sum, sum of squares, absmax, sketch, samples.
        hash: []
    """

    meta: dict[str, Any]
    numbers: Tensor
    hash: Tensor


@torch.no_grad()
def device_stats(name: str, tensor: Tensor) -> DeviceStats:
    """Compute the statistics of a tensor without synchronising an accelerator. Keeps no reference to the tensor."""
    meta = {
        "name": name,
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
    }
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
    if flat.device.type == "mps":  # has no float64
        flat = flat.cpu()
    if not flat.numel():
        return DeviceStats(meta, torch.zeros(NUMBERS, dtype=torch.float64), torch.zeros((), dtype=torch.int64))
    chunks, codes = zip(*(_chunk_stats(chunk, i) for i, chunk in enumerate(flat.split(CHUNK))), strict=True)
    numbers = torch.stack(chunks)
    total = numbers.sum(0)
    total[4] = numbers[:, 4].amax()
    samples = flat[_sample_index(flat.numel(), tensor.is_floating_point(), flat.device)].to(torch.float64)
    return DeviceStats(meta, torch.cat([total, _pad(samples, SAMPLES)]), torch.stack(codes).sum())


def stats_of(tensor: Tensor, name: str = "") -> TensorStats:
    """Statistics of a tensor, at once."""
    stats = device_stats(name, tensor)
    return TensorStats.from_numbers(stats.meta, stats.numbers.cpu().numpy(), int(stats.hash))


def _chunk_stats(values: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """[5 + SKETCH] sums in float64 over the chunk's values [at most CHUNK], and its part [] of the hash."""
    x = values.to(torch.float64)
    count, total = x.numel(), x.sum()
    nan = inf = total.new_zeros(())
    # On a CPU reading the sum is free; an accelerator would have to synchronise.
    if x.device.type != "cpu" or not math.isfinite(total.item()):
        nan, inf = x.isnan().sum(), x.isinf().sum()
        x = x.nan_to_num(0.0, 0.0, 0.0)
        total, values = x.sum(), x.to(values.dtype) if values.is_floating_point() else values
    multipliers, signs = _chunk_constants(x.device)
    factor, chunk_signs = _constants_of_chunk(chunk, x.device)
    bits = _bits(values)
    # A sum of products with odd multipliers modulo 2⁶⁴ depends on the place of every value, and adds up over chunks.
    code = (bits * multipliers[: len(bits)]).sum() * factor
    sketch = _pad(x * signs[:count], SKETCH).view(-1, SKETCH).sum(0) * chunk_signs
    least, most = torch.aminmax(x)
    return torch.cat([torch.stack([nan, inf, total, torch.dot(x, x), torch.maximum(-least, most)]), sketch]), code


def _bits(values: Tensor) -> Tensor:
    """[at most n] 64-bit integers that hold all n values; two values of a narrow floating point type in each."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    if values.dtype == torch.float64:
        bits = (values + 0.0).view(torch.int64)  # turns -0 into 0
        return bits ^ (bits >> 32)  # values of a narrow type have zeros in their low bits
    return (_pad(values.to(torch.float32), 2) + 0.0).view(torch.int64)


def _pad(values: Tensor, multiple: int) -> Tensor:
    missing = -len(values) % multiple
    return F.pad(values, (0, missing)) if missing else values


def _random_bits(counters: np.ndarray) -> np.ndarray:
    """splitmix64: [n] counters to [n] random 64-bit integers, the same in every version of every library."""
    with np.errstate(over="ignore"):
        x = (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@functools.cache
def _chunk_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every chunk: [CHUNK] odd multipliers of the hash, and [CHUNK] signs of the sketch."""
    random = _random_bits(np.arange(CHUNK))
    multipliers = torch.from_numpy((random | np.uint64(1)).view(np.int64))
    signs = torch.from_numpy(1.0 - 2.0 * ((random >> np.uint64(40)) & np.uint64(1)).astype(np.float64))
    return multipliers.to(device), signs.to(device)


@functools.lru_cache(4096)
def _constants_of_chunk(chunk: int, device: torch.device) -> tuple[int, Tensor]:
    """For one chunk: a factor of its hash, and [SKETCH] signs."""
    random = _random_bits(np.arange(SKETCH + 1) + (chunk + 1) * CHUNK)
    signs = 1.0 - 2.0 * (random[1:] >> np.uint64(63)).astype(np.float64)
    return int((random[:1] | np.uint64(1)).view(np.int64)[0]), torch.from_numpy(signs).to(device)


@functools.lru_cache(4096)
def _sample_index(count: int, is_float: bool, device: torch.device) -> Tensor:
    """[at most SAMPLES] which of `count` values are the samples."""
    if count <= SAMPLES or not is_float:
        return torch.arange(min(count, SAMPLES), device=device)
    stride = count // SAMPLES
    offsets = (_random_bits(np.arange(SAMPLES)) % np.uint64(stride)).astype(np.int64)
    return torch.from_numpy(np.arange(SAMPLES) * stride + offsets).to(device)


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
    content = content | {"tensors": [row.meta for row in stats]}
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
    metas = content.pop("tensors")
    stats = [TensorStats.from_numbers(*row) for row in zip(metas, numbers, hashes, strict=True)]
    for call in content["calls"]:
        call |= {key: tuple(stats[i] for i in call[key]) for key in ("inputs", "outputs")}
    content["calls"] = tuple(Call(**call) for call in content["calls"])
    content["weights"] = {stats[i].name: stats[i] for i in content["weights"]}
    content["top"] = tuple(map(tuple, content["top"]))
    content |= {key: tuple(content[key]) for key in ("tokens", "changed")}
    return Trace(path, **content)


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
        return (tuple if kind == "tuple" else list)(from_structure(item, tensors, lost) for item in value)
    if kind == "object":
        lost.append(value)
        return None
    return value
