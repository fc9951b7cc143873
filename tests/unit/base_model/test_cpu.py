"""A base model prepared for a CPU computes what it computed before."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from helpers.drafters import untrained_speculator
from helpers.family_variants import build_attached, configurations
from helpers.tiny_models import ARCHITECTURES, base_config
from verl_speculator.base_model import cpu
from verl_speculator.base_model.cpu import (
    FEW_QUERIES,
    GROUPED,
    PackedLinear,
    grouped_attention,
    optimize_for_cpu,
    optimize_speculator_for_cpu,
)
from verl_speculator.decoding import speculative_generate
from verl_speculator.models.layers import tables_of

EXIT = {"method": "early_exit", "exit_layer": 0}
PROMPT = [5, 17, 3, 99, 42]


def models(name: str, monkeypatch, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same model as it is loaded, and prepared."""
    monkeypatch.setattr(cpu, "LEAST_PACKED_BYTES", 0)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(base_config(name, 330)).to(dtype).eval()
    prepared = AutoModelForCausalLM.from_config(plain.config).to(dtype).eval()
    prepared.load_state_dict(plain.state_dict())
    optimize_for_cpu(prepared)
    return plain, prepared


@pytest.mark.parametrize("name", [*ARCHITECTURES, "granite", "cohere", "ernie4_5_moe", "dots1"])
@torch.inference_mode()
def test_logits_are_those_of_the_model_as_loaded(name, monkeypatch):
    plain, prepared = models(name, monkeypatch)
    assert not any(type(module) is nn.Linear for module in prepared.modules())
    assert prepared.config._attn_implementation == GROUPED
    tokens = torch.randint(0, 330, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0  # padding in front
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        expected, got = plain(**inputs).logits[:, 7:], prepared(**inputs).logits[:, 7:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_keeps_its_weight(monkeypatch):
    plain, prepared = models("qwen2_tied", monkeypatch)
    assert prepared.get_output_embeddings().weight is prepared.get_input_embeddings().weight
    assert torch.equal(prepared.get_output_embeddings().weight, plain.get_output_embeddings().weight)


@pytest.mark.parametrize("family", [{"method": "sum_rnn"}, EXIT, EXIT | {"trainable": "head_and_block"}])
@pytest.mark.parametrize("name", ["qwen2_tied", "gemma2"])
def test_drafts_are_the_same_and_do_not_change_its_text(name, family, monkeypatch):
    options, generations = {"max_new_tokens": 30, "eos_token_id": ()}, []
    plain, prepared = models(name, monkeypatch)
    for base in (plain, prepared):
        speculator = untrained_speculator(plain, 3, **family).float()
        speculator.attach(base)
        generations.append(speculative_generate(base, speculator, PROMPT, **options))
    assert all(r.drafted for r in generations[1].counted)
    assert generations[1].rounds == generations[0].rounds
    assert generations[1].tokens == speculative_generate(prepared, None, PROMPT, **options).tokens


def test_layers_whose_weight_is_read_elsewhere_stay_plain(monkeypatch):
    """DeepSeek's router multiplies with its gate's weight itself."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    monkeypatch.setattr(cpu, "LEAST_PACKED_BYTES", 0)
    torch.manual_seed(0)
    shape = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = DeepseekV2Config(
        **shape, **attention, **heads, **experts, first_k_dense_replace=1, n_group=1, topk_group=1
    )
    model = DeepseekV2ForCausalLM(config).eval()
    tokens = torch.randint(0, 330, (1, 12))
    with torch.inference_mode():
        expected = model(tokens).logits
        optimize_for_cpu(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {"model.layers.1.mlp.gate"}


def test_a_small_model_stays_as_it_is():
    model = AutoModelForCausalLM.from_config(base_config("llama", 330)).eval()
    optimize_for_cpu(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@torch.inference_mode()
def test_packed_bf16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not compute bf16 on this processor")
    linear = nn.Linear(96, 200, dtype=torch.bfloat16)
    assert cpu._can_pack(linear)
    for rows in (1, 6, 33):
        inputs = torch.randn(rows, 96, dtype=torch.bfloat16)
        torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_not_packed(dtype, monkeypatch):
    _, prepared = models("llama", monkeypatch, dtype)
    assert not any(isinstance(module, PackedLinear) for module in prepared.modules())


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("queries", [1, 5, FEW_QUERIES + 1])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("masked", ["all", "each head", "added", None])
def test_attention_in_bf16_is_torchs(texts, queries, groups, masked):
    """On the same rounded numbers; a mask for all heads or for each, as booleans or numbers to add."""
    generator = torch.Generator().manual_seed(texts + 10 * queries)
    query = torch.randn(texts, 6, queries, 8, generator=generator)
    key, value = torch.randn(2, texts, groups, 12, 8, generator=generator)
    mask = torch.rand(texts, 6 if masked == "each head" else 1, queries, 12, generator=generator) < 0.7
    mask[..., 0] = True
    if masked == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif masked is None:
        mask = None
    narrow = [x.bfloat16() for x in (query, key, value)]
    narrow_mask = mask.bfloat16() if masked == "added" else mask
    module = SimpleNamespace(is_causal=False)
    found, _ = grouped_attention(module, *narrow, narrow_mask, scaling=0.3)
    wide = [x.float() for x in narrow]
    expected = F.scaled_dot_product_attention(*wide, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("config", configurations().values(), ids=configurations())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_speculator_drafts_what_it_drafted(config, dtype):
    """Every family: the same logits up to rounding, also after its base model's tables have changed."""
    plain, packed = (build_attached(config, 20, 60, seed=2, dtype=dtype) for _ in range(2))
    optimize_speculator_for_cpu(packed)
    states = torch.randn(3, packed.head(0).shape[1]).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for depth in range(packed.depths):
        expected = plain.draft_logits(depth, states)
        torch.testing.assert_close(packed.draft_logits(depth, states), expected, **tolerance)
    for speculator in (plain, packed):
        for table in tables_of(speculator).values():
            table.weight = nn.Parameter(table.weight.clone().flip(0), requires_grad=False)
    torch.testing.assert_close(packed.draft_logits(0, states), plain.draft_logits(0, states), **tolerance)
    if config.method != "early_exit" and not config.reads_sequence:
        hidden, tokens = torch.randn(3, 20).to(dtype), torch.randint(50, (3,))
        outputs = [speculator.step(speculator.start(hidden), tokens).output for speculator in (plain, packed)]
        torch.testing.assert_close(*outputs, **tolerance)
    assert packed.head_product is not None and not any(type(m) is nn.Linear for m in packed.modules())
