"""A base model prepared for a CPU computes what it computed before."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.drafters import untrained_speculator
from helpers.tiny_models import ARCHITECTURES, base_config
from verl_speculator.base_model import cpu
from verl_speculator.base_model.cpu import GROUPED, PackedLinear, optimize_for_cpu
from verl_speculator.decoding import speculative_generate

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


@pytest.mark.parametrize("name", [*ARCHITECTURES, "granite", "cohere"])
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


@pytest.mark.parametrize("family", [{"method": "sum_rnn"}, {"method": "early_exit", "exit_layer": 0}])
@pytest.mark.parametrize("name", ["qwen2_tied", "gemma2"])
def test_drafts_do_not_change_its_text(name, family, monkeypatch):
    _, prepared = models(name, monkeypatch)
    speculator = untrained_speculator(prepared, 3, **family)
    speculator.attach(prepared)
    options = {"max_new_tokens": 30, "eos_token_id": ()}
    drafted = speculative_generate(prepared, speculator, PROMPT, **options)
    assert all(r.drafted for r in drafted.counted)
    assert drafted.tokens == speculative_generate(prepared, None, PROMPT, **options).tokens


def test_a_model_that_fits_the_caches_stays_as_it_is():
    model = AutoModelForCausalLM.from_config(base_config("llama", 330)).eval()
    optimize_for_cpu(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@torch.inference_mode()
def test_packed_bf16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not compute bf16 on this processor")
    linear = nn.Linear(96, 200, dtype=torch.bfloat16)
    assert cpu.can_pack(linear)
    for rows in (1, 6, 33):
        inputs = torch.randn(rows, 96, dtype=torch.bfloat16)
        torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_not_packed(dtype, monkeypatch):
    _, prepared = models("llama", monkeypatch, dtype)
    assert not any(isinstance(module, PackedLinear) for module in prepared.modules())
