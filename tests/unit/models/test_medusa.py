"""Medusa heads: untrained logits, the hidden state they read, and which parameters are trained."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.drafters import load_base, states_of, train_quickly
from helpers.engine_harness import build_engine, make_batch, run_batch, weights
from helpers.tiny_models import ARCHITECTURES, SCALED
from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.base_model.hidden_states import FrozenNorm, final_norm
from verl_speculator.checkpoint.format import read_checkpoint_info, save_speculator
from verl_speculator.data.alignment import align
from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.target import Target
from verl_speculator.models.layers import copy_norm, start_from_base
from verl_speculator.models.speculator import logit_transform
from verl_speculator.utils.settings import UserError

PROMPT = [5, 9, 23, 4, 77, 31, 8]
VLLM_KEYS = {"architectures", "model_type", "hidden_size", "vocab_size", "num_heads", "num_hidden_layers"}


@pytest.fixture(scope="module")
def uneven_norm_bases(bases, tmp_path_factory):
    """The tiny base models with final norms whose weights differ between channels, as in trained models."""
    root, folders = tmp_path_factory.mktemp("uneven"), {}
    for name in ARCHITECTURES:
        model = load_base(bases[name], torch.float32)
        weight = final_norm(model).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(torch.linspace(-0.9, 4.0, len(weight)))
        for file in bases[name].iterdir():
            (root / name).mkdir(exist_ok=True)
            (root / name / file.name).write_bytes(file.read_bytes())
        model.save_pretrained(root / name)
        with torch.no_grad():
            weight.copy_(before)
        folders[name] = root / name
    return folders


def untrained_heads(model, **settings):
    """Untrained heads for a base."""
    vocab, width = model.get_output_embeddings().weight.shape
    config = SpeculatorConfig(**({"method": "medusa", "n_predict": 3} | settings))
    dtype = next(model.parameters()).dtype
    cap = logit_transform(model.config).cap
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, logit_cap=cap, seed=0, dtype=dtype)
    start_from_base(speculator, model)
    copy_norm(speculator, model)
    return speculator.requires_grad_(False)


@torch.inference_mode()
def overlap(model, speculator, reads, text):
    """Σ min(p, q) of an untrained first head, mean over rows: the probability that what it draws is accepted."""
    with Target(model, reads) as target:
        states, logits = target.read(torch.tensor(text))
    z = speculator.unroll(states, torch.zeros(len(text), speculator.n_predict, dtype=torch.long))[0]
    q = speculator.logits(0, z).softmax(-1)
    return torch.minimum(logits.softmax(-1), q).sum(-1).mean().item()


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *SCALED}))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "shared", "num_layers": 3},
        {"head": "frozen_shared", "inner_dim": 16},
        {"hidden_state": "pre_norm", "num_layers": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_medusa_untrained_head_gives_the_base_models_logits(uneven_norm_bases, scaled, name, settings):
    """Scale and soft cap included."""
    if name == "cohere" and settings.get("hidden_state"):
        pytest.skip("Cohere ends with a layer norm, which no head copies")
    model = load_base(uneven_norm_bases.get(name) or scaled[name])
    speculator = untrained_heads(model, **settings)
    with torch.inference_mode(), Target(model, speculator.hidden_state_source) as target:
        states, logits = target.read(torch.tensor(PROMPT))
        z = speculator.unroll(states, torch.zeros(len(PROMPT), 3, dtype=torch.long))
        for k in range(3):
            actual = speculator.logits(k, z[k])
            torch.testing.assert_close(actual, logits, rtol=1e-6, atol=1e-6)
    assert speculator.is_untrained()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_target_pre_norm_state_and_frozen_norm_give_the_final_state(uneven_norm_bases, name):
    model = load_base(uneven_norm_bases[name])
    with torch.inference_mode(), Target(model, "pre_norm") as target:
        states, _ = target.read(torch.tensor(PROMPT))
        torch.testing.assert_close(final_norm(model)(states), states_of(model, PROMPT), rtol=0, atol=1e-12)
    copy = FrozenNorm(32).double().requires_grad_(False)
    copy.copy_from(final_norm(model))
    torch.testing.assert_close(copy(states), states_of(model, PROMPT), rtol=1e-6, atol=1e-6)


def test_medusa_pre_norm_state_without_norm_lowers_the_overlap(uneven_norm_bases):
    """A mistake that raises nothing: untrained heads should repeat the base model and do not."""
    model = load_base(uneven_norm_bases["qwen2_tied"])
    assert overlap(model, untrained_heads(model, hidden_state="pre_norm"), "pre_norm", PROMPT * 8) == pytest.approx(1)
    assert overlap(model, untrained_heads(model), "pre_norm", PROMPT * 8) < 0.6


def test_medusa_pre_norm_state_without_norm_on_a_real_base(shared):
    model, text = load_base(shared / "models" / "gsm8k-4m", torch.float32), list(range(200, 456))
    assert overlap(model, untrained_heads(model), "post_norm", text) == pytest.approx(1, abs=1e-4)
    assert overlap(model, untrained_heads(model), "pre_norm", text) < 0.8


def test_target_pre_norm_base_without_rms_norm_raises():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(UserError, match=r"final norm: GPT2LMHeadModel ends with LayerNorm; expected an RMS norm"):
        Target(model, "pre_norm")
    del model.transformer.ln_f
    with pytest.raises(UserError, match=r"has no final norm that is known here \(looked for norm, "):
        Target(model, "pre_norm")


@pytest.mark.parametrize("name", ["qwen2_tied", "gemma2"])
@pytest.mark.parametrize("hidden_state", ["post_norm", "pre_norm"])
def test_medusa_greedy_text_is_the_base_models(uneven_norm_bases, name, hidden_state):
    model = load_base(uneven_norm_bases[name])
    text = speculative_generate(model, None, PROMPT, max_new_tokens=30, eos_token_id=()).tokens
    if hidden_state == "post_norm":
        speculator = train_quickly(model, [PROMPT + text], method="medusa", inner_dim=None)
    else:
        speculator = untrained_heads(model, hidden_state="pre_norm")
    result = speculative_generate(model, speculator, PROMPT, max_new_tokens=30, eos_token_id=())
    assert result.tokens == text
    assert hidden_state == "pre_norm" or result.accepted > 1


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("name", ["qwen2_untied", "gemma2"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_medusa_pre_norm_and_post_norm_train_alike(uneven_norm_bases, rows, name, joint):
    """The base model's norm in front of the heads makes both states, losses and steps equal."""
    curves = {}
    for hidden_state in ("post_norm", "pre_norm"):
        settings = {"method": "medusa", "inner_dim": None, "hidden_state": hidden_state, "loss": {"ce": 1.0, "kl": 1.0}}
        engine = build_engine(uneven_norm_bases[name], speculator=settings, freeze_base_model=not joint, lr=1e-2)
        start = weights(engine)
        curve = []
        for _ in range(3 if not joint else 1):
            curve.append(sum(run_batch(engine, make_batch(rows, micro=4))["loss"]))
            engine.optimizer_step()
        curves[hidden_state] = curve
        moved = {key for key, value in weights(engine).items() if not torch.equal(value, start[key])}
        assert not any("norm" in key for key in moved if key.startswith("draft."))
        assert any("lm_heads" in key for key in moved) and any("blocks" in key for key in moved)
    assert curves["pre_norm"] == pytest.approx(curves["post_norm"], rel=1e-4)


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("head", "count"), [("copy", 3), ("shared", 1), ("frozen_shared", 1)])
def test_medusa_head_setting_decides_count_and_training(uneven_norm_bases, rows, head, count):
    engine = build_engine(uneven_norm_bases["qwen2_untied"], speculator={"method": "medusa", "head": head}, lr=1e-2)
    before = weights(engine)
    heads = [key for key in before if ".lm_heads." in key]
    assert len(heads) == count
    assert all(torch.equal(before[key], before["base.lm_head.weight"]) for key in heads)
    run_batch(engine, make_batch(rows))
    engine.optimizer_step()
    after = weights(engine)
    assert all(torch.equal(before[key], after[key]) == (head == "frozen_shared") for key in heads)
    named = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    resting = {name for name, p in engine.module.named_parameters() if "lm_heads" in name and id(p) not in named}
    assert len(resting) == (1 if head == "frozen_shared" else 0)


def test_medusa_checkpoint_has_vllms_keys(tmp_path):
    """Read from vLLM 0.24's sources: its configuration maps any other key with `num` and `heads` in it onto its own."""
    for head in ("copy", "frozen_shared"):
        config = SpeculatorConfig(method="medusa", n_predict=4, num_layers=2, head=head)
        speculator = build_speculator(config, hidden_size=12, vocab_size=30, seed=0, dtype=torch.bfloat16)
        save_speculator(speculator, tmp_path / head, base_architectures=["Qwen2ForCausalLM"])
        content = json.loads((tmp_path / head / "config.json").read_text())
        assert content.keys() >= VLLM_KEYS
        assert [key for key in content if "num" in key and "heads" in key] == ["num_heads"]
        assert {content[key] for key in content if "num" in key and "layers" in key} == {2}
        assert (content["num_heads"], content["hidden_size"], content["vocab_size"]) == (4, 12, 30)
        assert content["medusa_fc_bias"] is True and content.get("original_lm_head", False) == (head != "copy")
        tensors = torch.load(tmp_path / head / "pytorch_model.bin", weights_only=True)
        heads = range(4 if head == "copy" else 1)
        assert set(tensors) == {f"lm_heads.{k}.weight" for k in heads} | {
            f"blocks.{k}.layers.{j}.{part}" for k in range(4) for j in range(2) for part in ("weight", "bias")
        }
        assert read_checkpoint_info(tmp_path / head).config == config


def test_medusa_unroll_equals_the_papers_equation():
    """W_k (x + SiLU(A x + a)), block by block, against a second reading of it."""
    config = SpeculatorConfig(method="medusa", n_predict=2, num_layers=2)
    speculator = build_speculator(config, hidden_size=6, vocab_size=9, seed=0, dtype=torch.float64)
    state = {name: torch.randn_like(p) for name, p in speculator.named_parameters()}
    speculator.load_state_dict(state)
    hidden = torch.randn(5, 6, dtype=torch.float64)
    z = speculator.unroll(hidden, torch.zeros(5, 2, dtype=torch.long))
    for k in range(2):
        x = hidden
        for j in range(2):
            y = x @ state[f"blocks.{k}.layers.{j}.weight"].T + state[f"blocks.{k}.layers.{j}.bias"]
            x = x + y / (1 + torch.exp(-y))
        torch.testing.assert_close(z[k] @ speculator.head(k).T, x @ state[f"lm_heads.{k}.weight"].T)


def test_align_medusa_head_k_targets_the_token_k_plus_2_ahead():
    rows = align(torch.arange(10), torch.ones(10), torch.tensor([0, 10]), 3, ())
    assert rows.targets[:, 0].tolist() == [2, 3, 4] and rows.positions[0] == 0
