"""Tiny models of real architectures, and faults to plant in them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GptOssConfig
from transformers.cache_utils import DynamicLayer

from helpers.buffered_moe import BufferedMoE
from helpers.tiny_models import base_config
from verl_speculator.diagnose import trace

MODELS = ("llama", "gpt_oss", "qwen2_moe")
TOKENS = torch.tensor([[5, 9, 23, 4, 77, 31, 8, 100]])


def build(name: str, **settings) -> nn.Module:
    """A model of random weights, wide enough for faults to be seen and small enough to run in milliseconds."""
    torch.manual_seed(0)
    if name == "gpt_oss":
        shape = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = GptOssConfig(**shape | settings, sliding_window=8, max_position_embeddings=256, rope_parameters=rope)
        config._attn_implementation = "eager"
    else:
        config = base_config(name, 330)
        config = type(config)(**config.to_dict() | {"layer_types": None} | settings)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return model


def run(model: nn.Module, path: Path, *, cache: Cache | None = None, positions=None, tokens=TOKENS, **settings) -> Path:
    """Trace a prefill and one more token."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    given = [{}, {}] if positions is None else [{"position_ids": p} for p in positions]
    with torch.no_grad(), trace(model, path, **settings):
        for ids, more in zip((tokens, tokens[:, :1]), given, strict=True):
            model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
    return path


def router_of(model: nn.Module, layer: int) -> tuple[str, nn.Module]:
    """Name and module of a layer's router."""
    mlp = model.model.layers[layer].mlp
    name = "router" if hasattr(mlp, "router") else "gate"
    return f"model.layers.{layer}.mlp.{name}", getattr(mlp, name)


class Stale(nn.Module):
    """A router that looks at what it was given the time before."""

    def __init__(self, router: nn.Module, is_stale: bool) -> None:
        super().__init__()
        self.router, self.is_stale, self.before = router, is_stale, None

    def forward(self, hidden_states):
        seen = self.before if self.is_stale and self.before is not None else hidden_states
        self.before = hidden_states.clone()
        return self.router.forward(seen)


class FusedNorm(nn.Module):
    """Adds the residual and normalises, in one module, as serving engines do."""

    def __init__(self, norm: nn.Module, drops: bool) -> None:
        super().__init__()
        self.norm, self.drops = norm, drops

    def forward(self, x, residual):
        total = x if self.drops else x + residual
        return self.norm.forward(total), total


class FusedLayer(nn.Module):
    """A decoder layer around a `FusedNorm`."""

    def __init__(self, layer: nn.Module, drops: bool) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn, self.mlp = layer.input_layernorm, layer.self_attn, layer.mlp
        self.post_attention_layernorm = FusedNorm(layer.post_attention_layernorm, drops)
        self.attention_type = getattr(layer, "attention_type", "full_attention")

    def forward(self, hidden_states, **kwargs):
        x, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        x, residual = self.post_attention_layernorm(x, hidden_states)
        x = self.mlp(x)
        return (x[0] if isinstance(x, tuple) else x) + residual


class OffByOne(DynamicLayer):
    """Writes every key one slot too far on."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys = keys.roll(1, -2)
        return self.keys, values


def in_another_type(module: nn.Module, dtype: torch.dtype) -> None:
    """Have a module compute in another type than the rest of its model."""

    def cast(value, kind):
        if isinstance(value, tuple):
            return tuple(cast(v, kind) for v in value)
        return value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    own = next(module.parameters()).dtype
    module.to(dtype)
    module.register_forward_pre_hook(lambda _, args: cast(args, dtype))
    module.register_forward_hook(lambda _, args, output: cast(output, own))


def with_buffers(model: nn.Module, experts: int, seed: int) -> nn.Module:
    """A dense model with a `BufferedMoE` in every layer."""
    for i, layer in enumerate(model.model.layers):
        layer.mlp = BufferedMoE(f"layers.{i}.mlp", model.config.hidden_size, experts).fill(seed + i)
    return model


def greedy(model: nn.Module, tokens: torch.Tensor, count: int) -> list[int]:
    """The next tokens, with a cache of its own."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(-1)
            found.append(int(tokens))
    return found


def copied(model: nn.Module) -> nn.Module:
    """Another model with the same weights, which has run nothing yet."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, BufferedMoE):
            module.is_ready = False
    return other


def softly(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in float64."""
    return F.softmax(logits.double(), -1)
