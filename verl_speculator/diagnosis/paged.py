"""The paged KV cache of vLLM, as its forward context describes it: the slots a layer writes and the blocks it reads.

Names are those of vLLM 0.24 (`vllm/forward_context.py`, `vllm/v1/attention/backends`). Nothing of vLLM is imported:
where no engine runs in this process there is no context.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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
