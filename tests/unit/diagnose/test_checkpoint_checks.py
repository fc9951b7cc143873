"""`diagnose speculator`: every planted fault of a checkpoint is found, and a good checkpoint has none."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from helpers.drafters import load_base
from helpers.tiny_models import make_chat_rows, write_parquet
from helpers.vllm_runner import Request, engine_config, install
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.__main__ import app
from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.hidden_states import final_norm
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.data.alignment import align, misaligned
from verl_speculator.decoding.drafters import SpeculatorDrafter
from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.decoding.target import Target
from verl_speculator.diagnose import read_trace, trace
from verl_speculator.diagnose.checkpoint_checks import AlignedTexts, greedy_answers
from verl_speculator.diagnose.experiments import BaseWithSpeculator
from verl_speculator.evaluation.prompts import prompt_ids, read_prompts, read_texts
from verl_speculator.models.layers import block_shapes, copy_norm, start_from_base
from verl_speculator.utils.settings import UserError

COUNT, LENGTH = 6, 24


@pytest.fixture(scope="module")
def base(bases, tmp_path_factory):
    """A base model whose final norm has different weights for its channels, as in trained models."""
    folder = tmp_path_factory.mktemp("diagnose") / "base"
    folder.mkdir()
    for file in bases["qwen2_untied"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = load_base(bases["qwen2_untied"], torch.float32)
    weight = final_norm(model).weight
    with torch.no_grad():
        before = weight.clone()
        weight.add_(torch.linspace(-4.0, 4.0, len(weight)))
        model.save_pretrained(folder)
        weight.copy_(before)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompts that were trained on, and others."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = {name: make_chat_rows(COUNT, seed=seed) for name, seed in (("seen", 1), ("unseen", 2))}
    return {name: write_parquet(folder / f"{name}.parquet", row) for name, row in rows.items()}


@pytest.fixture(scope="module")
def answers(base, files, tokenizer):
    """The base's answers to the prompts that were trained on."""
    model = load_base(base, torch.float32)
    ends = end_token_ids(tokenizer, model.generation_config)
    prompts = [prompt_ids(prompt, tokenizer) for prompt in read_prompts(files["seen"])]
    return AlignedTexts(model, greedy_answers(model, prompts, LENGTH, ends), ends)


def train(answers, *, hidden_state_source=None, token_shift=0, target_shift=0, steps=80, **settings):
    """A speculator that has memorised the answers, trained with a fault or without."""
    config = SpeculatorConfig(**({"n_predict": 3, "inner_dim": 64, "emb_dim": 64, "proj_dim": 64} | settings))
    vocab, width = answers.base.get_output_embeddings().weight.shape
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0)
    copy_norm(speculator, answers.base)
    batches = []
    for (tokens, mask), states in zip(
        answers.texts, answers.states(hidden_state_source or speculator.hidden_state_source), strict=True
    ):
        ids = torch.tensor(tokens)
        rows = align(ids, torch.tensor(mask), torch.tensor([0, len(ids)]), config.n_predict, answers.ends)
        rows = misaligned(rows, ids, token_shift=token_shift, target_shift=target_shift)
        batches.append((states[0][rows.positions].clone(), rows.tokens, rows.targets, rows.valid))
    hidden, tokens = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    targets, valid = (torch.cat([batch[i] for batch in batches], 1) for i in (2, 3))
    optimizer = torch.optim.Adam([p for p in speculator.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        states = speculator.unroll(hidden, tokens)
        logits = torch.stack([states[k] @ speculator.head(k).T for k in range(config.n_predict)])
        optimizer.zero_grad()
        F.cross_entropy(logits[valid], targets[valid]).backward()
        optimizer.step()
    return speculator.requires_grad_(False)


def saved(speculator, base, folder, **training):
    provenance = {"base": {"name": "my/base", "weights_fingerprint": weights_fingerprint(str(base))}}
    return save_speculator(speculator, folder, provenance=provenance | {"training": training})


@pytest.fixture(scope="module")
def good(answers):
    return train(answers)


def assert_diagnosis(checkpoint, base, prompts, *options, code=1):
    """Run the command and assert its exit code. Returns its first line, the status by check, and the recommendation."""
    arguments = [
        "diagnose",
        "speculator",
        checkpoint,
        "--base",
        base,
        "--prompts",
        prompts,
        "--max-new-tokens",
        LENGTH,
        *options,
    ]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    status = {m[2].strip(): m[1] for line in lines if (m := re.match(r"(fault|fine|unknown) +(\S+(?: \S+)*)  ", line))}
    assert lines[-1].startswith("Recommendation: ")
    return lines[0], status, lines[-1]


def test_checks_good_checkpoint_find_no_fault(good, base, files, tmp_path):
    first, status, advice = assert_diagnosis(saved(good, base, tmp_path), base, files["seen"], code=0)
    assert "no check finds a fault" in first and "fault" not in status.values(), (first, status)
    assert [*status] == [
        *("trained at all", "trained for this base", "hidden state", "alignment", "number type", "scale_input"),
        *("learning rate", "data", "depths", "n_predict and heads"),
    ]
    assert "Nothing is wrong with the checkpoint" in advice


def test_measure_trained_speculator_equals_drafting_from_every_position(good, answers):
    drafter, accepted = SpeculatorDrafter(good, SamplingPolicy(), sampled=False), []
    for tokens, mask in answers.texts:
        with Target(answers.base) as target, torch.no_grad():
            states, _ = target.read(torch.tensor(tokens))
        for t in range(mask.index(1) - 1, len(tokens) - 4):
            drafts = drafter.propose(states[t : t + 1], torch.tensor(tokens[t + 1 : t + 2]), None, 3, 1).tokens.tolist()
            rejected = [k for k in range(3) if drafts[k] != tokens[t + 2 + k]]
            accepted.append(min(rejected, default=3))
    acceptance = answers.measure(good)
    assert acceptance.positions == len(accepted) and acceptance.rate > 0.6
    assert acceptance.rate == pytest.approx(sum(accepted) / len(accepted) / 3)
    assert acceptance.depths[0] == pytest.approx(sum(count > 0 for count in accepted) / len(accepted))


@pytest.mark.parametrize("trainable", ["head", "head_and_block"])
def test_measure_early_exit_after_last_layer_accepts_everything(answers, base, files, tmp_path, trainable):
    """After the last block and untrained it is the base itself; after the first it is not, at every depth."""
    model, rates = answers.base, []
    for layer in (0, 1):
        config = SpeculatorConfig(method="early_exit", n_predict=3, exit_layer=layer, trainable=trainable)
        vocab, width = model.get_output_embeddings().weight.shape
        shapes = block_shapes(model, config)
        speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, block_shapes=shapes, seed=0)
        start_from_base(speculator, model)
        copy_norm(speculator, model)
        speculator.copy_block(model)
        rates.append(answers.measure(speculator.requires_grad_(False)).rate)
    assert rates[0] < 0.9 and rates[1] == 1.0
    exact = ("--dtype", "fp32")
    first, status, _ = assert_diagnosis(saved(speculator, base, tmp_path), base, files["seen"], *exact, code=0)
    assert first.startswith("100.0% of drafts accepted") and "fault" not in status.values()


def test_trained_at_all_initialisation_is_a_fault(good, base, files, tmp_path):
    config = good.config
    fresh = build_speculator(config, hidden_size=good.hidden_size, vocab_size=good.vocab_size, seed=1)
    first, status, advice = assert_diagnosis(saved(fresh, base, tmp_path), base, files["seen"])
    assert "trained at all: all" in first and "still are: ln.0.0.weight = 1" in first
    assert status["trained at all"] == "fault" and "load the trained checkpoint" in advice


def test_trained_for_this_base_other_weights_are_a_fault(good, base, bases, files, tmp_path):
    first, status, advice = assert_diagnosis(saved(good, base, tmp_path), bases["llama"], files["seen"])
    assert "trained for this base: trained for my/base (fingerprint " in first and "serve it with my/base" in advice
    assert status["trained for this base"] == "fault"


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm", "medusa"])
def test_hidden_state_trained_before_the_norm_is_a_fault(answers, base, files, tmp_path, method):
    settings = {"inner_dim": None} if method == "medusa" else {}
    speculator = train(answers, hidden_state_source="pre_norm", method=method, **settings)
    first, status, advice = assert_diagnosis(saved(speculator, base, tmp_path), base, files["seen"])
    assert "; hidden state: " in first and "accepted when fed post_norm" in first
    assert "trained on pre_norm states and is fed post_norm" in advice and status["hidden state"] == "fault"


def test_hidden_state_medusa_on_pre_norm_is_fine_and_other_norm_is_a_fault(answers, base, files, tmp_path):
    settings = {"method": "medusa", "inner_dim": None, "hidden_state": "pre_norm"}
    good = train(answers, **settings)
    _, status, _ = assert_diagnosis(saved(good, base, tmp_path / "good"), base, files["seen"], code=0)
    assert status["hidden state"] == "fine"
    wrong = train(answers, hidden_state_source="post_norm", **settings)
    advice = assert_diagnosis(saved(wrong, base, tmp_path / "wrong"), base, files["seen"])[2]
    assert "trained on post_norm states and is fed pre_norm" in advice
    good.norm.weight.fill_(1.0)
    first, _, advice = assert_diagnosis(saved(good, base, tmp_path / "norm"), base, files["seen"])
    assert "hidden state" in first and "its copy of the base's final norm is another" in advice


@pytest.mark.parametrize(("token_shift", "target_shift"), [(0, 1), (0, -1), (1, 1)])
def test_alignment_shift_by_one_is_a_fault(answers, base, files, tmp_path, token_shift, target_shift):
    speculator = train(answers, token_shift=token_shift, target_shift=target_shift)
    first, status, advice = assert_diagnosis(saved(speculator, base, tmp_path), base, files["seen"])
    assert "; alignment: " in first and status["alignment"] == "fault"
    assert f"targets by {target_shift:+d} off" in advice


def test_scale_input_opposite_value_is_a_fault(answers, base, files, tmp_path):
    folder = saved(train(answers, scale_input=True), base, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"scale_input": False}))
    first, _, advice = assert_diagnosis(folder, base, files["seen"])
    assert "; scale_input: " in first and "set scale_input=true in its config.json" in advice


def test_learning_rate_of_zero_before_the_last_step_is_a_fault(good, base, files, tmp_path):
    for step in (10, 20):
        folder = saved(good, base, tmp_path / f"global_step_{step}", step=step, total_steps=100, lr=1e-3)
        (folder / "training_state").mkdir()
        torch.save({"_last_lr": [0.0 if step == 20 else 1e-4]}, folder / "training_state" / "lr_scheduler.pt")
    first, _, advice = assert_diagnosis(tmp_path / "global_step_20", base, files["seen"])
    assert "learning rate: global_step_10 and global_step_20 hold the same weights" in first
    assert "raise optim.lr" in advice
    for file in (tmp_path / "global_step_10").iterdir():
        if file.is_file():
            file.unlink()
    first, _, _ = assert_diagnosis(tmp_path / "global_step_20", base, files["seen"])
    assert "learning rate: the learning rate was 0.0e+00 at step 20 of 100" in first


def test_data_unseen_prompts_are_a_fault(good, base, files, tmp_path):
    folder = saved(good, base, tmp_path)
    first, status, advice = assert_diagnosis(folder, base, files["unseen"], "--train-data", files["seen"])
    assert "; data: " in first and "train on data like the prompts that are served" in advice
    assert status["data"] == "fault"


def test_data_text_that_the_base_would_not_write_is_a_fault(answers, base, files, tokenizer, tmp_path):
    training_text = AlignedTexts(answers.base, read_texts(files["seen"], tokenizer), answers.ends)
    folder = saved(train(training_text, steps=120), base, tmp_path)
    first, status, advice = assert_diagnosis(folder, base, files["seen"], "--train-data", files["seen"])
    assert "; data: " in first and "on the training text itself" in first and status["data"] == "fault"
    assert "train on the base's own answers (verl-speculator regenerate)" in advice


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_number_type_too_coarse_is_a_fault(good, base, files, tmp_path, dtype):
    """A constant added to all rows of a head changes no choice, and uses up the digits of a narrow type."""
    speculator = copy.deepcopy(good)
    for k in range(speculator.n_predict):
        speculator.head(k).add_(400.0)
    first, status, advice = assert_diagnosis(saved(speculator, base, tmp_path), base, files["seen"], "--dtype", dtype)
    assert "; number type: " in first and "in float32" in first and status["number type"] == "fault"
    assert "run it in float32: bfloat16 is too coarse for it" in advice


def test_depths_wrong_head_breaks_the_chain_at_its_depth(answers, base, files, tmp_path):
    speculator = train(answers, tie_weights=False)
    speculator.heads[1].weight.copy_(speculator.heads[1].weight.flip(0))
    first, _, advice = assert_diagnosis(saved(speculator, base, tmp_path), base, files["seen"])
    assert "; depths: " in first and "the chain breaks at depth 1" in first and "draft 1 tokens" in advice


def test_heads_other_n_predict_does_not_load(good, base, files, tmp_path):
    folder = saved(good, base, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"n_predict": 4}))
    first, _, advice = assert_diagnosis(folder, base, files["seen"])
    assert first.startswith("It does not load; n_predict and heads: ") and "missing head.3.weight" in first
    assert "not those that n_predict calls for" in advice


def test_heads_fewer_than_drafts_or_other_keys_are_a_fault(good, base, files, tmp_path):
    folder = saved(good, base, tmp_path / "spec")
    _, status, _ = assert_diagnosis(folder, base, files["seen"], "--num-draft", 3, code=0)
    assert status["n_predict and heads"] == "fine"
    first, _, advice = assert_diagnosis(folder, base, files["seen"], "--num-draft", 5)
    assert "those of 3 depths; 5 tokens are drafted a round" in first
    assert "have the engine draft 3 tokens (num_speculative_tokens), or train with n_predict=5" in advice
    # A trace that says what was drafted says it too.
    with trace(
        BaseWithSpeculator(load_base(base, torch.float32), good), tmp_path / "served", notes={"drafts": [1, 2, 3, 4]}
    ) as recorder:
        recorder.model(torch.tensor([5, 9, 23]), 3)
    first, _, _ = assert_diagnosis(folder, base, files["seen"], "--rollout-trace", tmp_path / "served")
    assert "4 tokens are drafted a round" in first
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"top_k_tokens_per_head": [1] * 5}))
    first, _, advice = assert_diagnosis(folder, base, files["seen"])
    assert "its top_k_tokens_per_head says 5, and serving engines read that" in first
    assert "set top_k_tokens_per_head in its config.json for 3" in advice


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm", "medusa"])
def test_serving_other_weights_or_hidden_state_are_a_fault(answers, base, files, tmp_path, method):
    settings = {"inner_dim": None} if method == "medusa" else {}
    speculator = train(answers, method=method, **settings)
    folder, model = saved(speculator, base, tmp_path / "spec"), load_base(base, torch.float32)
    fresh = build_speculator(speculator.config, hidden_size=32, vocab_size=speculator.vocab_size, seed=5)
    tokens = torch.tensor(answers.texts[0][0])
    wrong = BaseWithSpeculator(model, speculator)
    for name, pair in (
        ("good", BaseWithSpeculator(model, speculator)),
        ("unloaded", BaseWithSpeculator(model, fresh)),
        ("pre", wrong),
    ):
        if name == "pre":
            kind = type(speculator)
            speculator.__class__ = type(
                kind.__name__, (kind,), {"hidden_state_source": "pre_norm", "forward": kind.forward}
            )
        with trace(pair, tmp_path / name), torch.no_grad():
            pair(tokens, 2)
    found = {
        n: assert_diagnosis(folder, base, files["seen"], "--rollout-trace", tmp_path / n, code=c)
        for n, c in (("good", 0), ("unloaded", 1), ("pre", 1))
    }
    assert found["good"][1]["serving"] == "fine"
    assert "; serving: none of the checkpoint's" in found["unloaded"][0]
    assert "have the engine load this checkpoint" in found["unloaded"][2]
    assert "it was given the pre_norm state" in found["pre"][0]
    assert "have the engine hand over the post_norm state" in found["pre"][2]


def test_serving_trace_of_a_rollout_worker_detects_stale_weights(good, answers, base, files, tmp_path, monkeypatch):
    """Of the target and of our drafter in an engine's runner, limited to what answers the question."""
    model = load_base(base, torch.float32)
    folder, prompt = saved(good, base, tmp_path / "spec"), answers.texts[0][0][:9]
    other = saved(train(answers, steps=5), base, tmp_path / "other")
    for name, path, code in (("good", folder, 0), ("stale", other, 1)):
        runner = install(monkeypatch)(engine_config(path, model, 3), model)
        both = nn.ModuleDict({"target": model, "draft": runner.drafter.speculator})
        with trace(both, tmp_path / name, modules=["target.model", "draft.*"]):
            request = Request(list(prompt), 8)
            for _ in range(2):
                runner.step([request])
        assert read_trace(tmp_path / name).tokens == tuple(prompt) and not read_trace(tmp_path / name).top
        first, status, _ = assert_diagnosis(folder, base, files["seen"], "--rollout-trace", tmp_path / name, code=code)
        assert status["serving"] == ("fault" if code else "fine"), first
    assert "; serving: none of the checkpoint's" in first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-draft", "0"), "num_draft=0: expected a number ≥ 1"),
        (("--num-prompts", "0"), "num_prompts=0: expected a number ≥ 1"),
        (("--rollout-trace", "/no/such"), "/no/such: no such file; expected a trace"),
        (("--train-data", "/no/such.parquet"), "/no/such.parquet: no such file"),
        (("--prompts", "/no/such.parquet"), "/no/such.parquet: no such file"),
        (("--base", "/no/such"), "base=/no/such: no such directory"),
    ],
)
def test_diagnose_bad_option_is_refused(good, base, files, tmp_path, options, message):
    arguments = [
        "diagnose",
        "speculator",
        str(saved(good, base, tmp_path)),
        "--base",
        str(base),
        "--prompts",
        str(files["seen"]),
    ]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert isinstance(result.exception, UserError) and message in str(result.exception), result.exception


def test_a_draft_vocabulary_that_lacks_the_answers_tokens_is_a_fault(answers, base, files, tmp_path):
    written = sorted({token for ids, mask in answers.texts for token, a in zip(ids, mask, strict=True) if a})
    others = [token for token in range(answers.base.config.vocab_size) if token not in written]
    shape = {"hidden_size": 32, "vocab_size": answers.base.config.vocab_size}
    for name, tokens, status in (("all", written, "fine"), ("few", sorted([*others[:60], *written[:2]]), "fault")):
        config = SpeculatorConfig(n_predict=2, inner_dim=8, emb_dim=8, proj_dim=8, draft_vocab_size=len(tokens))
        speculator = build_speculator(config, **shape, draft_tokens=tokens, seed=0)
        _, found, _ = assert_diagnosis(saved(speculator, base, tmp_path / name), base, files["seen"])
        assert found["draft vocabulary"] == status
