"""EAGLE-3 as serving engines read it: the tensors and the keys of config.json.

Read from vLLM 0.24 to 0.32 (model_executor/models/llama_eagle3.py, config/speculative.py). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_speculator.checkpoint.format import DRAFT_TO_TARGET, NESTED_KEY, TARGET_TO_DRAFT
from verl_speculator.config.families import BASE_FROZEN
from verl_speculator.config.schema import LayerShape, SpeculatorConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
LLAMA_KEYS = frozenset(
    {
        *("attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings"),
        *("mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"),
        *("rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "torch_dtype", "vocab_size"),
    }
)
SERVED_KEYS = LLAMA_KEYS | {"architectures", "model_type", "norm_before_residual", AUX_LAYERS, NESTED_KEY}


def layer_prefix(index: int, count: int) -> str:
    """The name of one of `count` decoder layers."""
    return "midlayer" if count == 1 else f"layers.{index}"


def served_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama with EAGLE-3's keys, from that of a checkpoint, which it holds under one key: vLLM would
    take `n_predict` for a number of modules that the draft length is a multiple of."""
    layer = LayerShape(**content["layer"])
    rope = dict(layer.rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    vocabulary = {"draft_vocab_size": size} if (size := content.get("draft_vocab_size")) else {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": content["torch_dtype"],
        "hidden_size": content["input_hidden_dim"],
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": content["num_layers"],
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": layer.rms_norm_eps,
        # Readers before transformers 5 know the first two, later ones the third.
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if rope.get("rope_type") == "default" else scaling,
        "rope_parameters": rope,
        "max_position_embeddings": layer.positions,
        "vocab_size": content["vocab_size"],
        **vocabulary,
        "tie_word_embeddings": False,
        "norm_before_residual": content["norm_before_residual"],
        AUX_LAYERS: sorted(content["aux_layers"]),
        NESTED_KEY: dict(content),
    }


def served_shapes(config: SpeculatorConfig, hidden_size: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of `Eagle3LlamaForCausalLM`. Without an embedding vLLM takes the target model's."""
    layer, head_size = LayerShape(**config.layer), config.draft_vocab_size or vocab_size
    queries, keys = (n * layer.head_dim for n in (layer.num_attention_heads, layer.num_key_value_heads))
    inner = layer.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden_size, len(config.aux_layers) * hidden_size),
        "norm.weight": (hidden_size,),
        "lm_head.weight": (head_size, hidden_size),
    }
    if config.embedding != BASE_FROZEN:
        shapes["embed_tokens.weight"] = (vocab_size, hidden_size)
    if config.draft_vocab_size is not None:
        shapes |= {DRAFT_TO_TARGET: (head_size,), TARGET_TO_DRAFT: (vocab_size,)}
    for i in range(config.num_layers):
        inputs = 2 * hidden_size if i == 0 else hidden_size
        layer_shapes = {
            **{f"self_attn.{name}_proj": (rows, inputs) for name, rows in (("q", queries), ("k", keys), ("v", keys))},
            "self_attn.o_proj": (hidden_size, queries),
            **{f"mlp.{name}_proj": (inner, hidden_size) for name in ("gate", "up")},
            "mlp.down_proj": (hidden_size, inner),
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden_size,)),
            **({"hidden_norm": (hidden_size,)} if i == 0 else {}),
        }
        prefix = layer_prefix(i, config.num_layers)
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in layer_shapes.items()}
    return shapes


def unsupported_reason(config: SpeculatorConfig) -> str | None:
    """Why vLLM 0.24 to 0.32 cannot serve a speculator as EAGLE-3, None if it can."""
    if config.method != "eagle3":
        return f"method={config.method}: it serves eagle3; train that"
    # What it reads is three states wide unless the configuration has a key that not all versions know.
    if config.aux_layers is not None and len(config.aux_layers) != 3:
        return f"aux_layers={list(config.aux_layers)}: it reads three states; train with three"
    return None
