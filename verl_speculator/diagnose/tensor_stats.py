"""What is kept of a tensor: its statistics, a hash that says "the same", and a sketch that says how far apart.

A sketch is 64 sums of all values with fixed random signs (Charikar, Chen and Farach-Colton 2002): the distance of two
sketches estimates that of the two tensors without bias, most often within a fifth, and no value is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SKETCH = 64
SAMPLES = 16
CHUNK = 1 << 20
NUMBERS = 5 + SKETCH + SAMPLES
# The largest relative difference that rounding explains, for the coarsest type of a run: what a stack of layers makes
# of its unit roundoff (1e-16, 6e-8, 5e-4, 4e-3), with a margin.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
# What converting a weight alone explains.
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class TensorFacts:
    """A tensor as a trace remembers it. Statistics are of its finite values, in float64.

    Attributes:
        name: of the argument or output, or of the parameter.
        shape, strides, dtype, device: as it was given.
        nan, inf: how many values are not finite.
        mean, std, absmax, norm: norm is the root of the sum of squares.
        hash: of every value; equal for equal values of types of at most 32 bits, and of types of 64.
        sketch: [64]
        samples: the first values of integers, values spread over the tensor otherwise; at most 16.
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

    @property
    def count(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether its values round."""
        return "float" in self.dtype

    def same_values(self, other: TensorFacts) -> bool:
        """Whether every value is known to be the same, whatever the shapes."""
        return (self.count, self.nan, self.inf, self.hash) == (other.count, other.nan, other.inf, other.hash)


def distance(a: TensorFacts, b: TensorFacts) -> float:
    """‖a − b‖ over the root mean square of their norms: 0 for equal values, about √2 for unrelated ones, and infinite
    where no number says it: other sizes, other NaN, or integers that are not the same."""
    if a.same_values(b):
        return 0.0
    if (a.count, a.nan, a.inf) != (b.count, b.nan, b.inf) or not (a.is_float and b.is_float):
        return math.inf
    scale = math.sqrt((a.norm**2 + b.norm**2) / 2)
    return float(np.linalg.norm(a.sketch - b.sketch)) / scale if scale else 0.0


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64: [n] counters to [n] random 64-bit numbers, the same in every version of every library."""
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@functools.cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """[CHUNK] odd multipliers of the hash, and [CHUNK] signs of the sketch."""
    random = _mix(np.arange(CHUNK))
    odd = torch.from_numpy((random | np.uint64(1)).view(np.int64))
    signs = torch.from_numpy(1.0 - 2.0 * ((random >> np.uint64(40)) & np.uint64(1)).astype(np.float64))
    return odd.to(device), signs.to(device)


@functools.lru_cache(4096)
def _of_chunk(number: int, device: torch.device) -> tuple[int, Tensor]:
    """What sets a chunk apart from the others: a factor of its hash, and [SKETCH] signs."""
    random = _mix(np.arange(SKETCH + 1) + (number + 1) * CHUNK)
    signs = 1.0 - 2.0 * (random[1:] >> np.uint64(63)).astype(np.float64)
    return int((random[:1] | np.uint64(1)).view(np.int64)[0]), torch.from_numpy(signs).to(device)


@functools.lru_cache(4096)
def _places(count: int, is_float: bool, device: torch.device) -> Tensor:
    """Which values are kept as samples."""
    if count <= SAMPLES or not is_float:
        return torch.arange(min(count, SAMPLES), device=device)
    stride = count // SAMPLES
    places = np.arange(SAMPLES) * stride + (_mix(np.arange(SAMPLES)) % np.uint64(stride)).astype(np.int64)
    return torch.from_numpy(places).to(device)


@dataclass
class Observation:
    """Facts whose numbers still lie on the device: reading them one by one would wait for it each time.

    Attributes:
        meta: name, shape, strides, dtype and device, for `TensorFacts`.
        numbers: [NUMBERS] nan, inf, sum, sum of squares, absmax, sketch, samples.
        hash: []
    """

    meta: dict[str, Any]
    numbers: Tensor
    hash: Tensor


@torch.no_grad()
def observe(name: str, tensor: Tensor) -> Observation:
    """Take down a tensor. Nothing of it is kept.

    Args:
        name: for the facts.
        tensor: any type but those without values.
    """
    meta = {
        "name": name,
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
    }
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
    if flat.device.type == "mps":  # knows no float64
        flat = flat.cpu()
    device = flat.device
    if not flat.numel():
        return Observation(meta, *(torch.zeros(n, dtype=t) for n, t in ((NUMBERS, torch.float64), ((), torch.int64))))
    total, code = None, None
    for number, piece in enumerate(flat.split(CHUNK)):
        numbers, part = _numbers(piece, number)
        if total is None:
            total, code = numbers, part
        else:
            absmax = torch.maximum(total[4], numbers[4])
            total, code = total + numbers, code + part
            total[4] = absmax
    places = _places(flat.numel(), tensor.is_floating_point(), device)
    samples = flat[places].to(torch.float64)
    if len(samples) < SAMPLES:
        samples = torch.nn.functional.pad(samples, (0, SAMPLES - len(samples)))
    return Observation(meta, torch.cat([total, samples]), code)


def _numbers(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """[5 + SKETCH] sums over a chunk of at most CHUNK values in float64, and its part of the hash."""
    x = values.to(torch.float64)
    count, total = x.numel(), x.sum()
    nan = inf = total.new_zeros(())
    # On a CPU a look costs nothing; elsewhere it would wait for the device.
    if x.device.type != "cpu" or not math.isfinite(total.item()):
        nan, inf = x.isnan().sum(), x.isinf().sum()
        x = x.nan_to_num(0.0, 0.0, 0.0)
        total, values = x.sum(), x.to(values.dtype) if values.is_floating_point() else values
    odd, signs = _multipliers(x.device)
    factor, own = _of_chunk(number, x.device)
    bits = _bits(values)
    code = (bits * odd[: len(bits)]).sum() * factor
    signed = x * signs[:count]
    if count % SKETCH:
        signed = torch.nn.functional.pad(signed, (0, -count % SKETCH))
    sketch = signed.view(-1, SKETCH).sum(0) * own
    least, most = torch.aminmax(x)
    return torch.cat([torch.stack([nan, inf, total, torch.dot(x, x), torch.maximum(-least, most)]), sketch]), code


def _bits(values: Tensor) -> Tensor:
    """[at most n] 64-bit numbers that hold all of n values; of narrow floating point types two in one."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    if values.dtype == torch.float64:
        bits = (values + 0.0).view(torch.int64)  # makes -0 a 0
        return bits ^ (bits >> 32)  # narrow values in a wide type have zeros at their low bits
    if values.numel() % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return (values.to(torch.float32) + 0.0).view(torch.int64)


def facts_of(meta: dict[str, Any], numbers: np.ndarray, code: int) -> TensorFacts:
    """Facts from the numbers as they lie in a file: [NUMBERS]."""
    nan, inf, total, squares, absmax = (float(x) for x in numbers[:5])
    count = math.prod(meta["shape"])
    finite = max(count - nan - inf, 1)
    mean = total / finite
    return TensorFacts(
        name=meta["name"],
        shape=tuple(meta["shape"]),
        strides=tuple(meta["strides"]),
        dtype=meta["dtype"],
        device=meta["device"],
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


@functools.lru_cache(4096)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a class's forward."""
    try:
        found = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under the names that the module's forward has for them."""
    names = _parameters(type(module))
    placed = {names[i] if i < len(names) else f"argument{i}": value for i, value in enumerate(args)}
    return placed | dict(kwargs)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value with its path."""
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(f"{name}.{i}", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from leaves(f"{name}.{one.name}", getattr(value, one.name, None))


def to_structure(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; tensors go to `tensors`, as copies, and anything else becomes the name of its class."""
    if isinstance(value, Tensor):
        key = f"{prefix}/{len(tensors)}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"dict": {str(k): to_structure(v, prefix, tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [to_structure(v, prefix, tensors) for v in value]}
    return {"object": type(value).__name__}


def from_structure(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The value again; what was an object is None."""
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: from_structure(item, tensors) for key, item in value.items()}
    if kind in ("tuple", "list"):
        items = [from_structure(item, tensors) for item in value]
        return tuple(items) if kind == "tuple" else items
    return value if kind == "value" else None


def objects_in(structure: Mapping[str, Any]) -> list[str]:
    """Classes of what could not be kept."""
    ((kind, value),) = structure.items()
    if kind == "object":
        return [value]
    items = value.values() if kind == "dict" else value if kind in ("tuple", "list") else ()
    return [name for item in items for name in objects_in(item)]


def map_tensors(value: Any, change: Any) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def floats_to(value: Any, dtype: torch.dtype) -> Any:
    """The same structure with its floating point tensors in another type."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
