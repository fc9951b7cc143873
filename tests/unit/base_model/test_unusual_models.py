"""Base models outside the tested architectures: used as they are, or refused in one line."""

from __future__ import annotations

import logging
import os

import pytest
import torch

import verl_speculator.base_model.loading as loading
import verl_speculator.preflight.launch as launch
from helpers.drafters import alone
from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, weights
from helpers.training_runs import overrides
from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.cli.options import LoadingOptions, load_models
from verl_speculator.decoding import speculative_generate
from verl_speculator.models.layers import copy_norm, start_from_base
from verl_speculator.utils.settings import UserError

PROMPT, COUNT = [5, 9, 23, 4, 77, 31, 8], 16
WIDTH = {"vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
SMALL_GPT = {"vocab_size": 330, "n_embd": 32, "n_layer": 2, "n_head": 4}


def configuration(name):
    """A transformers configuration, two layers wide 32."""
    import transformers as tf

    made = {
        "lfm2": lambda: tf.Lfm2Config(**WIDTH, **HEADS, layer_types=["conv", "full_attention"]),
        "minimax": lambda: tf.MiniMaxConfig(
            **WIDTH, **HEADS, **ROUTED, layer_types=["linear_attention", "full_attention"]
        ),
        "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
            **WIDTH | {"num_hidden_layers": 3}, num_attention_heads=4, intermediate_size=64, lru_width=32
        ),
        "qwen3_next": lambda: tf.Qwen3NextConfig(
            **WIDTH, **HEADS, num_experts=4, layer_types=["linear_attention", "full_attention"]
        ),
        "openai_gpt": lambda: tf.OpenAIGPTConfig(**SMALL_GPT, n_positions=256),
        "xlnet": lambda: tf.XLNetConfig(vocab_size=330, d_model=32, n_layer=2, n_head=4, d_inner=64),
        "opt": lambda: tf.OPTConfig(
            **WIDTH, ffn_dim=64, num_attention_heads=4, max_position_embeddings=256, word_embed_proj_dim=32
        ),
        "gpt_oss": lambda: tf.GptOssConfig(
            **WIDTH, **HEADS, **ROUTED, rope_scaling={"rope_type": "default"}, sliding_window=16
        ),
        "bloom": lambda: tf.BloomConfig(vocab_size=330, hidden_size=32, n_layer=2, n_head=4),
        "falcon": lambda: tf.FalconConfig(
            **WIDTH, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2, alibi=False
        ),
        "phi": lambda: tf.PhiConfig(**WIDTH, num_attention_heads=4, intermediate_size=64, max_position_embeddings=256),
        "gptj": lambda: tf.GPTJConfig(**SMALL_GPT, rotary_dim=8, n_positions=256),
        "ernie4_5_moe": lambda: tf.Ernie4_5_MoeConfig(
            **WIDTH, **HEADS, use_bias=True, moe_num_experts=4, moe_k=2, moe_intermediate_size=32
        ),
        "gpt2": lambda: tf.GPT2Config(**SMALL_GPT, n_positions=256),
        "biogpt": lambda: tf.BioGptConfig(
            **WIDTH, num_attention_heads=4, intermediate_size=64, max_position_embeddings=256
        ),
        "gemma3n": lambda: tf.Gemma3nTextConfig(
            **WIDTH,
            **HEADS,
            head_dim=8,
            vocab_size_per_layer_input=330,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0] * 2,
        ),
    }
    config = made[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
    return config


def make(name):
    """A model of random weights, larger than the default so that hidden states differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """The folder of a model, written once."""
    root = tmp_path_factory.mktemp("unusual")

    def save(name):
        if not (root / name).exists():
            make(name).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        return root / name

    return save


def drafts_for(model):
    """None, and an untrained speculator on one hidden state."""
    config = SpeculatorConfig(n_predict=3, inner_dim=16, emb_dim=16, proj_dim=16)
    return None, build_speculator(config, hidden_size=32, vocab_size=330, seed=0).requires_grad_(False)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["lfm2", "minimax", "recurrent_gemma", "qwen3_next"])
def test_decoding_of_recurrent_layers_is_refused(name):
    model = make(name)
    for speculator in drafts_for(model):
        with pytest.raises(UserError, match="cannot be rolled back") as error:
            speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT)
        assert type(model).__name__ in one_line(error)


@pytest.mark.parametrize("name", ["lfm2", "minimax"])
def test_loading_of_recurrent_layers_is_refused_before_weights_load(saved, name, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"base=.*ForCausalLM\): its recurrent state cannot be rolled back") as error:
        load_models(str(saved(name)), None, LoadingOptions())
    one_line(error)


@pytest.mark.parametrize("name", ["openai_gpt", "xlnet"])
def test_decoding_without_a_kv_cache_is_refused(name):
    """Such a base would answer from its newest tokens alone: wrong text, and no error."""
    model = make(name)
    for speculator in drafts_for(model):
        with pytest.raises(UserError, match=r"read 7 tokens and keeps 0 in its KV cache") as error:
            speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT)
        assert type(model).__name__ in one_line(error)


@pytest.mark.parametrize("name", ["opt", "gpt_oss", "bloom", "falcon", "gpt2", "biogpt", "gemma3n"])
def test_greedy_text_is_the_bases_own(name):
    """Whichever module of it ends with the state that the head reads."""
    model = make(name)
    text = alone(model, PROMPT, COUNT, eos_token_id=None)
    for speculator in drafts_for(model):
        found = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
        assert found.tokens == text


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
def test_opt_trains_frozen_and_jointly(saved, rows, joint, loss):
    engine = build_engine(saved("opt"), freeze_base_model=not joint, speculator={"loss": loss})
    before = weights(engine)
    run_batch(engine, make_batch(rows[:8], packed=False))
    assert gradients(engine)
    engine.optimizer_step()
    moved = {name for name, value in weights(engine).items() if not torch.equal(value, before[name])}
    assert any(name.startswith("draft.") for name in moved)
    assert any(name.startswith("base.") for name in moved) == joint


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt_oss", "bloom", "falcon"])
def test_attention_that_a_base_does_not_have_falls_back_to_eager(saved, rows, caplog, name):
    """The engine of the harness asks for sdpa, the default on a CPU."""
    with caplog.at_level(logging.INFO, logger="verl_speculator"):
        engine = build_engine(saved(name))
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    kind = engine.base.config._attn_implementation
    assert kind == ("sdpa" if name == "falcon" else "eager")
    assert len(lines) == (name != "falcon") and all("eager" in line and "sdpa" in line for line in lines)
    run_batch(engine, make_batch(rows[:4], packed=False))
    assert gradients(engine)


@pytest.mark.parametrize("trainable", ["head", "head_and_block"])
def test_early_exit_of_several_streams_is_refused(saved, chat, tmp_path, trainable):
    """Gemma 3n's layers hand on four states at once, which no head reads."""
    model = make("gemma3n")
    shapes = {name: list(p.shape) for name, p in model.base_model.layers[0].named_parameters()}
    config = SpeculatorConfig(method="early_exit", exit_layer=0, n_predict=3, trainable=trainable)
    exit_0 = build_speculator(config, hidden_size=32, vocab_size=330, block_shapes=shapes, seed=0)
    start_from_base(exit_0, model)
    copy_norm(exit_0, model)
    expected = "method=early_exit: Gemma3nTextModel passes 4 states"
    with pytest.raises(UserError, match=expected) as error:
        speculative_generate(model, exit_0, PROMPT, max_new_tokens=COUNT)
    one_line(error)
    settings = {"model__speculator__method": "early_exit", "model__speculator__exit_layer": 0}
    settings["model__speculator__trainable"] = trainable
    with pytest.raises(UserError, match=expected):
        launch.launch(["1", str(tmp_path / "run"), *overrides(saved("gemma3n"), chat, **settings)])


MEDUSA = {"method": "medusa"}
EXIT = {"method": "early_exit", "exit_layer": 1}


@pytest.mark.parametrize(
    ("name", "speculator"),
    [("phi", MEDUSA), ("gptj", MEDUSA | {"head": "frozen_shared"}), ("ernie4_5_moe", EXIT), ("ernie4_5_moe", MEDUSA)],
    ids=str,
)
def test_a_copy_of_a_head_with_a_bias_is_refused_before_weights_load(
    saved, chat, tmp_path, name, speculator, monkeypatch
):
    """A speculator's heads have none: without it a copy gives other logits."""
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the run started"))
    given = {f"model__speculator__{key}": value for key, value in speculator.items()}
    with pytest.raises(UserError) as error:
        launch.launch(["1", str(tmp_path / "run"), *overrides(saved(name), chat, **given)])
    assert "its LM head has a bias" in one_line(error) and "model.speculator.init=base" in one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
def test_a_start_from_a_head_with_a_bias_is_refused_where_the_head_is_copied(saved, rows):
    with pytest.raises(UserError, match=r"init=base: PhiForCausalLM: its LM head has a bias.*expected .*init=random"):
        build_engine(saved("phi"), speculator=MEDUSA)
    for speculator in (MEDUSA | {"init": "random"}, {"init": "base", "inner_dim": 32, "emb_dim": 32, "proj_dim": 32}):
        engine = build_engine(saved("phi"), speculator=speculator)
        run_batch(engine, make_batch(rows[:4], packed=False))
        assert gradients(engine)


def test_an_untrained_head_of_a_base_with_a_bias_would_not_repeat_its_next_token():
    """Why it is refused: the bias decides tokens."""
    model = make("phi")
    head = model.get_output_embeddings()
    head.bias.normal_(std=10)
    with torch.inference_mode():
        tokens = torch.tensor([PROMPT])
        states, logits = model.base_model(tokens).last_hidden_state, model(tokens).logits
    assert ((states @ head.weight.T).argmax(-1) != logits.argmax(-1)).any()
