"""EAGLE-3 for serving engines: the same logits over a text and several drafts, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from helpers import engine_format_readers as readings
from helpers.eagle3_drafts import D, V, check_drafts, logits, text
from helpers.family_variants import LAYER, Tables, build_attached, configurations
from verl_speculator import SpeculatorConfig, load_speculator, save_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.engine_formats import FORMATS, contract_faults, serving_engines
from verl_speculator.interop.export import export_speculator, model_card
from verl_speculator.utils.settings import UserError

CONFIGURATIONS = {name: config for name, config in configurations().items() if config.reads_sequence}
SMALL = {"method": "eagle3", "n_predict": 3, "aux_layers": [0, 1, 2], "layer": LAYER}


@pytest.fixture
def tables(monkeypatch) -> Tables:
    """A base model of two tables, wherever an export loads one."""
    base = Tables(V, D, torch.float64)
    monkeypatch.setattr("verl_speculator.interop.export.load_base", lambda *_, **__: base)
    monkeypatch.setattr("verl_speculator.checkpoint.format.base_shape", lambda base: (D, V))
    monkeypatch.setattr("verl_speculator.checkpoint.format.weights_fingerprint", lambda *_: None)
    return base


def checkpoint(config, folder):
    """Every parameter drawn anew, norms too."""
    speculator = build_attached(config, D, V, seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    save_speculator(speculator, folder, base_architectures=["Qwen2ForCausalLM"])
    return speculator.requires_grad_(False)


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_an_export_drafts_what_ours_drafts(config, tmp_path, tables):
    speculator = checkpoint(config, tmp_path / "spec")
    info, base = read_checkpoint_info(tmp_path / "spec"), None
    if config.head == "base_frozen":
        with pytest.raises(UserError, match=r"has head=base_frozen, and an export writes .* out; expected --base"):
            export_speculator(info, "vllm-eagle3", tmp_path / "out")
        base = "a base"
    out = export_speculator(info, "vllm-eagle3", tmp_path / "out", base=base)
    content, tensors = readings.read(out)
    embedding = tables.get_input_embeddings().weight
    check_drafts(lambda *text: readings.eagle3(content, tensors, *text, embedding), speculator)
    assert ("embed_tokens.weight" in tensors) == (config.embedding != "base_frozen")
    assert content["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert ("t2d" in tensors) == (config.draft_vocab_size is not None)
    if "t2d" in tensors:
        assert tensors["t2d"].nonzero().flatten().equal(torch.arange(len(tensors["d2t"])) + tensors["d2t"])
    # Ours reads it too.
    again = load_speculator(out)
    again.attach(tables)
    hidden, tokens = text(3)
    torch.testing.assert_close(logits(again, hidden, tokens, 3), logits(speculator, hidden, tokens, 3))
    assert read_checkpoint_info(out).is_draft_model


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("keys", ["old", "new", "both"])
def test_old_and_new_keys_of_rope_agree(rope, keys, tmp_path):
    """transformers computes the frequencies of the checkpoint from either."""
    config = SpeculatorConfig(**SMALL | {"embedding": "own", "layer": LAYER | {"rope": rope}})
    speculator = checkpoint(config, tmp_path / "spec")
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), "vllm-eagle3", tmp_path / "out")
    content = json.loads((out / "config.json").read_text())
    for key in {"old": ["rope_parameters"], "new": ["rope_theta", "rope_scaling"], "both": []}[keys]:
        del content[key]
    (out / "config.json").write_text(json.dumps(content))
    llama = AutoConfig.from_pretrained(out)
    positions = torch.arange(50)[None]
    cos, sin = LlamaRotaryEmbedding(llama)(torch.empty(0, dtype=torch.float64), positions)
    ours = speculator.rotation(positions[0])
    assert torch.equal(cos[0, :, None], ours.cos) and torch.equal(sin[0, :, None], ours.sin)
    assert (llama.num_key_value_heads, llama.head_dim, llama.hidden_size) == (2, 6, D)


def test_what_vllm_would_not_notice():
    config = SpeculatorConfig(**SMALL, draft_vocab_size=50)
    shapes = FORMATS["vllm-eagle3"].tensors(config, D, V)
    assert "embed_tokens.weight" not in shapes and shapes["t2d"] == (V,)
    shapes["fc.weight"] = (D, 2 * D)
    shapes["midlayer.q_norm.weight"] = shapes.pop("midlayer.hidden_norm.weight")
    content = dict.fromkeys(FORMATS["vllm-eagle3"].keys - {"head_dim"}) | {"n_predict": 3}
    assert contract_faults("vllm-eagle3", config, D, V, shapes, content) == [
        "missing midlayer.hidden_norm.weight",
        "unexpected midlayer.q_norm.weight",
        "fc.weight is [20, 40], expected [20, 60]",
        "config.json has no head_dim",
        "config.json has n_predict",
    ]


def test_a_mask_that_contradicts_the_map_is_refused(tmp_path):
    checkpoint(SpeculatorConfig(**SMALL, draft_vocab_size=50), tmp_path / "spec")
    file = tmp_path / "spec" / "pytorch_model.bin"
    torch.save(torch.load(file) | {"t2d": torch.ones(V, dtype=torch.bool)}, file)
    with pytest.raises(UserError, match="t2d names other tokens than d2t"):
        load_speculator(tmp_path / "spec")


def test_who_serves_it(tmp_path):
    reasons = serving_engines(SpeculatorConfig(**SMALL))
    assert reasons.pop("vLLM 0.24 to 0.32 without plugins, as EAGLE-3") is None
    assert reasons.pop("verl_speculator.decoding") is None
    assert all(reason.endswith("--format vllm-eagle3") for reason in reasons.values())
    other = serving_engines(SpeculatorConfig(method="medusa"))
    assert other["vLLM 0.24 to 0.32 without plugins, as EAGLE-3"] == "method=medusa: it serves eagle3; train that"
    checkpoint(SpeculatorConfig(**SMALL), tmp_path)
    info = read_checkpoint_info(tmp_path)
    for name in ("arctic", "arctic-mlp", "vllm-medusa", "vllm"):
        with pytest.raises(
            UserError, match=f"--format {name}: .* cannot load .*: method=eagle3: .*serves.*--format vllm-eagle3"
        ):
            export_speculator(info, name, tmp_path / "out")
    card = model_card(info, "vllm-eagle3")
    assert '"method": "eagle3"' in card and '"num_speculative_tokens": 3' in card and "custom_class" not in card
