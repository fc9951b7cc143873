"""verl's engine on bases in 4 bits and from GGUF files: trained on like any other."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, whole
from helpers.tiny_models import GGUF_FILE as FILE
from verl_speculator.utils.settings import UserError

needs_bnb = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.filterwarnings("ignore")]


@needs_gguf
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
@pytest.mark.parametrize("joint", [False, True])
def test_a_base_from_a_gguf_file_trains_like_the_one_it_was_made_of(bases, gguf_bases, rows, name, joint):
    settings = {"freeze_base_model": not joint, "speculator": {"loss": "kl"}}
    expected = build_engine(bases[name], **settings)
    found = build_engine(gguf_bases[name], gguf_file=FILE, **settings)
    assert found.model_config.end_token_ids == expected.model_config.end_token_ids
    for engine in (expected, found):
        run_batch(engine, make_batch(rows))
    wanted = gradients(expected)
    for parameter, gradient in gradients(found).items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-4, atol=1e-7)


@needs_bnb
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "gemma2", "qwen2_moe"])
def test_a_base_in_4_bits_trains_a_speculator(bases, rows, name):
    """Also against its own distribution: the output head stays as it is, and `BaseHead` is held against it."""
    engine = build_engine(bases[name], quantization="bnb4", speculator={"loss": {"ce": 0.1, "kl": 1.0}})
    layer = engine.base.base_model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert engine.base.get_output_embeddings().weight.dtype == torch.float32
    # What verl shards, moves and gathers is the speculator alone.
    assert all(parameter.startswith("draft.") for parameter in engine.module.state_dict())
    before = layer.weight.detach().clone()
    losses = []
    for _ in range(3):
        engine.module.train()
        metrics = run_batch(engine, make_batch(rows))["metrics"]
        losses.append(metrics["draft_sums"])
        engine.optimizer_step()
    assert losses[0] != losses[1]
    assert not engine.base.training
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        assert torch.equal(layer.weight, before)
    moved = {name: whole(p.grad).abs().max() for name, p in engine.module.named_parameters() if p.grad is not None}
    assert moved and all(moved.values())


@needs_bnb
def test_a_start_from_a_base_in_4_bits(bases):
    """Tables and heads are not held in 4 bits."""
    wide = {"inner_dim": 32, "emb_dim": 32, "proj_dim": 32, "init": "base"}
    expected, found = (
        build_engine(bases["qwen2_untied"], quantization=word, speculator=wide).speculator for word in (None, "bnb4")
    )
    for mine, theirs in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs))


@needs_bnb
def test_a_forward_only_engine_in_4_bits_is_refused(base):
    with pytest.raises(UserError, match=r"model\.quantization=bnb4: not for a forward-only engine"):
        build_engine(base, quantization="bnb4", forward_only=True)
