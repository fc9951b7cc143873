"""Early exit: the base model's first decoder layers as its draft, on its own KV cache."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional as F

from helpers.drafters import load_base
from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, weights
from helpers.tiny_models import ARCHITECTURES
from helpers.training_runs import overrides, script
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator
from verl_speculator.base_model.hidden_states import block_list, block_of
from verl_speculator.checkpoint.format import save_speculator, write_checkpoint
from verl_speculator.data.alignment import align
from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.self_speculative import SelfSpeculativeTarget
from verl_speculator.decoding.target import Target
from verl_speculator.decoding.tree import DraftTree
from verl_speculator.evaluation.metrics import Document
from verl_speculator.losses import DraftSums
from verl_speculator.models.layers import block_shapes, copy_norm, start_from_base
from verl_speculator.models.speculator import logit_transform
from verl_speculator.utils.settings import UserError

PROMPT = [5, 9, 23, 4, 77, 31, 8]
COUNT = 24
TRAINABLE = ("head", "head_and_block")


def exit_of(model, layer, trainable="head", n_predict=3, noise=0.0):
    """An early exit of a base model, untrained or with noise on its trained parameters."""
    vocab, width = model.get_output_embeddings().weight.shape
    config = SpeculatorConfig(method="early_exit", exit_layer=layer, trainable=trainable, n_predict=n_predict)
    shapes, dtype = block_shapes(model, config), next(model.parameters()).dtype
    speculator = build_speculator(
        config,
        hidden_size=width,
        vocab_size=vocab,
        block_shapes=shapes,
        logit_cap=logit_transform(model.config).cap,
        seed=0,
        dtype=dtype,
    ).requires_grad_(False)
    start_from_base(speculator, model)
    copy_norm(speculator, model)
    speculator.copy_block(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in speculator.named_parameters():
        if noise and name not in speculator.frozen():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return speculator


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_early_exit_greedy_text_is_the_base_models(bases, name, layer, trainable):
    """Also with noise, so that some drafts are rejected."""
    model = load_base(bases[name])
    text = speculative_generate(model, None, PROMPT, max_new_tokens=COUNT, eos_token_id=()).tokens
    for noise in (0.0, 0.02, 1.0):
        for draft_length in (1, 3):
            speculator = exit_of(model, layer, trainable, noise=noise)
            result = speculative_generate(
                model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=(), draft_length=draft_length
            )
            assert result.tokens == text
            if noise == 0.0 and layer == 1:
                assert result.accepted == draft_length


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("layer", [0, 1])
def test_self_speculative_target_reads_as_the_plain_target(bases, layer, trainable):
    model = load_base(bases["gemma2"])
    speculator = exit_of(model, layer, trainable)
    tokens = torch.tensor(PROMPT)
    with torch.inference_mode(), Target(model) as plain, SelfSpeculativeTarget(model, speculator) as shared:
        plain.read(tokens)
        expected = plain.read(torch.tensor([3, 4, 5, 6]))[1]
        shared.read(tokens)
        for token in (3, 4, 9):  # three drafts, the last of which is rejected
            shared.read_ahead(torch.tensor([token]))
        logits = shared.read(torch.tensor([3, 4, 9, 1]))[1]
        torch.testing.assert_close(logits[:2], expected[:2], rtol=0, atol=1e-12)
        shared.roll_back(len(PROMPT) + 2)
        shared.read_ahead(torch.tensor([5]))
        logits = shared.read(torch.tensor([5, 6]))[1]
        torch.testing.assert_close(logits, expected[2:], rtol=0, atol=1e-12)
        assert {layer.get_seq_length() for layer in shared._caches} == {len(PROMPT) + 4}


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_self_speculative_target_runs_each_layer_once_per_token(bases, trainable):
    """No weight or cache of a shared layer exists twice."""
    model = load_base(bases["qwen2_tied"])
    speculator = exit_of(model, 1, trainable)
    seen = [0, 0]
    hooks = [
        block.register_forward_hook(lambda _, inputs, output, i=i: seen.__setitem__(i, seen[i] + inputs[0].shape[1]))
        for i, block in enumerate(block_list(model.base_model)[1])
    ]
    result = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
    for hook in hooks:
        hook.remove()
    read = len(PROMPT) + sum(one.drafted + 1 for one in result.rounds[1:])
    assert seen == [read, read]
    target = SelfSpeculativeTarget(model, speculator)
    assert len(target._caches) == 2 + (trainable == "head_and_block")
    trained = {p.data_ptr() for p in speculator.parameters()}
    base_weights = {p.data_ptr() for p in model.parameters()}
    used = {p.data_ptr() for view in (target.front, target.back) for p in view.parameters()}
    assert used <= base_weights and not trained & base_weights


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_moe", "granite", "granitemoe", "gemma2"])
def test_early_exit_untrained_at_the_last_layer_equals_the_base(bases, scaled, name, trainable, tmp_path):
    """KL 0 and every draft accepted, also with a logit scale or soft cap, and after saving and loading."""
    model = load_base(scaled.get(name, bases.get(name)))
    save_speculator(exit_of(model, 1, trainable), tmp_path)
    speculator = load_speculator(tmp_path)
    tokens = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    result = Document(model, tokens, [0] * 5 + [1] * 35).measure(speculator, (), 1.0)
    assert result["pairs"] == [35]
    assert abs(result["kl"][0]) < 1e-5  # transformers' norms compute in float32
    done = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
    assert done.accepted == 3
    warm = speculative_generate(
        model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=(), temperature=1.0, seed=1
    )
    assert warm.accepted == 3


def test_align_first_offset_1_never_targets_the_first_token():
    """math: row t has h_t and target x_{t+1}, in the same document and of the assistant's."""
    tokens, mask = torch.arange(10, 20), torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1])
    rows = align(tokens, mask, torch.tensor([0, 4, 10]), 1, (), first_offset=1)
    expected = [t for t in range(9) if t + 1 != 4 and mask[t + 1]]
    assert rows.positions.tolist() == expected == rows.teachers[0].tolist()
    assert rows.targets[0].tolist() == [int(tokens[t + 1]) for t in expected]


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize(
    ("name", "joint"), [("qwen2_tied", False), ("qwen2_untied", False), ("gemma2", True), ("granite", 0)]
)
def test_early_exit_loss_and_gradients_equal_the_definition(bases, scaled, rows, name, trainable, joint):
    """The engine, packed and padded, against each conversation read alone with the base model cut by hand."""
    mix = {"ce": 1.0, "kl": 0.5}
    settings = {"method": "early_exit", "exit_layer": 0, "trainable": trainable, "loss": mix, "kl_temperature": 2.0}
    folder = bases.get(name) or scaled[name]
    engine = build_engine(folder, speculator=settings | {"n_predict": 4}, freeze_base_model=not joint)
    result = {}
    for packed in (True, False):
        output = run_batch(engine, make_batch(rows[:6], micro=2, packed=packed))
        result[packed] = DraftSums(*torch.tensor(output["metrics"]["draft_sums"])), gradients(engine)
    for name in ("ce", "compared"):
        sums = [getattr(result[packed][0], name) for packed in (True, False)]
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)

    model = load_base(folder, torch.float32)
    speculator = exit_of(model, 0, trainable, n_predict=4)
    speculator.attach(model)
    learning = {n: p.requires_grad_() for n, p in speculator.named_parameters() if n not in speculator.frozen()}
    total, pairs = 0.0, 0
    for row in rows[:6]:
        ids, mask = row["input_ids"], row["loss_mask"]
        calls = []
        block = block_of(model, 0)
        hook = block.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            seen = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        hook.remove()
        ((args, kwargs),) = calls
        state = seen.hidden_states[1] if trainable == "head" else speculator.run_block(args[0], **kwargs)
        draft = speculator.logits(0, speculator.norm(state))[0]
        aligned = align(ids, mask, torch.tensor([0, len(ids)]), 1, engine.model_config.end_token_ids, first_offset=1)
        at, target = aligned.positions, aligned.targets[0]
        kl = (
            F.kl_div(
                (draft[at] / 2).log_softmax(-1),
                (seen.logits[0, at] / 2).log_softmax(-1),
                log_target=True,
                reduction="none",
            ).sum()
            * 4
        )
        total = total + F.cross_entropy(draft[at], target, reduction="sum") + 0.5 * kl
        pairs += len(at)
    found = result[True][0]
    torch.testing.assert_close(found.ce + found.compared, total.detach().view(1), rtol=2e-4, atol=0)
    assert int(result[True][0].pairs) == pairs
    expected = torch.autograd.grad(total / pairs, list(learning.values()))
    for key, gradient in zip(learning, expected, strict=True):
        actual = result[True][1][f"draft.speculator.{key}"]
        torch.testing.assert_close(actual, gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()), msg=key)


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_early_exit_trains_saves_and_decodes(bases, rows, tmp_path, trainable):
    settings = {"method": "early_exit", "exit_layer": 0, "trainable": trainable, "loss": "kl"}
    engine = build_engine(bases["qwen2_untied"], speculator=settings, lr=1e-2)
    before = weights(engine)
    losses = []
    for _ in range(4):
        losses.append(sum(run_batch(engine, make_batch(rows, micro=8))["loss"]))
        engine.optimizer_step()
    assert losses[-1] < losses[0]
    after = weights(engine)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    parts = {"exit_head", "block"} if trainable == "head_and_block" else {"exit_head"}
    assert {key.split(".")[2] for key in moved} == parts and all(key.startswith("draft.") for key in moved)

    state = {key.removeprefix("draft.speculator."): value for key, value in after.items() if key.startswith("draft.")}
    shape = engine.speculator
    write_checkpoint(tmp_path, shape.config, state, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size)
    stored = {name.split(".")[0] for name in torch.load(tmp_path / "pytorch_model.bin", weights_only=True)}
    assert stored == parts | {"norm"}
    model = load_base(bases["qwen2_untied"], torch.float32)
    loaded = load_speculator(tmp_path, base=model).requires_grad_(False)
    text = speculative_generate(model, None, PROMPT, max_new_tokens=COUNT, eos_token_id=()).tokens
    assert speculative_generate(model, loaded, PROMPT, max_new_tokens=COUNT, eos_token_id=()).tokens == text


def test_launcher_early_exit_invalid_setting_is_refused(bases, chat, tmp_path):
    from transformers import GPT2Config

    def refused(base, **settings):
        settings = {"model__speculator__method": "early_exit"} | settings
        result = script(1, tmp_path / "run", *overrides(base, chat, **settings))
        assert result.returncode == 2 and not (tmp_path / "run").exists()
        return result.stderr

    base = bases["qwen2_tied"]
    assert "exit_layer=None: expected a block of the base" in refused(base)
    result = refused(base, model__speculator__exit_layer=2, model__speculator__trainable="head_and_block")
    assert "model.speculator.exit_layer=2: the base has 2 blocks; expected 0 to 1" in result
    cached = {"data__cache_hidden_states": tmp_path / "cache"}
    assert "which are not kept" in refused(base, model__speculator__exit_layer=1, **cached)
    other = tmp_path / "gpt2"
    shutil.copytree(base, other)
    GPT2Config(vocab_size=330, n_embd=32, n_layer=2, n_head=2).save_pretrained(other)
    assert "GPT2LMHeadModel ends with LayerNorm; expected an RMS norm" in refused(
        other, model__speculator__exit_layer=1
    )


def test_early_exit_invalid_setting_raises(bases, tmp_path):
    model = load_base(bases["qwen2_tied"])
    with pytest.raises(UserError, match=r"exit_layer=None: expected a block of the base, an integer of at least 0"):
        SpeculatorConfig(method="early_exit")
    with pytest.raises(UserError, match=r"trainable=heads: expected one of head, head_and_block \(did you mean 'head'"):
        SpeculatorConfig(method="early_exit", exit_layer=1, trainable="heads")
    with pytest.raises(UserError, match=r"exit_layer=2: the base has 2 blocks; expected 0 to 1"):
        SpeculatorConfig(method="early_exit", exit_layer=2).check_blocks(2)
    with pytest.raises(UserError, match=r"exit_layer=7: Qwen2ForCausalLM has 2 blocks; expected 0 to 1"):
        exit_of(model, 7, "head_and_block")
    with pytest.raises(
        UserError, match=r"Linear has no list of blocks that is known here \(looked for layers, h, blocks"
    ):
        block_list(torch.nn.Linear(2, 2))
    save_speculator(exit_of(model, 1, "head_and_block"), tmp_path)
    loaded = load_speculator(tmp_path)
    with pytest.raises(UserError, match=r"of the trained block is \[64, 32\], the base's None"):
        speculative_generate(load_base(bases["qwen2_moe"]), loaded, PROMPT, max_new_tokens=2)


def test_early_exit_draft_tree_raises(bases, tmp_path):
    model = load_base(bases["qwen2_tied"])
    speculator = exit_of(model, 1)
    with pytest.raises(UserError, match="draft_tree: a speculator of method=early_exit drafts chains alone"):
        speculative_generate(model, speculator, PROMPT, max_new_tokens=2, draft_tree=DraftTree.chain(2))


def test_early_exit_untrained_at_the_last_layer_of_a_real_base(shared):
    """KL 0 and acceptance 1, untrained."""
    model = load_base(shared / "models" / "gsm8k-4m", torch.float32)
    speculator = exit_of(model, 5)
    result = Document(model, list(range(300, 400)), [1] * 100).measure(speculator, (), 1.0)
    assert abs(result["kl"][0]) / result["pairs"][0] < 1e-6
    assert speculative_generate(model, speculator, PROMPT, max_new_tokens=40, eos_token_id=()).accepted == 3
