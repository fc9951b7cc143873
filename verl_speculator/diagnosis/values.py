"""Arguments and outputs of modules: their tensors by name, and as a structure that can be written and built again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
