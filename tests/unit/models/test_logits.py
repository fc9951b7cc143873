"""What base models do to the product of hidden state and LM head, held against each architecture's own code."""

from __future__ import annotations

import pytest
import torch
import transformers

from helpers.engine_harness import build_engine, gradients, make_batch, run_batch
from verl_speculator.models.speculator import TRANSFORMS, LogitTransform, logit_transform
from verl_speculator.training.joint_model import BaseHead
from verl_speculator.utils.settings import UserError

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = [5, 9, 23, 4, 41, 31, 8]
LAYERS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = LAYERS | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
STREAMS = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
STREAMS |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 2}
STREAMS |= {"layer_types": ["sliding_attention", "full_attention"]}
SCALE = {"logit_scale": 0.25}
DIVISOR = {"logits_scaling": 6.0}
CAP = {"final_logit_softcapping": 0.5, "head_dim": 8}
# By model type: the class of its configuration, and settings of a model that is two layers wide 32.
CONFIGS = {
    "cohere": ("CohereConfig", COMMON | SCALE),
    "cohere2": ("Cohere2Config", COMMON | SCALE),
    "cohere2_moe": ("Cohere2MoeConfig", COMMON | SCALE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "falcon_h1": ("FalconH1Config", COMMON | MAMBA | {"mamba_chunk_size": 8, "lm_head_multiplier": 0.25}),
    "gemma2": ("Gemma2Config", COMMON | CAP),
    "gemma3_text": ("Gemma3TextConfig", COMMON | CAP),
    "gemma3n_text": ("Gemma3nTextConfig", COMMON | CAP | STREAMS),
    "gemma4_text": ("Gemma4TextConfig", COMMON | CAP),
    "gemma4_unified_text": ("Gemma4UnifiedTextConfig", COMMON | CAP),
    "granite": ("GraniteConfig", COMMON | DIVISOR),
    "granitemoe": ("GraniteMoeConfig", COMMON | DIVISOR | EXPERTS),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        COMMON | DIVISOR | EXPERTS | {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16},
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", COMMON | DIVISOR | EXPERTS),
    "hyperclovax": ("HyperCLOVAXConfig", COMMON | DIVISOR),
    "nanochat": ("NanoChatConfig", COMMON | {"final_logit_softcapping": 0.5}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        LAYERS | {"num_hidden_layers": 3, "intermediate_size": 64, "lru_width": 32, "logits_soft_cap": 0.5},
    ),
    "vaultgemma": ("VaultGemmaConfig", COMMON | CAP),
    "xlstm": (
        "xLSTMConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "output_logit_soft_cap": 0.5},
    ),
    # Of these the configuration has such a setting that their code does not read, or none at all.
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "logit_scale": 0.25}),
    "qwen2": ("Qwen2Config", COMMON),
}


def make(name, **more):
    """A model of random weights, larger than the default so that hidden states and logits differ."""
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**settings | {"pad_token_id": 0, "eos_token_id": 2} | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)
    return model


@torch.inference_mode()
def states_and_logits(model):
    """[r, D] what the LM head reads, and [r, V] what the model gives."""
    tokens = torch.tensor([PROMPT])
    states = model.base_model(tokens, use_cache=False).last_hidden_state
    return states[0], model(tokens, use_cache=False).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_logit_transform_of_each_architecture_gives_its_own_logits(name):
    model = make(name)
    head, (states, expected) = BaseHead(model), states_and_logits(model)
    torch.testing.assert_close(head(states), expected, rtol=1e-4, atol=1e-5)
    head.check(states, expected)
    if name in TRANSFORMS:  # the row is needed: without it the logits are others
        head.transform = LogitTransform()
        with pytest.raises(UserError, match="does something to its logits"):
            head.check(states, expected)


def test_logit_transform_rows_are_all_tested():
    assert set(TRANSFORMS) <= set(CONFIGS)


def test_logit_transform_of_a_scale_that_the_architecture_does_not_read_is_none():
    """MPT's may be a string."""
    assert logit_transform(make("mpt", logit_scale="inv_sqrt_d_model").config) == LogitTransform()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Folders of models with the tokenizer of the tests."""
    root = tmp_path_factory.mktemp("logits")

    def save(name, **more):
        make(name, vocab_size=len(tokenizer), **more).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        return root / name

    return save


@pytest.mark.usefixtures("gloo")
def test_engine_trains_on_a_base_whose_configuration_has_a_scale_in_words(saved, rows):
    engine = build_engine(saved("mpt", logit_scale="inv_sqrt_d_model"), attention="eager")
    run_batch(engine, make_batch(rows[:4], packed=False))
    assert gradients(engine)


MEDUSA = {"method": "medusa", "inner_dim": None, "head": "copy"}
EXIT = {"method": "early_exit", "exit_layer": 1, "inner_dim": None}


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("speculator", [MEDUSA, EXIT], ids=["medusa", "early_exit"])
def test_engine_with_a_copied_head_and_ce_refuses_a_base_whose_logits_are_not_known(
    scaled, rows, speculator, monkeypatch
):
    settings = speculator | {"loss": "ce"}
    run_batch(build_engine(scaled["granite"], speculator=settings), make_batch(rows[:4]), train=False)
    monkeypatch.delitem(TRANSFORMS, "granite")
    with pytest.raises(
        UserError, match=r"does something to its logits.*expected model.speculator.init=random"
    ) as error:
        run_batch(build_engine(scaled["granite"], speculator=settings), make_batch(rows[:4]), train=False)
    assert "\n" not in str(error.value) and "loss" not in str(error.value)
    # A head of random weights is no copy of anything.
    random = build_engine(scaled["granite"], speculator=settings | {"init": "random"})
    run_batch(random, make_batch(rows[:4]), train=False)
