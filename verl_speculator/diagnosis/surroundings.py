"""What a run depends on beside its weights and inputs: versions, flags, attention, the layout of its KV cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

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
