"""`with trace(model, path):` writes statistics of every module's inputs and outputs."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import inspect
import itertools
import os
import platform
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.diagnose.trace_file import CACHE_PLACES, DeviceStats, device_stats, to_structure, write_trace
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.settings import UserError

# More integers than this are no prompt.
MAX_TOKENS = 1 << 16
TOP = 5
PACKAGES = ("torch", "transformers", "vllm", "verl", "flash-attn")
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "VLLM_ATTENTION_BACKEND", "VLLM_BATCH_INVARIANT")


def check_out(path: Path) -> None:
    """Check that a trace can be written to `path`, before anything runs.

    Raises:
        UserError: if not.
    """
    if path.is_dir():
        raise UserError(f"out={path}: a directory, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"out={path}: {path.parent} does not exist; expected a file in a directory that does")
    check_writable(f"out={path}", path.absolute().parent)


def select(names: Sequence[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The module names that match any pattern: a whole name, the end of a name (`mlp.router`), or one with `*`.

    Raises:
        UserError: for a pattern that matches nothing, with the nearest names.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")]
        if not matches:
            close = difflib.get_close_matches(pattern, [n for n in names if n], n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(n for n in names[1:5])}, …"
            raise UserError(f"{setting}={pattern}: matches no module of the model; {hint}")
        chosen.update(matches)
    return [name for name in names if name in chosen]


@contextmanager
def trace(
    model: nn.Module,
    path: str | Path,
    *,
    modules: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    weights: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> Iterator[Tracer]:
    """Trace every call of a model's modules inside the block, and write the trace at its end.

    Numbers stay on the device until then, so an accelerator is not synchronised. An exception leaves no file. Modules
    inside a compiled graph or a captured CUDA graph do not appear, because their hooks do not run: run eagerly.

    Args:
        model: any module.
        path: of the trace.
        modules: names, ends of names or patterns with `*`; None for all. A few modules cost a few percent of a run.
        keep: modules whose arguments and outputs are kept whole, with those of all their submodules, for `bisect`.
        weights: record every weight of the traced modules, and whether the run changed it.
        notes: anything that JSON can hold, kept in the trace. The block can add to the tracer's `notes`.

    Raises:
        UserError: for a name that matches no module, or a file that cannot be written.
    """
    path = Path(path)
    check_out(path)
    tracer = Tracer(model, modules, keep, weights=weights)
    tracer.notes.update(notes or {})
    with tracer.hooked():
        yield tracer
    tracer.write(path)


class Tracer:
    """Hooks on modules, and what they recorded. The arguments are those of `trace`."""

    def __init__(
        self, model: nn.Module, modules: Sequence[str] | None, keep: Sequence[str], *, weights: bool = True
    ) -> None:
        self.model = model
        self.notes: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []
        by_name = dict(model.named_modules())
        names = list(by_name)
        chosen = set(names if modules is None else select(names, modules, "modules"))
        roots = select(names, keep, "keep")
        self._kept_names = {n for n in names if any(not r or n == r or n.startswith(f"{r}.") for r in roots)}
        self.modules = {name: by_name[name] for name in names if name in chosen | self._kept_names}
        self._stats: list[DeviceStats] = []
        self._kept: dict[int, dict[str, Any]] = {}  # by index into `calls`
        self._kept_tensors: dict[str, Tensor] = {}
        self._clock = itertools.count(1)
        self._stack: list[int] = []
        self._counts: dict[str, int] = {}
        self._caches: dict[int, Any] = {}
        self._paged_layout: dict[str, Any] | None = None
        self._model_depth, self._model_was_called = 0, False
        self._tokens: Tensor | None = None
        self._top: Any = None
        self._vocab_size = _vocab_size(model)
        prefixes = ("",) if modules is None else tuple(f"{name}." for name in self.modules if name)
        self._weights = {
            name: self._record(name, tensor)
            for name, tensor in (self._named_weights() if weights else {}).items()
            if tensor.device.type != "meta" and name.startswith(prefixes)
        }

    def _named_weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _record(self, name: str, tensor: Tensor) -> int:
        """The row of a tensor's statistics."""
        self._stats.append(device_stats(name, tensor))
        return len(self._stats) - 1

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Record calls inside the block."""
        with ExitStack() as stack:
            stack.enter_context(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
            stack.enter_context(self.model.register_forward_hook(self._leave_model, always_call=True))
            for name, module in self.modules.items():
                before, after = functools.partial(self._before, name), functools.partial(self._after, name)
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
            yield

    def _enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model_depth += 1
        self._paged_layout = paged_layout() or self._paged_layout
        if not self._model_was_called:
            self._model_was_called = True
            self._take_tokens(named_arguments(model, args, kwargs))

    def _leave_model(self, *_: Any) -> None:
        self._model_depth -= 1

    def _take_tokens(self, arguments: dict[str, Any]) -> None:
        inputs = (tensor for value in arguments.values() for _, tensor in named_tensors("", value))
        integers = (t for t in inputs if not t.is_floating_point() and 0 < t.numel() <= MAX_TOKENS)
        tokens = next(integers, None)
        self._tokens = None if tokens is None else tokens.detach().reshape(-1).clone()

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(module, args, kwargs)
        if not self._stack and self._tokens is None:
            self._take_tokens(arguments)
        inputs = [tensor for item in arguments.items() for tensor in named_tensors(*item)]
        inputs += [*self._cached_tensors(module, arguments), *paged_tensors(module)]
        position, index = len(self.calls), self._counts.get(name, 0)
        self._counts[name] = index + 1
        call = {
            "name": name,
            "kind": type(module).__name__,
            "index": index,
            "parent": self._stack[-1] if self._stack else None,
            "inside": self._model_depth > 0,
            "start": next(self._clock),
            "end": 0,
            "inputs": [self._record(*tensor) for tensor in inputs],
            "outputs": [],
        }
        if name in self._kept_names:
            structure = to_structure({"args": args, "kwargs": kwargs}, self._kept_tensors)
            self._kept[position] = {"call": position, "inputs": structure}
        self._stack.append(position)
        self.calls.append(call)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Calls that raised an exception which the model caught never end.
        while self._stack and self.calls[self._stack[-1]]["name"] != name:
            self._stack.pop()
        if not self._stack:
            return
        position = self._stack.pop()
        call = self.calls[position]
        outputs = list(named_tensors("output", output))
        outputs += self._cached_tensors(module, named_arguments(module, args, kwargs))
        call["outputs"] = [self._record(*tensor) for tensor in outputs]
        if position in self._kept:
            self._kept[position]["outputs"] = to_structure(output, self._kept_tensors)
        if not self._stack:
            self._take_top(outputs)
        call["end"] = next(self._clock)

    def _cached_tensors(self, module: nn.Module, arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Keys and values of a transformers cache among the arguments, for a module that knows its layer's index."""
        for value in arguments.values():
            if isinstance(getattr(value, "layers", None), list) and hasattr(value, "get_seq_length"):
                self._caches[id(value)] = value
                index = getattr(module, "layer_idx", None)
                layer = value.layers[index] if isinstance(index, int) and index < len(value.layers) else None
                both = ((f"cache.{name}", getattr(layer, name, None)) for name in ("keys", "values"))
                return [(name, tensor) for name, tensor in both if isinstance(tensor, Tensor)]
        return []

    def _take_top(self, outputs: list[tuple[str, Tensor]]) -> None:
        for name, tensor in outputs:
            # In a serving engine the model returns hidden states, and another module computes the logits.
            is_whole = name == "output" and tensor.dim() >= 2 and self._vocab_size in (None, tensor.shape[-1])
            is_logits = name.endswith("logits") or is_whole
            if is_logits and tensor.is_floating_point() and tensor.shape[-1] >= TOP and tensor.numel():
                self._top = tensor.detach().reshape(-1, tensor.shape[-1])[-1].float().topk(TOP)
                return

    def write(self, path: Path) -> None:
        """Write the trace.

        Raises:
            UserError: if the file cannot be written.
        """
        now = self._named_weights()
        before = {name: self._stats[row].hash for name, row in self._weights.items() if name in now}
        top = [] if self._top is None else zip(self._top.indices.tolist(), self._top.values.tolist(), strict=True)
        content = {
            "model": type(self.model).__name__,
            "calls": self.calls,
            "weights": list(self._weights.values()),
            "changed": [n for n, code in before.items() if int(device_stats(n, now[n]).hash) != int(code)],
            "tokens": [] if self._tokens is None else self._tokens.tolist(),
            "top": [list(pair) for pair in top],
            "environment": environment(self.model),
            "caches": [*map(cache_layout, self._caches.values()), *filter(None, [self._paged_layout])],
            "kept": list(self._kept.values()),
            "notes": self.notes,
        }
        write_trace(path, content, self._stats, self._kept_tensors)


@functools.lru_cache(4096)
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a class's forward."""
    try:
        parameters = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the module's forward gives them."""
    names = _argument_names(type(module))
    positional = {names[i] if i < len(names) else f"argument{i}": value for i, value in enumerate(args)}
    return positional | dict(kwargs)


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value, with its path."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            yield name, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    for key, item in items:
        yield from named_tensors(f"{name}.{key}", item)


def _vocab_size(model: nn.Module) -> int | None:
    """Number of logits, None where neither a module nor its configuration names it."""
    owners = (owner for part in model.modules() for owner in (part, getattr(part, "config", None)))
    sizes = (getattr(owner, "vocab_size", None) for owner in owners)
    return next((size for size in sizes if isinstance(size, int)), None)


def environment(model: nn.Module) -> dict[str, Any]:
    """What can make the same weights compute other numbers: versions, flags, threads, devices."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    attention = set()
    for module in model.modules():
        attention.add(getattr(getattr(module, "config", None), "_attn_implementation", None))
        if hasattr(backend := getattr(module, "attn_backend", None), "get_name"):  # a layer of vLLM
            attention.add(backend.get_name())
    cuda = torch.backends.cuda
    return {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **versions,
        "attention": ", ".join(sorted(map(str, attention - {None}))) or "unknown",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": bool(cuda.matmul.allow_tf32),
        "reduced_precision_bf16": bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "cudnn": {"benchmark": torch.backends.cudnn.benchmark, "deterministic": torch.backends.cudnn.deterministic},
        "sdpa": {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
        },
        "autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        "training": model.training,
        "devices": sorted({str(p.device) for p in model.parameters()}),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cache_layout(cache: Any) -> dict[str, Any]:
    """Layout of a transformers cache; `slots` is the number of tokens that a layer holds."""
    layers = enumerate(cache.layers)
    rows = [(i, None, layer, getattr(layer, "keys", None), int(layer.get_seq_length())) for i, layer in layers]
    return _layout(type(cache).__name__, rows)


def paged_layout() -> dict[str, Any] | None:
    """Layout of a running vLLM engine's cache, None without one; `slots` is the length of the longest request."""
    batches, modules = _forward_context()
    layers = []
    for name, attention in (batches[0] if batches else {}).items():
        layer, block_table = modules.get(name), id(getattr(attention, "block_table", None))
        cache, slots = getattr(layer, "kv_cache", None), getattr(attention, "max_seq_len", None)
        layers.append((name, block_table, layer, cache, slots))
    return _layout("vLLM", layers) if layers else None


def _layout(kind: str, layers: Iterable[tuple[Any, Hashable, Any, Any, int | None]]) -> dict[str, Any]:
    """Layers of one block table and layout as a group, from (name, block table, layer, tensor, slots) of each."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for name, block_table, layer, tensor, slots in layers:
        shape, dtype = (tuple(tensor.shape), str(tensor.dtype)) if isinstance(tensor, Tensor) else ((), "")
        window = getattr(layer, "sliding_window", None)
        groups.setdefault((block_table, type(layer).__name__, shape, dtype, window, slots), []).append(name)
    keys = ("kind", "shape", "dtype", "window", "slots")
    rows = [{"layers": sorted(names)} | dict(zip(keys, group[1:], strict=True)) for group, names in groups.items()]
    return {"kind": kind, "groups": rows}


def _forward_context() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """vLLM's attention metadata by layer, one mapping for each micro-batch, and its attention modules by name."""
    module = sys.modules.get("vllm.forward_context")
    if module is None or not module.is_forward_context_available():
        return [], {}
    context = module.get_forward_context()
    batches = context.attn_metadata if isinstance(context.attn_metadata, list) else [context.attn_metadata]
    # A run that only measures memory has no metadata.
    return [batch for batch in batches if isinstance(batch, dict)], context.no_compile_layers


def paged_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Slots, blocks and lengths that a vLLM attention layer reads from the forward context; nothing for others."""
    layer = getattr(module, "layer_name", None)
    batches = _forward_context()[0] if isinstance(layer, str) else []
    for number, batch in enumerate(batches):
        for name in (*CACHE_PLACES, "cache.seq_lens"):
            tensor = getattr(batch.get(layer), name.removeprefix("cache."), None)
            if isinstance(tensor, Tensor):
                yield name + (f".{number}" if len(batches) > 1 else ""), tensor
