"""The engine inside verl: gradients that depend on nothing they should not, a base that stays or moves as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, weights, whole
from helpers.tiny_models import ARCHITECTURES
from verl_speculator import build_speculator
from verl_speculator.base_model import cpu
from verl_speculator.checkpoint.format import write_checkpoint
from verl_speculator.config.families import FAMILIES
from verl_speculator.config.objective import Objective
from verl_speculator.data.alignment import align
from verl_speculator.losses import DraftSums
from verl_speculator.losses.reference import row_losses
from verl_speculator.models import Slot
from verl_speculator.models.speculator import LogitTransform
from verl_speculator.utils.settings import UserError

pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine(base, gloo):
    return build_engine(base)


def assert_same_gradients(found, expected, *, but=()):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        if name not in but:
            scale = gradient.abs().max()
            assert scale > 0, f"{name}: no gradient"
            assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


def one_micro_batch(base, rows, **speculator):
    """The gradients of one micro-batch on one rank, frozen and joint."""
    found = {}
    for joint in (False, True):
        engine = build_engine(base, freeze_base_model=not joint, speculator=speculator)
        run_batch(engine, make_batch(rows, micro=16))
        found[joint] = gradients(engine)
    return found


@pytest.fixture(scope="module")
def expected(base, rows, gloo):
    return one_micro_batch(base, rows)


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_do_not_depend_on_the_cut(base, rows, expected, joint):
    engine = build_engine(base, freeze_base_model=not joint)
    for micro in (1, 4, 16):
        for packed in (True, False):
            run_batch(engine, make_batch(rows, micro=micro, packed=packed))
            assert_same_gradients(gradients(engine), expected[joint])
    run_batch(engine, make_batch(rows, max_tokens=100))
    assert_same_gradients(gradients(engine), expected[joint])


CASES = [
    ("qwen2_tied", {"loss": "ce"}),
    ("qwen2_untied", {"loss": "kl"}),
    ("qwen2_untied", {"loss": "kl", "method": "medusa", "hidden_state": "pre_norm", "inner_dim": None}),
    ("qwen2_untied", {"loss": "kl", "method": "early_exit", "exit_layer": 0, "trainable": "head_and_block"}),
    ("qwen2_untied", {"loss": "tv", "embedding": "base_frozen", "head": "base_frozen"}),
    ("qwen2_untied", {"loss": "kl", "method": "eagle3"}),
]


@pytest.fixture(scope="module")
def gradients_of_two_ranks(bases, chat, tmp_path_factory):
    """Of every case, from one start of two processes."""
    cases = json.dumps([(str(bases[name]), settings) for name, settings in CASES])
    path = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command += ["-m", "helpers.engine_harness", chat, path, cases]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=["sum_rnn", "untied", "medusa", "early_exit", "tables", "eagle3"]
)
def test_gradients_do_not_depend_on_the_ranks(bases, rows, gradients_of_two_ranks, case):
    """An untied head is a sharding unit of its own, and the teacher needs it whole on every rank."""
    name, settings = CASES[case]
    expected = one_micro_batch(bases[name], rows, **settings)
    assert len(gradients_of_two_ranks[case]) == 8
    for (joint, _, _), gradient in gradients_of_two_ranks[case].items():
        assert_same_gradients(gradient, expected[joint])


def test_the_loss_is_the_mean_over_pairs_then_over_depths(engine, rows):
    """Against the definition, one conversation at a time."""
    output = run_batch(engine, make_batch(rows), train=False)
    sums = DraftSums(*torch.tensor(output["metrics"]["draft_sums"]))
    one_by_one = [
        torch.tensor(run_batch(engine, make_batch([row], micro=1), train=False)["metrics"]["draft_sums"])
        for row in rows
    ]
    total = DraftSums(*torch.stack(one_by_one).sum(0))
    torch.testing.assert_close(sums.ce, total.ce, rtol=1e-6, atol=0)
    assert torch.equal(sums.pairs, total.pairs)
    assert torch.equal(sums.accepted, total.accepted)
    expected = sum(float(loss / pairs) for loss, pairs in zip(sums.ce, sums.pairs, strict=True)) / 3
    assert sum(output["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_packing_on_every_base(bases, rows, name):
    """Packed documents do not see each other, and both paths give the state that the output head reads."""
    engine = build_engine(bases[name])
    reference = torch.stack(
        [
            torch.tensor(run_batch(engine, make_batch([row], micro=1), train=False)["metrics"]["draft_sums"])
            for row in rows[:4]
        ]
    ).sum(0)
    for packed in (True, False):
        found = run_batch(engine, make_batch(rows[:4], packed=packed), train=False)["metrics"]["draft_sums"]
        torch.testing.assert_close(torch.tensor(found), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("joint", [False, True])
def test_the_teacher_is_the_base_itself(bases, rows, name, joint):
    """Losses that compare with the base, against logits that the base gave (Gemma 2 caps them)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bases[name]).eval()
    mix = {"kl": 1.0, "lk": 0.5, "ce": 0.1}
    engine = build_engine(bases[name], speculator={"loss": mix, "kl_temperature": 2.0}, freeze_base_model=not joint)
    speculator, objective = engine.speculator, Objective.parse(mix, kl_temperature=2.0)
    own = build_speculator(speculator.config, hidden_size=32, vocab_size=speculator.vocab_size, seed=1)
    expected = torch.zeros(3)
    for row in rows[:4]:
        ids, borders = row["input_ids"], torch.tensor([0, len(row["input_ids"])])
        draft = align(ids, row["loss_mask"], borders, 3, engine.model_config.end_token_ids)
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True, use_cache=False)
            states = own.unroll(out.hidden_states[-1][0, draft.positions], draft.tokens)
            for k, state in enumerate(states):
                teacher = out.logits[0][draft.teachers[k]]
                losses = sum(row_losses(objective, state @ own.head(k).T, draft.targets[k], teacher))
                expected[k] += losses[draft.valid[k]].sum()
    for packed in (True, False):
        found = run_batch(engine, make_batch(rows[:4], packed=packed), train=False)
        sums = DraftSums(*torch.tensor(found["metrics"]["draft_sums"]))
        torch.testing.assert_close(sums.ce + sums.compared, expected, rtol=2e-5, atol=1e-4)


def test_a_base_whose_logits_are_not_known_is_refused(bases, rows):
    engine = build_engine(bases["gemma2"], speculator={"loss": "kl"})
    engine.module.head.transform = LogitTransform()
    with pytest.raises(UserError, match="does something to its logits that is not known here"):
        run_batch(engine, make_batch(rows[:4]), train=False)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_a_start_from_the_base(bases, name, method):
    """Tables and heads are the base's own up to a factor; the rest starts as ever."""
    dims = {"inner_dim": 32, "emb_dim": 32, "proj_dim": 32, "method": method}
    engine, random = (build_engine(bases[name], speculator=dims | {"init": init}) for init in ("base", "random"))
    found, other = weights(engine), weights(random)
    embedding = found["base.model.embed_tokens.weight"]
    for key, slot in engine.speculator.checkpoint_slots().items():
        mine, start = (Slot("draft.speculator." + slot.parameter, slot.part).of(w) for w in (found, other))
        if "emb" in key or "head" in key:
            source = embedding if "emb" in key or name == "qwen2_tied" else found["base.lm_head.weight"]
            torch.testing.assert_close(mine / mine.std(), source / source.std())
            assert mine.std().item() == pytest.approx(1 / 32**0.5, rel=1e-3)
        else:
            assert torch.equal(mine, start)
    with pytest.raises(
        UserError, match=r"init=base: .* is 16 wide, the base 32; expected the first of emb_dim to be 32"
    ):
        build_engine(bases[name], speculator=dims | {"init": "base", "emb_dim": "16.32"})


@pytest.mark.parametrize("loss", ["kl", "lk"])
def test_a_teachers_gradients_do_not_depend_on_the_cut_either(base, rows, loss):
    engine = build_engine(base, speculator={"loss": loss, "depth_weights": [1.0, 0.5, 0.25]})
    run_batch(engine, make_batch(rows, micro=16))
    expected = gradients(engine)
    for settings in ({"micro": 1, "packed": False}, {"micro": 4}, {"max_tokens": 100}):
        run_batch(engine, make_batch(rows, **settings))
        assert_same_gradients(gradients(engine), expected)
    engine.draft.chunk_rows = 7
    run_batch(engine, make_batch(rows, micro=16))
    assert_same_gradients(gradients(engine), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_state_is_the_one_that_the_output_head_reads(bases, rows, name):
    """Both ways to it, that of a frozen base and that of a trained one."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(bases[name]).eval(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        joint = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        frozen = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(frozen, seen[0])
    assert torch.equal(joint, seen[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", FAMILIES)
def test_frozen_base_does_not_move_by_a_bit(bases, rows, name, method):
    more = {"early_exit": {"exit_layer": 0, "trainable": "head_and_block"}, "medusa": {"hidden_state": "pre_norm"}}
    engine = build_engine(bases[name], speculator={"method": method} | more.get(method, {}), lr=1e-2)
    before = weights(engine)
    for _ in range(3):  # the first step of a bottleneck reaches only what comes behind it
        run_batch(engine, make_batch(rows))
        with_gradient = set(gradients(engine))
        norm = engine.optimizer_step()
    after = weights(engine)
    resting = {f"draft.speculator.{name}" for name in engine.speculator.frozen()}
    drafts = {name for name in before if name.startswith("draft.")} - resting
    assert with_gradient == drafts
    total = torch.cat([g.flatten() for g in gradients(engine).values()]).norm()
    assert norm >= total.item() * 0.999  # the norm before clipping to 1 is that of the speculator alone
    assert all(torch.equal(before[name], after[name]) for name in set(before) - drafts)
    assert all(not torch.equal(before[name], after[name]) for name in drafts)
    optimized = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for name, p in engine.module.named_parameters() if name in drafts}
    assert set(engine.optimizer.state) == {p for name, p in engine.module.named_parameters() if name in drafts}


def test_frozen_base_makes_no_graph_and_no_logits(engine, rows):
    calls = []
    hook = engine.base.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    states = []
    other = engine.draft.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    run_batch(engine, make_batch(rows))
    hook.remove()
    other.remove()
    assert not calls
    assert states and not any(state.requires_grad for state in states)
    assert not engine.base.training


@pytest.mark.parametrize("joint", [False, True])
def test_validation_asks_for_no_gradient(base, rows, monkeypatch, joint):
    """Neither of a parameter nor of a hidden state, and its loss is that of training."""
    from verl_speculator.losses import chunked

    wanted, run = [], chunked._ChunkedPass.run

    def spy(self, *args):
        run(self, *args)
        wanted.append([each is not None for each in (self.hidden_gradient, *self.gradients)])

    monkeypatch.setattr(chunked._ChunkedPass, "run", spy)
    engine = build_engine(base, freeze_base_model=not joint)
    losses = [run_batch(engine, make_batch(rows), train=train)["loss"] for train in (False, True)]
    assert losses[0] == pytest.approx(losses[1])
    validation, training = wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]
    assert not any(map(any, validation)) and all(map(any, training))


def test_joint_training_moves_both(base, rows):
    engine = build_engine(base, freeze_base_model=False)
    before = weights(engine)
    output = run_batch(engine, make_batch(rows))
    engine.optimizer_step()
    after = weights(engine)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    total, tokens = output["metrics"]["base_sums"]
    draft = DraftSums(*torch.tensor(output["metrics"]["draft_sums"]))
    assert tokens == sum(int(row["loss_mask"].sum()) for row in rows)
    expected = total / tokens + float((draft.ce / draft.pairs).mean())
    assert sum(output["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
def test_packed_weights_of_a_frozen_base_change_no_gradient(bases, rows, name, monkeypatch):
    settings = {"loss": {"kl": 1.0, "tv": 1.0}, "embedding": "base_frozen", "head": "base_frozen"}
    by_weights = []
    for least in (cpu.LEAST_PACKED_BYTES, 0):
        monkeypatch.setattr(cpu, "LEAST_PACKED_BYTES", least)
        engine = build_engine(bases[name], speculator=settings)
        run_batch(engine, make_batch(rows, micro=8))
        packed = [module for module in engine.base.modules() if isinstance(module, cpu.PackedLinear)]
        assert bool(packed) == (least == 0)
        by_weights.append(gradients(engine))
    assert_same_gradients(by_weights[1], by_weights[0])
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "LEAST_PACKED_BYTES", 0)
    for other in ({"freeze_base_model": False}, {"speculator": {"method": "early_exit", "exit_layer": 0}}):
        engine = build_engine(bases[name], **other)
        assert not any(isinstance(module, cpu.PackedLinear) for module in engine.base.modules())


@pytest.mark.parametrize(("detach", "coefficient"), [(False, 1.0), (False, 0.25), (True, 1.0)])
def test_what_the_base_feels_of_the_speculator(base, rows, expected, detach, coefficient):
    """The base's gradient is its own loss's plus the coefficient times the speculator's, or without it if detached."""
    settings = {"freeze_base_model": False, "speculator_loss_coeff": coefficient}
    engine = build_engine(base, speculator={"detach_hidden": detach}, **settings)
    run_batch(engine, make_batch(rows))
    found = gradients(engine)
    alone = build_engine(base, speculator={"detach_hidden": True}, freeze_base_model=False)
    run_batch(alone, make_batch(rows))
    own = gradients(alone)
    name = next(name for name in own if name.endswith("layers.0.self_attn.q_proj.weight"))
    full = expected[True][name] - own[name]
    share = 0.0 if detach else coefficient
    torch.testing.assert_close(found[name], own[name] + share * full, rtol=1e-4, atol=1e-7)
    drafts = [name for name in own if name.startswith("draft.")]
    for name in drafts:
        torch.testing.assert_close(found[name], coefficient * expected[True][name], rtol=1e-4, atol=1e-7)


def test_a_row_reads_no_other_document(engine, rows):
    """Changing the second document of a packed row changes nothing in the first."""
    changed = {name: value.clone() for name, value in rows[1].items()}
    changed["input_ids"] = changed["input_ids"].flip(0)
    first = []
    for other in (rows[1], changed):
        states = []
        hook = engine.draft.register_forward_pre_hook(
            lambda module, args, more, states=states: states.append((args[0].clone(), {**more})), with_kwargs=True
        )
        run_batch(engine, make_batch([rows[0], other], micro=2), train=False)
        hook.remove()
        found = run_batch(engine, make_batch([rows[0]], micro=1), train=False)["metrics"]["draft_sums"]
        alone = DraftSums(*torch.tensor(found)).pairs[0]
        whole_batch, given = states[0]
        hidden, tokens, targets, valid = (
            whole_batch.flatten(0, 1)[given["batch"].rows],
            *(given[name] for name in ("tokens", "targets", "valid")),
        )
        count = int(alone)
        first.append((hidden[:count], tokens[:count][:, :1], targets[:, :count] * valid[:, :count]))
    torch.testing.assert_close(first[0][0], first[1][0], rtol=0, atol=1e-5)
    assert torch.equal(first[0][1], first[1][1])
    assert torch.equal(first[0][2], first[1][2])


def test_starts_from_a_trained_speculator(base, engine, tmp_path):
    state = {
        name.removeprefix("draft.speculator."): value + 1
        for name, value in weights(engine).items()
        if name.startswith("draft.")
    }
    config, head = engine.model_config.speculator_config, state["heads.0.weight"]
    write_checkpoint(tmp_path, config, state, hidden_size=32, vocab_size=head.shape[0])
    started = build_engine(base, speculator={"path": str(tmp_path)})
    assert torch.equal(whole(started.speculator.heads[0].weight), head)
    with pytest.raises(UserError, match=r"n_predict \(3, 2\)"):
        build_engine(base, speculator={"path": str(tmp_path), "n_predict": 2})


def test_a_served_base_gets_its_own_names_only(engine, base):
    from transformers import AutoModelForCausalLM

    parameters, _ = engine.get_per_tensor_param()
    names = {name for name, _ in parameters}
    assert names == set(AutoModelForCausalLM.from_pretrained(base).state_dict())


def test_log_probs_as_any_language_model_engine(engine, rows):
    """Without a loss function the engine gives the base's log-probabilities."""
    with engine.eval_mode(), torch.no_grad():
        output = engine.forward_backward_batch(make_batch(rows[:4]), None, forward_only=True)
    log_probs = output["model_output"]["log_probs"]
    assert [len(row) for row in log_probs.unbind()] == [len(row["input_ids"]) for row in rows[:4]]
    assert all((row <= 0).all() for row in log_probs.unbind())


def test_sequence_parallelism_is_refused_by_name(engine):
    from verl.workers.config import FSDPEngineConfig

    from verl_speculator.training.engine import SpeculatorEngine

    config = FSDPEngineConfig(strategy="fsdp2", ulysses_sequence_parallel_size=2)
    with pytest.raises(UserError, match="ulysses_sequence_parallel_size=2"):
        SpeculatorEngine(engine.model_config, config, engine.optimizer_config, engine.checkpoint_config)


def test_half_precision_keeps_fp32_master_weights(base, rows):
    """As on an accelerator: the frozen base in bf16, the speculator computed in bf16 from fp32 weights."""
    engine = build_engine(base, param_dtype="bf16", lr=1e-2)
    types = {name: p.dtype for name, p in engine.module.named_parameters()}
    assert {t for name, t in types.items() if name.startswith("base.")} == {torch.bfloat16}
    assert {t for name, t in types.items() if name.startswith("draft.")} == {torch.float32}
    seen = []
    engine.draft.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    losses = []
    for _ in range(8):
        losses.append(sum(run_batch(engine, make_batch(rows))["loss"]))
        engine.optimizer_step()
    assert set(seen) == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.2
    exact = build_engine(base)
    assert losses[0] == pytest.approx(sum(run_batch(exact, make_batch(rows))["loss"]), rel=2e-2)


def test_a_forward_only_engine_is_the_base_alone(base):
    # Not initialised: verl gives such an engine pinned memory, which needs an accelerator.
    module = build_engine(base, forward_only=True, initialize=False)._build_module()
    assert type(module).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize("named", ["Qwen2DecoderLayer", ["Qwen2DecoderLayer"]])
def test_sharding_units_of_the_users_keep_ours(base, named):
    engine = build_engine(base, initialize=False)
    engine.engine_config.wrap_policy["transformer_layer_cls_to_wrap"] = named
    engine._build_module()
    assert engine.engine_config.wrap_policy["transformer_layer_cls_to_wrap"] == ["Qwen2DecoderLayer", "DraftLoss"]


def test_a_batch_without_a_target_reports_zeros(base, rows):
    """verl's own loss is 0/0 there; in validation it must not spoil the sum over all batches."""
    silent = [row | {"loss_mask": torch.zeros_like(row["loss_mask"])} for row in rows[:4]]
    engine = build_engine(base, freeze_base_model=False)
    metrics = run_batch(engine, make_batch(silent), train=False)["metrics"]
    assert metrics["base_sums"] == [0.0, 0.0]
    assert not torch.tensor(metrics["draft_sums"]).any()
