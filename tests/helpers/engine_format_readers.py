"""Serving engines' formats read a second time, in plain torch, from config.json and the file of tensors alone.

Written from ArcticInference 0.3.0 (vllm/spec_dec/arctic_speculator.py), vLLM 0.24.0 (model_executor/models/medusa.py)
and vLLM 0.32.0 (model_executor/models/llama_eagle3.py), without a line of the package: what they compute from a
directory is what such an engine computes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def read(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """As the engines do: safetensors first."""
    content = json.loads((directory / "config.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    tensors = load_file(files[0]) if files else torch.load(directory / "pytorch_model.bin", weights_only=True)
    types = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    assert types == {content["torch_dtype"]}
    return content, tensors


def norm(x, weight=None, bias=None):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else weight * x + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def arctic(directory: Path, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[K, T, V] logits of ArcticLSTMSpeculator."""
    config, w = read(directory)
    assert config["architectures"] == ["ArcticLSTMSpeculatorPreTrainedModel"]
    assert config["model_type"] == "mlp_speculator" and "hidden_size" not in config
    assert len(config["top_k_tokens_per_head"]) == config["n_predict"]
    int(config["emb_dim"])
    inner = [int(part) for part in str(config["inner_dim"]).split(".")]
    count = config["n_predict"]
    state_weight = 0.5 ** (0.5 / count)
    scale = math.sqrt((1 - state_weight**2) * (inner[0] / 2)) / state_weight
    state, cell, logits = hidden, torch.zeros(len(hidden), inner[0], dtype=hidden.dtype), []
    if config["scale_input"]:
        state = norm(state) / math.sqrt(2)
    for k in range(count):
        if config["method"] == "sum_lstm":
            assert config["tie_weights"] and config["tie_lstm_embs"]
            gates = ("forget", "input", "output", "cell")
            first = torch.cat([w[f"{g}_proj.{min(k, 1)}.weight"] for g in gates])
            z = state @ first.T + scale * w["forget_emb.0.weight"][tokens[:, k]].repeat(1, 4)
            forget, admit, release, new = z.chunk(4, -1)
            new = gelu(norm(new, w["cell_ln.0.weight"], w["cell_ln.0.bias"]))
            cell = cell * forget.sigmoid() + new * admit.sigmoid()
            state = gelu(norm(cell, w["state_ln.0.weight"], w["state_ln.0.bias"])) * release.sigmoid()
        else:
            own = 0 if config["tie_weights"] else k
            proj = min(k, 1) if config["tie_weights"] else k
            state = state @ w[f"proj.{proj}.0.weight"].T + scale * w[f"emb.{own}.0.weight"][tokens[:, k]]
            state = norm(state, w[f"ln.{own}.0.weight"], w[f"ln.{own}.0.bias"])
            for i in range(1, len(inner)):
                state = gelu(state) @ w[f"ln.{own}.{3 * i - 1}.weight"].T
                state = norm(state, w[f"ln.{own}.{3 * i}.weight"], w[f"ln.{own}.{3 * i}.bias"])
            state = gelu(state)
        # Tied heads are one module there, which takes the first name's values.
        logits.append(state @ w[f"head.{0 if config['tie_weights'] else k}.weight"].T)
    return torch.stack(logits)


def arctic_mlp(directory: Path, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[K, T, V] logits of ArcticMLPSpeculator."""
    config, w = read(directory)
    assert config["architectures"] == ["ArcticMLPSpeculatorPreTrainedModel"] and "hidden_size" not in config
    width, count, tied = config["inner_dim"] or config["emb_dim"], config["n_predict"], config["tie_weights"]
    assert config["emb_dim"] == hidden.shape[1] and not (tied and count == 1)
    state_weight = 0.5 ** (0.5 / count)
    scale = math.sqrt((1 - state_weight**2) * (width / 2)) / state_weight
    state, logits = norm(hidden) / math.sqrt(2) if config["scale_input"] else hidden, []
    for k in range(count):
        own, proj = (0, min(k, 1)) if tied else (k, k)
        state = state @ w[f"proj.{proj}.weight"].T + scale * w[f"emb.{own}.weight"][tokens[:, k]]
        state = gelu(norm(state, w[f"ln.{own}.weight"], w[f"ln.{own}.bias"]))
        logits.append(state @ w[f"head.{own}.weight"].T)
    return torch.stack(logits)


def vllm_medusa(directory: Path, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[K, T, V] logits of Medusa."""
    config, w = read(directory)
    for key in list(config):  # MedusaConfig.from_pretrained does this to every key
        if "num" in key and "heads" in key:
            config["num_heads"] = config.pop(key)
        elif "num" in key and "layers" in key:
            config["num_hidden_layers"] = config.pop(key)
    assert config["architectures"] == ["MedusaModel"] and config["model_type"] == "medusa"
    assert config["hidden_size"] == hidden.shape[1] and config["medusa_fc_bias"]
    logits = []
    for k in range(config["num_heads"]):
        state = hidden
        for j in range(config["num_hidden_layers"]):
            z = state @ w[f"blocks.{k}.layers.{j}.weight"].T + w[f"blocks.{k}.layers.{j}.bias"]
            state = state + z * z.sigmoid()
        products = state @ w[f"lm_heads.{0 if config.get('original_lm_head') else k}.weight"].T
        if config.get("truncated_vocab_size", config["vocab_size"]) < config["vocab_size"]:
            whole = torch.full((len(state), config["vocab_size"]), -torch.inf, dtype=state.dtype)
            whole[:, w["token_map"]] = products
            products = whole
        logits.append(products)
    return torch.stack(logits)


def rms(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def turned(x, config):
    """RoPE of [positions, heads, width], from position 0 on, its angles in float32."""
    width = x.shape[-1]
    frequencies = 1 / config["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    else:
        assert scaling["rope_type"] == "default"
    angles = torch.arange(len(x)).float()[:, None] * frequencies
    cos, sin = (f(angles).repeat(1, 2)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def eagle3_layer(config, w, prefix, x, residual):
    """A decoder layer of Llama over all positions, from what its projections read [T, D or 2D] and the residual."""
    heads, groups, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v = ((x @ w[f"{prefix}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, width)) for n in "qkv")
    q, k = turned(q, config), turned(k, config).repeat_interleave(heads // groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
    scores = scores + torch.full_like(scores[0], -torch.inf).triu(1)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(heads // groups, 1)).flatten(1)
    residual = residual + y @ w[f"{prefix}.self_attn.o_proj.weight"].T
    z = rms(residual, w[f"{prefix}.post_attention_layernorm.weight"], config["rms_norm_eps"])
    gate, up = (z @ w[f"{prefix}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    return residual + (gate * gate.sigmoid() * up) @ w[f"{prefix}.mlp.down_proj.weight"].T


def eagle3(config, w, hidden, tokens, count, embedding=None):
    """[count, V] logits of Eagle3LlamaForCausalLM for the drafts after the last state of a text.

    Args:
        config: of config.json.
        w: the tensors.
        hidden: [n, 3D] the target model's states.
        tokens: [n + count − 1] the token after each state, then the drafts.
        embedding: the target model's, used if the tensors have none.
    """
    assert config["model_type"] == "llama" and config["hidden_act"] == "silu" and not config.get("attention_bias")
    eps, normed = config["rms_norm_eps"], config.get("norm_before_residual", False)
    names = [
        "midlayer" if "midlayer.hidden_norm.weight" in w else f"layers.{i}" for i in range(config["num_hidden_layers"])
    ]
    embedded = w.get("embed_tokens.weight", embedding)[tokens]
    states, logits = hidden @ w["fc.weight"].T, []
    for _ in range(count):
        # Earlier drafts' states stay as their own steps computed them; all layers are computed anew.
        x = embedded[: len(states)]
        e = rms(x, w[f"{names[0]}.input_layernorm.weight"], eps)
        u = rms(states, w[f"{names[0]}.hidden_norm.weight"], eps)
        out = eagle3_layer(config, w, names[0], torch.cat([e, u], -1), u if normed else states)
        for name in names[1:]:
            out = eagle3_layer(config, w, name, rms(out, w[f"{name}.input_layernorm.weight"], eps), out)
        products = rms(out[-1], w["norm.weight"], eps) @ w["lm_head.weight"].T * config.get("logit_scale", 1.0)
        if "d2t" in w:
            whole = torch.full((config["vocab_size"],), -torch.inf, dtype=products.dtype)
            whole[torch.arange(len(products)) + w["d2t"]] = products
            products = whole
        logits.append(products)
        states = torch.cat([states, out[-1:]])
    return torch.stack(logits)
