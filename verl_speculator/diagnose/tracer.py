"""`with trace(model, path):` writes what every module was given and what it made of it."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.diagnose.tensor_stats import leaves, named_arguments, observe, to_structure
from verl_speculator.diagnose.trace_file import (
    StatsBuffer,
    cache_layout,
    cached_tensors,
    environment,
    is_cache,
    write_trace,
)
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError

# Which slots and blocks a request gets is the allocator's choice, and another one in another run is no fault by itself.
PLACES = ("cache.slot_mapping", "cache.block_table")
NAMES = (*PLACES, "cache.seq_lens")


def _metadata() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Attention metadata by layer, one mapping for each micro-batch, and the layers themselves."""
    module = sys.modules.get("vllm.forward_context")
    if module is None or not module.is_forward_context_available():
        return [], {}
    context = module.get_forward_context()
    batches = context.attn_metadata if isinstance(context.attn_metadata, list) else [context.attn_metadata]
    # A run that only measures memory has none.
    return [batch for batch in batches if isinstance(batch, dict)], context.no_compile_layers


def paged_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Slots, blocks and lengths that an attention layer is handed beside its arguments; nothing for other modules."""
    layer = getattr(module, "layer_name", None)
    batches = _metadata()[0] if isinstance(layer, str) else []
    for number, batch in enumerate(batches):
        for name in NAMES:
            tensor = getattr(batch.get(layer), name.removeprefix("cache."), None)
            if isinstance(tensor, Tensor):
                yield name + (f".{number}" if len(batches) > 1 else ""), tensor


def paged_layout() -> dict[str, Any] | None:
    """The layout of the running engine's cache, in the words of `surroundings.cache_layout`: layers that share a block
    table and a layout are a group; `slots` is how many tokens the longest request holds. None without an engine."""
    batches, layers = _metadata()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, one in (batches[0] if batches else {}).items():
        layer, table = layers.get(name), getattr(one, "block_table", None)
        cache = getattr(layer, "kv_cache", None)
        shape, dtype = (tuple(cache.shape), str(cache.dtype)) if isinstance(cache, Tensor) else ((), "")
        kind = (type(layer).__name__, shape, dtype, getattr(layer, "sliding_window", None))
        groups.setdefault((id(table), *kind, getattr(one, "max_seq_len", None)), []).append(name)
    words = ("kind", "shape", "dtype", "window", "slots")
    told = [{"layers": sorted(names)} | dict(zip(words, key[1:], strict=True)) for key, names in groups.items()]
    return {"kind": "vLLM", "groups": told} if groups else None


MOST_TOKENS = 1 << 16
TOP = 5


def check_out(path: Path) -> None:
    """Whether a trace can be written there, before anything runs.

    Raises:
        UserError: if not.
    """
    if path.is_dir():
        raise UserError(f"out={path}: a directory, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"out={path}: {path.parent} does not exist; expected a file in a directory that does")
    check_writable(f"out={path}", path.absolute().parent)


def select(names: Sequence[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The modules that patterns name: whole names, ends of names (`mlp.router`), or with `*`.

    Raises:
        UserError: for a pattern that matches nothing, with the nearest names.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")]
        if not found:
            close = difflib.get_close_matches(pattern, [n for n in names if n], n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(n for n in names[1:5])}, …"
            raise UserError(f"{setting}={pattern}: matches no module of the model; {hint}")
        chosen.update(found)
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
) -> Iterator[Recorder]:
    """Trace every call of a model's modules while the block lasts, and write the trace when it ends.

    Numbers stay on the device until then, so that nothing waits for it. An exception leaves no file. Modules inside of
    a compiled graph or a captured CUDA graph are not called one by one and do not appear: run eagerly.

    Args:
        model: any module.
        path: of the trace.
        modules: names, ends of names or patterns with `*`; None for all. A few cost a few percent of a run.
        keep: modules whose arguments and outputs are kept whole, for `bisect`, with all that they call.
        weights: take the fingerprint of every weight of the traced modules, at the beginning and at the end.
        notes: anything that JSON can hold, kept in the trace; the recorder's `notes` can be added to in the block.

    Raises:
        UserError: for a name that matches no module, or a file that cannot be written.
    """
    path = Path(path)
    check_out(path)
    recorder = Recorder(model, modules, keep, weights=weights)
    recorder.notes.update(notes or {})
    with recorder.hooked():
        yield recorder
    recorder.write(path)


def _vocabulary(model: nn.Module) -> int | None:
    """How many logits a model or one of its parts makes, None where nothing says it."""
    owners = (owner for part in model.modules() for owner in (part, getattr(part, "config", None)))
    said = (getattr(owner, "vocab_size", None) for owner in owners)
    return next((size for size in said if isinstance(size, int)), None)


class Recorder:
    """Hooks on modules and what they have seen.

    Args:
        model: any module.
        modules: patterns, None for all.
        keep: patterns of modules that are kept whole with their submodules.
        weights: whether to take down weights.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[str] | None, keep: Sequence[str], *, weights: bool = True
    ) -> None:
        self.model, self.notes = model, {}
        everything = dict(model.named_modules())
        names = list(everything)
        chosen = names if modules is None else select(names, modules, "modules")
        self._keep = select(names, keep, "keep")
        kept = [name for name in names if self._is_kept(name)]
        self.modules = {name: everything[name] for name in names if name in {*chosen, *kept}}
        self.limited = modules is not None
        self.ledger, self.calls = StatsBuffer(), []
        self.kept: list[dict[str, Any]] = []
        self.kept_tensors: dict[str, Tensor] = {}
        self._clock, self._stack, self._counts = 0, [], {}
        self._caches: dict[int, Any] = {}
        self._paged: dict[str, Any] | None = None
        self._depth, self._entered = 0, False
        self._tokens: Tensor | None = None
        self._top: Any = None
        self._vocabulary = _vocabulary(model)
        self._weights = self._fingerprints() if weights else {}
        self._had_weights = weights

    def _is_kept(self, name: str) -> bool:
        return any(not k or name == k or name.startswith(f"{k}.") for k in self._keep)

    def _fingerprints(self) -> dict[str, int]:
        """Row of every parameter and buffer of the traced modules."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        prefixes = None if not self.limited else tuple(f"{name}." for name in self.modules if name)
        return {
            name: self.ledger.add(observe(name, tensor))
            for name, tensor in named.items()
            if tensor.device.type != "meta" and (prefixes is None or name.startswith(prefixes))
        }

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen while the block lasts."""
        handles = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]
        try:
            for name, module in self.modules.items():
                before, after = self._hooks(name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        self._paged = paged_layout() or self._paged
        if not self._entered:
            self._entered = True
            self._take_tokens(named_arguments(model, args, kwargs))

    def _leave(self, *_: Any) -> None:
        self._depth -= 1

    def _take_tokens(self, arguments: dict[str, Any]) -> None:
        inputs = (tensor for value in arguments.values() for _, tensor in leaves("", value))
        whole = [t for t in inputs if not t.is_floating_point() and 0 < t.numel() <= MOST_TOKENS]
        self._tokens = whole[0].detach().reshape(-1).clone() if whole else None

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _hooks(self, name: str) -> tuple[Any, Any]:
        is_kept = self._is_kept(name)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = named_arguments(module, args, kwargs)
            if not self._stack and self._tokens is None:
                self._take_tokens(arguments)
            call = {
                "name": name,
                "kind": type(module).__name__,
                "index": self._counts.get(name, 0),
                "parent": self._stack[-1] if self._stack else None,
                "inside": self._depth > 0,
                "start": self._tick(),
                "end": 0,
                "inputs": [self.ledger.add(observe(*leaf)) for leaf in self._inputs(module, arguments)],
                "outputs": [],
            }
            self._counts[name] = call["index"] + 1
            if is_kept:
                structure = to_structure({"args": args, "kwargs": kwargs}, f"kept/{len(self.kept)}", self.kept_tensors)
                self.kept.append({"call": len(self.calls), "inputs": structure})
                call["kept"] = len(self.kept) - 1
            self._stack.append(len(self.calls))
            self.calls.append(call)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # An exception that was caught on the way leaves calls that never ended.
            while self._stack and self.calls[self._stack[-1]]["name"] != name:
                self._stack.pop()
            if not self._stack:
                return
            call = self.calls[self._stack.pop()]
            cached = self._cached(module, named_arguments(module, args, kwargs))
            seen = [*leaves("output", output), *cached]
            call["outputs"] = [self.ledger.add(observe(*leaf)) for leaf in seen]
            if "kept" in call:
                kept = self.kept[call.pop("kept")]
                kept["outputs"] = to_structure(output, f"kept/{call['start']}.out", self.kept_tensors)
            if not self._stack:
                self._take_top(seen)
            call["end"] = self._tick()

        return before, after

    def _inputs(self, module: nn.Module, arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        yield from (leaf for name, value in arguments.items() for leaf in leaves(name, value))
        yield from self._cached(module, arguments)
        yield from paged_tensors(module)

    def _cached(self, module: nn.Module, arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """A layer's part of the cache, for the module that knows which layer it is."""
        for value in arguments.values():
            if is_cache(value):
                self._caches[id(value)] = value
                layer = getattr(module, "layer_idx", None)
                return list(cached_tensors(value, layer)) if isinstance(layer, int) else []
        return []

    def _take_top(self, outputs: list[tuple[str, Tensor]]) -> None:
        for name, tensor in outputs:
            # An engine's model hands over states, and another of its modules makes logits of them.
            is_whole = name == "output" and tensor.dim() >= 2 and self._vocabulary in (None, tensor.shape[-1])
            is_logits = name.endswith("logits") or is_whole
            if is_logits and tensor.is_floating_point() and tensor.shape[-1] >= TOP and tensor.numel():
                self._top = tensor.detach().reshape(-1, tensor.shape[-1])[-1].float().topk(TOP)
                return

    def write(self, path: Path) -> None:
        """The trace to a file.

        Raises:
            UserError: if it cannot be written.
        """
        changed: list[str] = []
        if self._had_weights:
            first = {name: self.ledger.rows[i] for name, i in self._weights.items()}
            named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            last = {name: observe(name, named[name]) for name in first if name in named}
            pairs = [torch.stack([first[name].hash.cpu(), last[name].hash.cpu()]) for name in last]
            changed = [name for name, pair in zip(last, pairs, strict=True) if pair[0] != pair[1]]
        top = [] if self._top is None else zip(self._top.indices.tolist(), self._top.values.tolist(), strict=True)
        content = {
            "model": type(self.model).__name__,
            "calls": [{k: v for k, v in call.items() if k != "kept"} for call in self.calls],
            "weights": list(self._weights.values()),
            "changed": changed,
            "tokens": [] if self._tokens is None else self._tokens.tolist(),
            "top": [list(pair) for pair in top],
            "environment": environment(self.model),
            "caches": [*map(cache_layout, self._caches.values()), *([self._paged] if self._paged else [])],
            "kept": self.kept,
            "notes": self.notes,
        }
        write_trace(path, content, self.ledger, self.kept_tensors)
