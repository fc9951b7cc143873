"""Medusa heads from elsewhere: both ways of naming them, what is taken over, and everything that is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig

from helpers.drafters import load_base, states_of
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.decoding.target import Target
from verl_speculator.interop.convert import ConvertSettings, convert
from verl_speculator.interop.key_maps import KEY_MAPS, PREFIXES
from verl_speculator.utils.settings import UserError

D, V = 12, 30
FILES = {
    "fasterdecoding": ("medusa_lm_head.pt", "medusa_lm_head.safetensors"),
    "vllm": ("pytorch_model.bin", "model.safetensors"),
}
PROMPT = [5, 9, 23, 4, 77, 31, 8]


def heads(count=3, layers=1, *, width=D, vocab=V, bias=True, dtype=torch.float32):
    """What a head is, under any format's names: for each its blocks [(A, a), …] and its output matrix."""
    draw = torch.Generator().manual_seed(count * 10 + layers)

    def values(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    return [
        ([(values(width, width), values(width) if bias else None) for _ in range(layers)], values(vocab, width))
        for _ in range(count)
    ]


def named(drawn, name, prefix=""):
    """The tensors of `heads` as a format names them, spelt out here a second time."""
    found = {}
    for k, (blocks, out) in enumerate(drawn):
        for j, (weight, bias) in enumerate(blocks):
            stem = {"fasterdecoding": f"{k}.{j}.linear", "vllm": f"blocks.{k}.layers.{j}"}[name]
            found[f"{stem}.weight"] = weight
            if bias is not None:
                found[f"{stem}.bias"] = bias
        found[{"fasterdecoding": f"{k}.{len(blocks)}.weight", "vllm": f"lm_heads.{k}.weight"}[name]] = out
    return {prefix + key: tensor for key, tensor in found.items()}


def configured(drawn, name, **more):
    """The config.json that comes with them."""
    count, layers = len(drawn), len(drawn[0][0])
    if name == "fasterdecoding":
        own = {"medusa_num_heads": count, "medusa_num_layers": layers, "base_model_name_or_path": "some/base"}
    else:
        own = {"num_heads": count, "num_hidden_layers": layers, "hidden_size": D, "vocab_size": V}
    return own | more


def put(folder, tensors, file, config=None):
    """A checkpoint from elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits_of(drawn, hidden):
    """The heads' logits [K, T, V] in float64, from the definition: x + SiLU(A x + a), block by block, then W."""
    found = []
    for blocks, out in drawn:
        x = hidden.double()
        for weight, bias in blocks:
            y = x @ weight.double().T + (0 if bias is None else bias.double())
            x = x + y / (1 + torch.exp(-y))
        found.append(x @ out.double().T)
    return torch.stack(found)


def spoken(directory, hidden):
    """The logits [K, T, V] of a checkpoint of ours in float64."""
    speculator = load_speculator(directory, dtype=torch.float64).requires_grad_(False)
    states = speculator.unroll(hidden.double(), torch.zeros(len(hidden), speculator.n_predict, dtype=torch.long))
    return torch.stack([states[k] @ speculator.head(k).T for k in range(speculator.n_predict)])


def refused(folder, words, **settings):
    """Converting says this and leaves nothing behind."""
    with pytest.raises(UserError) as error:
        convert(ConvertSettings(**({"source": folder, "out": folder.parent / "refused"} | settings)))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (folder.parent / "refused").exists()


@pytest.fixture
def hidden():
    return torch.randn(7, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path):
    """Three heads in FasterDecoding's format."""
    drawn = heads()
    return put(
        tmp_path / "src", named(drawn, "fasterdecoding"), "medusa_lm_head.pt", configured(drawn, "fasterdecoding")
    )


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("kind", [0, 1], ids=["pickled", "safetensors"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", KEY_MAPS)
def test_the_heads_say_what_the_source_says(tmp_path, hidden, name, layers, kind, prefix):
    drawn = heads(layers=layers)
    file = FILES[name][kind]
    folder = put(tmp_path / "src", named(drawn, name, prefix), file, configured(drawn, name))
    said = convert(ConvertSettings(source=folder, out=tmp_path / "out"))
    assert (said.contents.format, said.config) == (
        name,
        SpeculatorConfig(method="medusa", n_predict=3, num_layers=layers),
    )
    torch.testing.assert_close(spoken(tmp_path / "out", hidden), logits_of(drawn, hidden), rtol=0, atol=1e-12)
    alone = convert(ConvertSettings(source=folder / file, out=tmp_path / "alone", format=name))
    assert alone.config == said.config
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize("name", KEY_MAPS)
def test_a_configuration_is_not_needed(tmp_path, hidden, name):
    drawn = heads(2, 3)
    folder = put(tmp_path / "src", named(drawn, name), FILES[name][1])
    convert(ConvertSettings(source=folder, out=tmp_path / "out"))
    torch.testing.assert_close(spoken(tmp_path / "out", hidden), logits_of(drawn, hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KEY_MAPS)
def test_blocks_without_a_bias_get_zeros(tmp_path, hidden, name):
    drawn = heads(layers=2, bias=False)
    folder = put(tmp_path / "src", named(drawn, name), FILES[name][0], configured(drawn, name))
    convert(ConvertSettings(source=folder, out=tmp_path / "out"))
    state = load_speculator(tmp_path / "out").state_dict()
    assert all(not tensor.any() for key, tensor in state.items() if key.endswith("bias"))
    torch.testing.assert_close(spoken(tmp_path / "out", hidden), logits_of(drawn, hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KEY_MAPS)
def test_a_head_that_predicts_the_next_token_is_dropped(tmp_path, hidden, name):
    """Numbered from x_{t+1}: head k predicts x_{t+1+k}, so that our head k is their head k + 1."""
    drawn = heads(4)
    folder = put(tmp_path / "src", named(drawn, name), FILES[name][0], configured(drawn, name))
    said = convert(ConvertSettings(source=folder, out=tmp_path / "out", first_offset=1, n_predict=4))
    assert said.config.n_predict == 3 and "heads=4" in said.summary() and "n_predict=3" in said.summary()
    torch.testing.assert_close(spoken(tmp_path / "out", hidden), logits_of(drawn, hidden)[1:], rtol=0, atol=1e-12)
    single = put(tmp_path / "single", named(heads(1), name), FILES[name][0])
    refused(single, "holds a single head; it predicts the next token, as the base's own does", first_offset=1)


@pytest.mark.parametrize("key", ["lm_heads.0.weight", "lm_head.weight", "all"])
@pytest.mark.parametrize("first_offset", [1, 2])
def test_one_output_matrix_for_all_heads(tmp_path, hidden, key, first_offset):
    drawn = heads()
    drawn = [(blocks, drawn[0][1]) for blocks, _ in drawn]
    tensors = {k: t for k, t in named(drawn, "vllm").items() if key == "all" or not k.startswith("lm_heads.")}
    if key != "all":
        tensors[key] = drawn[0][1]
    folder = put(tmp_path / "src", tensors, "pytorch_model.bin", configured(drawn, "vllm", original_lm_head=True))
    said = convert(ConvertSettings(source=folder, out=tmp_path / "out", first_offset=first_offset))
    assert said.config.head == "shared"
    expected = logits_of(drawn, hidden)[2 - first_offset :]
    torch.testing.assert_close(spoken(tmp_path / "out", hidden), expected, rtol=0, atol=1e-12)


def test_equal_output_matrices_stay_apart_unless_they_are_said_to_be_one(tmp_path):
    drawn = heads()
    same = [(blocks, drawn[0][1]) for blocks, _ in drawn]
    folder = put(tmp_path / "src", named(same, "vllm"), "pytorch_model.bin", configured(same, "vllm"))
    assert convert(ConvertSettings(source=folder, out=tmp_path / "out")).config.head == "copy"
    said = configured(drawn, "vllm", original_lm_head=True)
    folder = put(tmp_path / "unlike", named(drawn, "vllm"), "pytorch_model.bin", said)
    refused(folder, "original_lm_head=true: lm_heads.1.weight differs from lm_heads.0.weight")


@pytest.mark.parametrize(
    "settings",
    [{}, {"head": "shared", "num_layers": 2}, {"head": "frozen_shared", "n_predict": 1}, {"hidden_state": "pre_norm"}],
)
def test_our_own_checkpoint_is_in_vllms_format(tmp_path, settings):
    config = SpeculatorConfig(**({"method": "medusa", "n_predict": 3} | settings))
    speculator = build_speculator(config, hidden_size=D, vocab_size=V, logit_cap=5.0, seed=0)
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.copy_(torch.rand_like(parameter))
    base = {"name": "my/base", "weights_fingerprint": "abc"}
    save_speculator(speculator, tmp_path / "ours", provenance={"base": base})
    said = convert(ConvertSettings(source=tmp_path / "ours", out=tmp_path / "out"))
    assert (said.contents.format, said.config) == ("vllm", config)
    before, after = speculator.state_dict(), load_speculator(tmp_path / "out").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    info = read_checkpoint_info(tmp_path / "out")
    assert info.provenance["base"] == base and info.logit_cap == 5.0


def test_heads_for_a_base(tmp_path, base):
    """A base that is named is checked against, remembered, and held against the one that is loaded later."""
    width, vocab = base_shape(base)
    folder = put(tmp_path / "src", named(heads(width=width, vocab=vocab), "vllm"), "model.safetensors")
    convert(ConvertSettings(source=folder, out=tmp_path / "out", base=str(base)))
    info = read_checkpoint_info(tmp_path / "out")
    assert info.provenance["base"] == {"name": str(base), "weights_fingerprint": weights_fingerprint(str(base))}
    assert info.provenance["converted"] == {
        "source": str(folder),
        "file": "model.safetensors",
        "format": "vllm",
        "heads": 3,
        "first_offset": 2,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_archs"] == ["Qwen2ForCausalLM"]
    load_speculator(tmp_path / "out", base=base)
    wrong = put(tmp_path / "narrow", named(heads(vocab=vocab), "vllm"), "model.safetensors")
    refused(wrong, f"base={base}: hidden_size {width}, {wrong / 'model.safetensors'} holds heads", base=str(base))
    wrong = put(tmp_path / "few", named(heads(width=width), "vllm"), "model.safetensors")
    refused(wrong, f"base={base}: vocab_size {vocab}, ", base=str(base))
    refused(wrong, "base=./nothing: no such directory", base="./nothing")


@pytest.mark.parametrize("name", KEY_MAPS)
@pytest.mark.parametrize("of", ["option", "configuration"])
def test_older_files_without_a_norm_take_the_bases(tmp_path, bases, name, of):
    """They were trained on the state before the final norm, through the base's own norm."""
    folder, model = bases["gemma2"], load_base(bases["gemma2"])
    vocab, width = model.get_output_embeddings().weight.shape
    drawn = heads(width=width, vocab=vocab)
    config = {"hidden_state": "pre_norm"} if of == "configuration" else {}
    source = put(tmp_path / "src", named(drawn, name), FILES[name][1], config)
    asked = {} if config else {"hidden_state": "pre_norm"}
    refused(source, "no norm, and hidden_state=pre_norm: it would be the base's; expected --base", **asked)
    said = convert(ConvertSettings(source=source, out=tmp_path / "out", base=str(folder), **asked))
    assert said.config.hidden_state == "pre_norm"
    with torch.inference_mode(), Target(model, "pre_norm") as target:
        before, _ = target.read(torch.tensor(PROMPT))
    expected = logits_of(drawn, states_of(model, PROMPT))
    torch.testing.assert_close(spoken(tmp_path / "out", before.clone()), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_in_the_file_is_kept(tmp_path, base):
    drawn = heads(width=32, vocab=base_shape(base)[1])
    norm = torch.linspace(0.5, 2, 32)
    for key in ("norm.weight", "final_norm.weight"):
        folder = put(tmp_path / key, named(drawn, "vllm") | {key: norm}, "model.safetensors")
        refused(folder, f"{key}: rms_norm_eps=None; expected a number between 0 and 1")
        refused(folder, f"hidden_state=post_norm: {folder / 'model.safetensors'} holds {key}", hidden_state="post_norm")
        said = convert(ConvertSettings(source=folder, out=tmp_path / f"{key}-base", base=str(base)))
        assert said.config.hidden_state == "pre_norm"
        state = load_speculator(tmp_path / f"{key}-base").state_dict()
        assert torch.equal(state["norm.weight"], norm)
        assert state["norm.eps"].item() == pytest.approx(load_base(base).config.rms_norm_eps)
        (folder / "config.json").write_text('{"rms_norm_eps": 1e-3}')
        convert(ConvertSettings(source=folder, out=tmp_path / f"{key}-config"))
        assert load_speculator(tmp_path / f"{key}-config").state_dict()["norm.eps"].item() == pytest.approx(1e-3)


def test_heads_that_end_in_the_bases_own_matrix(tmp_path, base):
    """FasterDecoding's second version of the heads: residual blocks alone."""
    model = load_base(base, torch.float32)
    drawn = heads(width=32)
    tensors = {key: t for key, t in named(drawn, "fasterdecoding").items() if "linear" in key}
    folder = put(tmp_path / "src", tensors, "medusa_lm_head.pt", configured(drawn, "fasterdecoding"))
    refused(folder, "no output matrix: it would be the base's; expected --base")
    said = convert(ConvertSettings(source=folder, out=tmp_path / "out", base=str(base)))
    assert said.config.head == "frozen_shared"
    states = states_of(model, PROMPT)
    drawn = [(blocks, model.get_output_embeddings().weight.detach()) for blocks, _ in drawn]
    torch.testing.assert_close(spoken(tmp_path / "out", states), logits_of(drawn, states), rtol=0, atol=1e-12)


def test_heads_that_end_in_a_scaled_matrix_of_the_base_keep_its_scale(tmp_path, scaled):
    """Granite divides its logits."""
    model = load_base(scaled["granite"], torch.float32)
    drawn = heads(width=32)
    tensors = {key: t for key, t in named(drawn, "fasterdecoding").items() if "linear" in key}
    folder = put(tmp_path / "src", tensors, "medusa_lm_head.pt", configured(drawn, "fasterdecoding"))
    convert(ConvertSettings(source=folder, out=tmp_path / "out", base=str(scaled["granite"])))
    states = states_of(model, PROMPT)
    drawn = [(blocks, model.get_output_embeddings().weight.detach() / 6) for blocks, _ in drawn]
    torch.testing.assert_close(spoken(tmp_path / "out", states), logits_of(drawn, states), rtol=0, atol=1e-5)


def test_heads_that_would_end_in_a_matrix_of_the_base_with_a_bias_are_refused(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    phi = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=64, pad_token_id=0, eos_token_id=2, **settings))
    phi.save_pretrained(tmp_path / "phi")
    tensors = {key: t for key, t in named(heads(width=32), "fasterdecoding").items() if "linear" in key}
    folder = put(tmp_path / "src", tensors, "medusa_lm_head.pt", configured(heads(width=32), "fasterdecoding"))
    words = f"base={tmp_path / 'phi'}: PhiForCausalLM: its LM head has a bias"
    refused(folder, words, base=str(tmp_path / "phi"))


def test_types(tmp_path):
    folder = put(tmp_path / "src", named(heads(dtype=torch.bfloat16), "vllm"), "model.safetensors")
    assert convert(ConvertSettings(source=folder, out=tmp_path / "kept")).contents.dtype == torch.bfloat16
    assert read_checkpoint_info(tmp_path / "kept").dtype == "bfloat16"
    assert convert(ConvertSettings(source=folder, out=tmp_path / "wide", dtype="fp32")).contents.dtype == torch.float32
    kept, wide = (load_file(folder / "model.safetensors"), load_speculator(tmp_path / "wide").state_dict())
    assert all(torch.equal(kept[key].float(), wide[key]) for key in kept)

    mixed = kept | {"lm_heads.0.weight": kept["lm_heads.0.weight"].float()}
    folder = put(tmp_path / "mixed", mixed, "model.safetensors")
    refused(folder, "blocks.0.layers.0.weight is bfloat16, lm_heads.0.weight is float32; expected one type")
    convert(ConvertSettings(source=folder, out=tmp_path / "one", dtype="bf16"))
    folder = put(tmp_path / "large", {k: t.float() * 1e6 for k, t in kept.items()}, "model.safetensors")
    refused(folder, "blocks.0.layers.0.weight has values that are not finite in float16", dtype="fp16")
    folder = put(tmp_path / "int", {k: t.to(torch.int8) for k, t in kept.items()}, "model.safetensors")
    refused(folder, "blocks.0.layers.0.weight is int8; expected heads that are not quantised", dtype="fp32")


def edited(tensors, **changes):
    """Tensors without those that are None here, and with the others; `_` stands for a dot."""
    changes = {key.replace("_", "."): value for key, value in changes.items()}
    return {k: t for k, t in (tensors | changes).items() if t is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"1_0_linear_weight": None}, "missing 1.0.linear.weight (head 1, layer 0)"),
        ({"1_0_linear_bias": None}, "missing 1.0.linear.bias (head 1, layer 0)"),
        ({"2_1_weight": None}, "missing 2.1.weight (output of head 2)"),
        ({"3_1_weight": torch.zeros(V, D)}, "missing 3.0.linear.weight (head 3, layer 0); missing 3.0.linear.bias"),
        ({"0_1_linear_weight": torch.zeros(D, D)}, "missing 0.1.linear.bias (head 0, layer 1)"),
        ({"some_thing": torch.zeros(D)}, "unexpected some.thing"),
        ({"0_2_weight": torch.zeros(D)}, "missing 0.1.linear.weight (head 0, layer 1)"),
        ({"x_0_0_linear_weight": torch.zeros(D)}, "unexpected x.0.0.linear.weight"),
        (
            {"blocks_0_layers_0_weight": torch.zeros(D)},
            "(fasterdecoding), blocks.0.layers.0.weight (vllm);",
        ),
        ({"0_0_linear_weight": torch.zeros(D, D + 1)}, "0.0.linear.weight is [12, 13], expected [13, 13]"),
        ({"1_0_linear_weight": torch.zeros(8, 8)}, "1.0.linear.weight is [8, 8], expected [12, 12]; 0.0.linear"),
        ({"1_1_weight": torch.zeros(V + 1, D)}, "1.1.weight is [31, 12], expected [30, 12]"),
        ({"2_0_linear_bias": torch.zeros(1)}, "2.0.linear.bias is [1], expected [12]"),
        ({"0_0_linear_weight": torch.zeros(D)}, "0.0.linear.weight is [12], expected a matrix"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_keys_and_shapes_that_are_refused(tmp_path, changes, words):
    tensors = edited(named(heads(), "fasterdecoding"), **changes)
    refused(put(tmp_path / "src", tensors, "medusa_lm_head.safetensors"), words)


def test_two_spellings_of_one_key(tmp_path):
    tensors = named(heads(), "vllm") | {"medusa_heads.lm_heads.0.weight": torch.zeros(V, D)}
    folder = put(tmp_path / "src", tensors, "model.safetensors")
    refused(folder, "holds both lm_heads.0.weight and medusa_heads.lm_heads.0.weight")


def test_keys_of_something_else(tmp_path):
    tensors = {f"model.layers.{i}.weight": torch.zeros(2) for i in range(7)}
    folder = put(tmp_path / "src", tensors, "model.safetensors")
    words = ", ".join(f"model.layers.{i}.weight" for i in range(5)) + " and 2 more; expected "
    refused(folder, words + "{head}.{layer}.linear.{part} (fasterdecoding), blocks.{head}.layers.{layer}.{part} (vllm)")
    folder = put(tmp_path / "named", named(heads(), "vllm"), "model.safetensors")
    refused(folder, "format=fasterdecoding: ", format="fasterdecoding")
    folder = put(tmp_path / "empty", {}, "pytorch_model.bin")
    refused(folder, "it holds nothing; expected")


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (
            "fasterdecoding",
            {"medusa_num_heads": 2},
            "format fasterdecoding with medusa_num_heads=3, {config} says medusa_num_heads=2; if the file",
        ),
        ("fasterdecoding", {"medusa_num_layers": 2}, "with medusa_num_layers=1, {config} says medusa_num_layers=2"),
        ("fasterdecoding", {"medusa_num_heads": "3"}, "{config}: medusa_num_heads=3: expected an integer of at least"),
        (
            "vllm",
            {"num_heads": 5},
            "of format vllm with num_heads=3, {config} says num_heads=5; if the file is right: --n-predict 3",
        ),
        ("vllm", {"num_hidden_layers": 4}, "says num_hidden_layers=4"),
        ("vllm", {"n_predict": 2}, "with n_predict=3, {config} says n_predict=2"),
        ("vllm", {"head": "shard"}, "head=shard: expected one of copy, shared, frozen_shared (did you mean 'shared'?)"),
        ("vllm", {"logit_cap": 0}, "logit_cap=0: expected a number above 0"),
        ("vllm", {"hidden_size": 16}, "with hidden_size=12, {config} says hidden_size=16"),
        ("vllm", {"vocab_size": 31}, "with vocab_size=30, {config} says vocab_size=31"),
        ("vllm", {"truncated_vocab_size": 20}, "with truncated_vocab_size=30, {config} says truncated_vocab_size=20"),
        ("vllm", {"logit_scale": 0.5}, "logit_scale=0.5: expected 1"),
        ("vllm", {"medusa_fc_bias": False}, "with medusa_fc_bias=True, {config} says medusa_fc_bias=False"),
        ("vllm", {"medusa_fc_bias": "yes"}, "medusa_fc_bias=yes: expected true or false"),
        ("vllm", {"hidden_state": "prenorm"}, "hidden_state=prenorm: expected one of post_norm, pre_norm (did you"),
        ("vllm", [], "expected a JSON object, got list"),
    ],
)
def test_configurations_that_say_something_else(tmp_path, name, config, words):
    drawn = heads()
    file, content = FILES[name][0], [] if config == [] else configured(drawn, name, **config)
    folder = put(tmp_path / "src", named(drawn, name), file, content)
    refused(folder, words.format(config=folder / "config.json"))


def test_a_configuration_that_asks_for_biases(tmp_path):
    drawn = heads(bias=False)
    folder = put(
        tmp_path / "src", named(drawn, "vllm"), "model.safetensors", configured(drawn, "vllm", medusa_fc_bias=True)
    )
    refused(folder, "missing blocks.0.layers.0.bias (head 0, layer 0)")


def test_truncated_vocabularies(tmp_path):
    tensors = named(heads(), "vllm") | {"token_map": torch.arange(V)}
    folder = put(tmp_path / "src", tensors, "model.safetensors")
    refused(folder, "token_map: a truncated vocabulary; expected heads over all of it")


def test_a_number_of_heads_that_the_configuration_has_wrong(tmp_path, source):
    (source / "config.json").write_text('{"medusa_num_heads": 2}')
    refused(source, f"medusa_num_heads=3, {source / 'config.json'} says medusa_num_heads=2")
    refused(source, f"n_predict=4: {source / 'medusa_lm_head.pt'} holds 3 heads", n_predict=4)
    assert convert(ConvertSettings(source=source, out=tmp_path / "out", n_predict=3)).config.n_predict == 3


def test_files_that_are_none(tmp_path, source):
    refused(tmp_path / "nothing", "source=", source=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds none of medusa_lm_head.safetensors, medusa_lm_head.pt, model.safetensors")
    refused(source, "expected a directory, or a file that ends in .safetensors", source=source / "config.json")
    file = source / "medusa_lm_head.pt"
    whole = file.read_bytes()
    for torn in (b"", b"PK", whole[: len(whole) // 2]):
        file.write_bytes(torn)
        refused(source, f"{file}: truncated, or not a file of tensors")
    for other in ([torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(other, file)
        refused(source, f"{file}: truncated, or not a file of tensors")
    torch.save({"0.0.linear.weight": object}, file)
    refused(source, f"{file}: truncated, or not a file of tensors")
    file = source / "medusa_lm_head.safetensors"
    for torn in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(torn)
        refused(source, f"{file}: truncated, or not a file of tensors")
    (source / "config.json").write_text("{")
    refused(source, f"{source / 'config.json'}: not JSON")


def test_what_lies_in_the_way(tmp_path, source):
    out = tmp_path / "out"
    convert(ConvertSettings(source=source, out=out))
    before = (out / "pytorch_model.bin").read_bytes()
    refused(source, f"out={out}: holds config.json already; expected another directory, or --overwrite", out=out)
    other = put(tmp_path / "other", named(heads(2), "vllm"), "model.safetensors")
    convert(ConvertSettings(source=other, out=out, overwrite=True))
    assert load_speculator(out).n_predict == 2 and (out / "pytorch_model.bin").read_bytes() != before
    refused(source, "medusa_lm_head.pt is read there; expected another directory", out=source, overwrite=True)
    (out / "config.json").write_text("{}")
    refused(source, "holds a config.json that is no speculator's of ours", out=out, overwrite=True)
    (tmp_path / "run" / "training_state").mkdir(parents=True)
    refused(source, "holds training_state of a training run", out=tmp_path / "run", overwrite=True)
    (tmp_path / "file").write_text("")
    refused(source, "is a file, expected a directory", out=tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"format": "vlm"},
            "format=vlm: expected one of auto, fasterdecoding, vllm, eagle3, speculators (did",
        ),
        ({"first_offset": 3}, "first_offset=3: expected 2 (the first head predicts the token after the next), or 1"),
        ({"hidden_state": "pre-norm"}, "hidden_state=pre-norm: expected one of post_norm, pre_norm (did you mean"),
        ({"dtype": "float32"}, "dtype=float32: expected one of fp32, bf16, fp16, fp64"),
        ({"n_predict": 0}, "n_predict=0: expected a number ≥ 1"),
    ],
)
def test_options_that_are_refused(source, settings, words):
    refused(source, words, **settings)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "verl_speculator", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command(tmp_path, source):
    out = tmp_path / "out"
    result = command("convert", source, "--out", out, "--first-offset", 1, "--dtype", "bf16")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        f"{source / 'medusa_lm_head.pt'}: fasterdecoding, heads=3, num_layers=1, hidden_size=12, vocab_size=30 "
        f"→ {out}: n_predict=2, head=copy, hidden_state=post_norm, bfloat16\n"
    )
    facts = json.loads(command("inspect", "--json", out).stdout)
    assert facts["settings"]["n_predict"] == 2 and facts["base"] == {"name": "some/base"}
    assert facts["converted"]["format"] == "fasterdecoding" and facts["converted"]["first_offset"] == 1
    assert facts["serving"]["vLLM 0.24 to 0.32 without plugins"] == "yes"
    again = command("convert", source, "--out", out)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: out={out}: holds config.json already; expected another directory, or --overwrite\n"
