"""EAGLE-3 drafts from elsewhere: both formats' logits over a text and several drafts, and all that is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import engine_format_readers as readings
from helpers.eagle3_drafts import LENGTH, D, V, check_drafts, logits, text
from helpers.family_variants import LAYER, Tables
from verl_speculator import load_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.convert import ConvertSettings, convert
from verl_speculator.interop.engine_formats import VLLM_EAGLE3, serving_engines
from verl_speculator.interop.export import export_speculator
from verl_speculator.utils.settings import UserError

M = 40
LLAMA = {
    **{"model_type": "llama", "hidden_size": D, "num_hidden_layers": 1, "vocab_size": V, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": None, "max_position_embeddings": 64},
    **{key: LAYER[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")},
}
SAFEAILAB = LLAMA | {
    **{"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": M, "torch_dtype": "float64", "bias": False},
    **{"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, "tie_word_embeddings": False},
}
SPECULATORS = {
    **{"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": M},
    **{"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 4], "norm_before_fc": False},
    "speculators_config": {
        "algorithm": "eagle3",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "verifier": {"name_or_path": "some/base", "architectures": ["LlamaForCausalLM"]},
    },
    # What differs from transformers' defaults; its head_dim is 32 times as many as here.
    "transformer_layer_config": {k: v for k, v in LLAMA.items() if k not in ("hidden_act", "rope_scaling")},
}


def tensors_of(names, *, embedding=False, vocabulary=True, dtype=torch.float64):
    """A draft's tensors, its layers by these names, spelt out here a second time."""
    draw = torch.Generator().manual_seed(5)
    heads, groups, width, inner = 4, 2, 6, 24
    shapes = {"fc": (D, 3 * D), "norm": (D,), "lm_head": (M if vocabulary else V, D)}
    if embedding:
        shapes["embed_tokens"] = (V, D)
    for i, name in enumerate(names):
        inputs = D if i else 2 * D
        sizes = {"q": heads, "k": groups, "v": groups}
        shapes |= {f"{name}.self_attn.{n}_proj": (count * width, inputs) for n, count in sizes.items()}
        shapes |= {f"{name}.self_attn.o_proj": (D, heads * width), f"{name}.mlp.down_proj": (D, inner)}
        shapes |= {f"{name}.mlp.{n}_proj": (inner, D) for n in ("gate", "up")}
        norms = ["input_layernorm", "post_attention_layernorm", *([] if i else ["hidden_norm"])]
        shapes |= {f"{name}.{n}": (D,) for n in norms}
    drawn = {
        f"{n}.weight": (torch.randn(shape, generator=draw).double() * 0.4).to(dtype) for n, shape in shapes.items()
    }
    drawn = {n: tensor + 1 if tensor.dim() == 1 else tensor for n, tensor in drawn.items()}
    if vocabulary:
        chosen = torch.randperm(V, generator=draw)[:M].sort().values
        mask = torch.zeros(V, dtype=torch.bool)
        mask[chosen] = True
        drawn |= {"d2t": chosen - torch.arange(M), "t2d": mask}
    return drawn


def put(folder, tensors, config, file="pytorch_model.bin"):
    folder.mkdir(parents=True)
    (save_file if file.endswith(".safetensors") else torch.save)(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tables():
    return Tables(V, D, torch.float64)


def converted(folder, tables, **settings):
    out = folder.parent / "out"
    result = convert(ConvertSettings(**{"source": folder, "out": out} | settings))
    speculator = load_speculator(out).requires_grad_(False)
    speculator.attach(tables)
    return result, speculator


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("embedding", [False, True])
def test_safeailabs_format(file, embedding, tmp_path, tables):
    tensors = tensors_of(["midlayer"], embedding=embedding)
    folder = put(tmp_path / "src", tensors, SAFEAILAB, file)
    result, speculator = converted(folder, tables, n_predict=3)
    check_drafts(
        lambda *given: readings.eagle3(SAFEAILAB, tensors, *given, tables.get_input_embeddings().weight), speculator
    )
    config = result.config
    assert (config.n_predict, config.aux_layers, config.draft_vocab_size) == (3, [1, 2, 4], M)
    assert config.embedding == ("own" if embedding else "base_frozen") and not config.norm_before_residual
    assert "eagle3, num_layers=1, draft_vocab_size=40, aux_layers=[1, 2, 4], hidden_size=20" in result.summary()
    assert serving_engines(config)[VLLM_EAGLE3] is None
    assert read_checkpoint_info(tmp_path / "out").provenance["converted"]["format"] == "eagle3"
    with pytest.raises(UserError, match=r"an EAGLE-3 draft in another format; .* `verl-speculator convert"):
        load_speculator(folder)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_format_of_speculators(layers, tmp_path, tables):
    tensors = tensors_of([f"layers.{i}" for i in range(layers)])
    verifier = {"verifier_norm.weight": torch.ones(D), "verifier_lm_head.weight": torch.ones(M, D)}
    nested = SPECULATORS["transformer_layer_config"] | {"num_hidden_layers": layers}
    folder = put(tmp_path / "src", tensors | verifier, SPECULATORS | {"transformer_layer_config": nested})
    result, speculator = converted(folder, tables)
    flat = LLAMA | {"num_hidden_layers": layers, "norm_before_residual": True}
    check_drafts(
        lambda *given: readings.eagle3(flat, tensors, *given, tables.get_input_embeddings().weight), speculator, count=4
    )
    assert result.config.n_predict == 4 and result.config.num_layers == layers
    assert read_checkpoint_info(tmp_path / "out").base_name == "some/base"


def test_a_logit_scale_becomes_part_of_the_head(tmp_path, tables):
    tensors, config = tensors_of(["midlayer"]), SAFEAILAB | {"logit_scale": 0.25}
    _, speculator = converted(put(tmp_path / "src", tensors, config), tables, n_predict=3)
    check_drafts(
        lambda *given: readings.eagle3(config, tensors, *given, tables.get_input_embeddings().weight), speculator
    )


def test_the_whole_vocabulary_has_no_map(tmp_path, tables):
    """SafeAILab's trainer writes one of zeros there."""
    tensors, config = tensors_of(["midlayer"], vocabulary=False), SAFEAILAB | {"draft_vocab_size": V}
    zeros = {"d2t": torch.zeros(V, dtype=torch.long), "t2d": torch.ones(V, dtype=torch.bool)}
    result, speculator = converted(put(tmp_path / "src", tensors | zeros, config), tables)
    assert result.config.draft_vocab_size is None
    assert speculator.draft_tokens is None


def test_what_was_converted_can_be_exported(tmp_path):
    tensors = tensors_of(["layers.0"])
    folder = put(tmp_path / "src", tensors, SPECULATORS)
    convert(ConvertSettings(source=folder, out=tmp_path / "out"))
    exported = export_speculator(read_checkpoint_info(tmp_path / "out"), "vllm-eagle3", tmp_path / "served")
    written = load_file(exported / "model.safetensors")
    assert written.keys() == {key.replace("layers.0.", "midlayer.") for key in tensors}
    assert all(torch.equal(written[key.replace("layers.0.", "midlayer.")], value) for key, value in tensors.items())


def test_the_usual_layers_come_from_the_base(tmp_path, monkeypatch):
    config = {key: value for key, value in SAFEAILAB.items() if key != "eagle_config"}
    folder = put(tmp_path / "src", tensors_of(["midlayer"]), config)
    with pytest.raises(UserError, match=r"no eagle_aux_hidden_state_layer_ids: the usual layers .* expected --base"):
        convert(ConvertSettings(source=folder, out=tmp_path / "out"))
    from transformers import LlamaConfig

    (tmp_path / "base").mkdir()
    base = LlamaConfig(**LLAMA | {"num_hidden_layers": 16}, architectures=["LlamaForCausalLM"])
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("verl_speculator.interop.convert.weights_fingerprint", lambda base: None)
    result = convert(ConvertSettings(source=folder, out=tmp_path / "out", base=str(tmp_path / "base")))
    assert result.config.aux_layers == [2, 8, 13]
    base.vocab_size = V + 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"vocab_size 62, .* holds a draft of vocab_size 61"):
        convert(ConvertSettings(source=folder, out=tmp_path / "again", base=str(tmp_path / "base")))


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def nested(**more):
    return {"transformer_layer_config": SPECULATORS["transformer_layer_config"] | more}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SAFEAILAB | {"norm_before_fc": True}, "norm_before_fc=true: it normalises the three states together"),
        (SAFEAILAB | {"eagle_config": {"norm_before_fc": True}}, "norm_before_fc=true"),
        (SPECULATORS | {"fc_norm": True}, "fc_norm=true: it normalises each of the three states"),
        (SPECULATORS | {"norm_output": True}, "norm_output=true: it feeds normalised states back"),
        (SAFEAILAB | {"attention_bias": True}, "attention_bias=true: its attention has biases"),
        (SPECULATORS | nested(mlp_bias=True), "mlp_bias=true: its MLP has biases"),
        (SAFEAILAB | {"ptd_token_id": 5}, "ptd_token_id=5: it drafts in parallel"),
        (SPECULATORS | {"speculators_model_type": "peagle"}, "speculators_model_type=peagle: expected eagle3"),
        (SPECULATORS | nested(model_type="qwen3"), "model_type=qwen3: expected llama"),
        (SPECULATORS | {"target_hidden_size": 24}, "target_hidden_size=24: expected hidden_size, 20"),
        (without(SPECULATORS, "norm_before_residual"), "norm_before_residual is missing; expected true or false"),
        (SAFEAILAB | {"logit_scale": 0}, "logit_scale=0: expected a number above 0"),
        (SAFEAILAB | {"hidden_act": "gelu"}, "hidden_act=gelu: expected silu"),
        (SAFEAILAB | {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False: expected True"),
        (SAFEAILAB | {"eagle_config": 3}, "eagle_config=3: expected an object"),
        (SAFEAILAB | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "expected rope_type default, linear"),
        (SPECULATORS | nested(layer_types=["sliding_attention"]), "eagle3 here attends to the whole text"),
        (SPECULATORS | {"eagle_aux_hidden_state_layer_ids": [1, 2]}, "=[1, 2]: expected three layers, ascending"),
        (SPECULATORS | {"eagle_aux_hidden_state_layer_ids": [4, 2, 1]}, "=[4, 2, 1]: expected three layers, ascending"),
        (SAFEAILAB | {"num_attention_heads": 2}, "self_attn.q_proj.weight is [24, 40], expected [12, 40]"),
        (SAFEAILAB | {"num_hidden_layers": 2}, "missing layers.1.self_attn.q_proj.weight"),
        (SAFEAILAB | {"vocab_size": "many"}, "vocab_size=many: expected an integer of at least 1"),
        (SAFEAILAB | {"draft_vocab_size": 39}, "d2t is [40] of int64, expected [39] of int64"),
    ],
)
def test_settings_that_are_refused(config, words, tmp_path):
    refused(put(tmp_path / "src", tensors_of(["midlayer"]), config), words)


def refused(folder, words, **settings):
    with pytest.raises(UserError) as error:
        convert(ConvertSettings(**{"source": folder, "out": folder.parent / "refused"} | settings))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (folder.parent / "refused").exists()


def changed(tensors, row, value):
    offsets = tensors["d2t"].clone()
    offsets[row] = value
    return {"d2t": offsets}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"mask_hidden": torch.ones(1, 3 * D)}, "mask_hidden: a draft in parallel"),
        (lambda t: {"midlayer.self_attn.q_norm.weight": torch.ones(6)}, "unexpected midlayer.self_attn.q_norm.weight"),
        (lambda t: {"layers.0.hidden_norm.weight": torch.ones(D)}, "midlayer.hidden_norm.weight under two names"),
        (lambda t: {"lm_head.weight": torch.ones(M + 1, D)}, "lm_head.weight is [41, 20], expected [40, 20]"),
        (lambda t: {"d2t": t["d2t"][:-1]}, "d2t is [39] of int64, expected [40] of int64"),
        (lambda t: {"d2t": t["d2t"].float()}, "d2t is [40] of float32"),
        (lambda t: changed(t, 0, -1), "d2t: row 0 stands for token -1; expected 0 to 60"),
        (lambda t: changed(t, 39, 61 - 39), "d2t: row 39 stands for token 61; expected 0 to 60"),
        (lambda t: changed(t, 7, int(t["d2t"][6]) - 1), "d2t: row 7 stands for token"),
        (lambda t: {"t2d": ~t["t2d"]}, "t2d names other tokens than d2t"),
        (lambda t: {"norm.weight": torch.ones(D)}, "norm.weight is float32; expected one type"),
        (lambda t: {"norm.weight": torch.full((D,), torch.nan).double()}, "norm.weight has values that are not finite"),
        (lambda t: {"fc.weight": torch.ones(D, 3 * D, dtype=torch.int8)}, "fc.weight is int8; expected heads"),
    ],
)
def test_tensors_that_are_refused(change, words, tmp_path):
    tensors = tensors_of(["midlayer"])
    refused(put(tmp_path / "src", tensors | change(tensors), SAFEAILAB), words)


def test_missing_tensors_and_files(tmp_path):
    tensors = tensors_of(["midlayer"])
    refused(put(tmp_path / "one", without(tensors, "d2t", "t2d"), SAFEAILAB), "no d2t: ")
    refused(put(tmp_path / "two", without(tensors, "fc.weight"), SAFEAILAB), "missing fc.weight")
    (tmp_path / "two" / "config.json").unlink()
    torch.save(tensors, tmp_path / "two" / "pytorch_model.bin")
    refused(tmp_path / "two", "an EAGLE-3 draft without ")
    folder = put(tmp_path / "three", tensors, SAFEAILAB)
    refused(folder, "hidden_state=pre_norm: ", hidden_state="pre_norm")
    refused(folder, "first_offset=1: ", first_offset=1)
    refused(folder, "format=vllm: ", format="vllm")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_the_model_of_speculators_itself(layers, normed, tmp_path):
    """Its own EAGLE-3 model, saved by itself, over a text and three drafts at every position."""
    package = pytest.importorskip("speculators.models.eagle3", exc_type=ImportError)
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    llama = LlamaConfig(**LLAMA | {"num_hidden_layers": layers}, attn_implementation="eager")
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    config = package.Eagle3SpeculatorConfig(
        transformer_layer_config=llama,
        draft_vocab_size=M,
        norm_before_residual=normed,
        eagle_aux_hidden_state_layer_ids=[1, 2, 4],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
        ),
    )
    model = package.Eagle3DraftModel(config).eval().double()
    tensors = tensors_of([f"layers.{i}" for i in range(layers)], embedding=True)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert all(name.startswith("verifier_") for name in missing)
    model.save_pretrained(tmp_path / "src")
    _, speculator = converted(tmp_path / "src", None)
    assert speculator.n_predict == 3

    hidden, tokens = text(3)
    package_logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: package_logits.append(output[0]))
    positions, document = torch.arange(len(tokens) - 1)[None], torch.zeros(1, len(tokens) - 1, dtype=torch.long)
    with torch.no_grad():
        model(hidden[None, :-1], tokens[None, 1:], document, position_ids=positions, ttt_steps=3)
    assert len(package_logits) == 3
    ours = logits(speculator, hidden, tokens, 3)[..., speculator.draft_tokens]
    for k, expected_logits in enumerate(package_logits):
        torch.testing.assert_close(
            ours[:, k], expected_logits[:LENGTH], rtol=1e-5, atol=1e-5
        )  # its norms are in float32
