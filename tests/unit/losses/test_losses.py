"""The losses: definitions by hand, closed forms against them, and chunks against the plain loop, value and gradient."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.utils._python_dispatch import TorchDispatchMode

import verl_speculator.losses.closed_form as kernels
from helpers.family_variants import Tables, build_attached, configurations
from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.config.objective import Objective
from verl_speculator.losses import DraftLoss, reference, speculator_loss
from verl_speculator.losses.closed_form import loss_and_gradient_, teacher_distribution
from verl_speculator.losses.reference import row_losses
from verl_speculator.utils.settings import UserError

CURVE = Path(__file__).resolve().parents[2] / "golden" / "objective_curve.json"
D, V, T, K = 20, 61, 11, 3
OBJECTIVES = {
    "ce": Objective.parse("ce"),
    "kl": Objective.parse("kl"),
    "kl_warm": Objective.parse("kl", kl_temperature=2.5),
    "tv": Objective.parse("tv"),
    "lk": Objective.parse("lk"),
    "lk_pure": Objective.parse("lk_pure"),
    "mix": Objective.parse({"ce": 0.1, "kl": 1.0, "tv": 0.5, "lk": 2, "lk_pure": 0.25}, kl_temperature=0.7, lk_eta=10),
    "half_ce": Objective.parse({"ce": 0.5}),
    "ce_by_reach": Objective.parse("ce", depth_weights="reach"),
    "kl_by_reach": Objective.parse("kl", depth_weights="reach"),
    "kl_by_gain": Objective.parse("kl", depth_weights="gain"),
    "mix_by_gain": Objective.parse({"ce": 0.1, "kl": 1.0, "lk": 0.5}, kl_temperature=2, depth_weights="gain"),
}


def rand(*shape, seed, scale=1.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_definitions_by_hand():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.5, 0.1])
    z, t = q.log()[None].double(), p.log()[None].double()
    alpha, divergence = 0.4 + 0.2 + 0.1, 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.5)
    assert float(reference.cross_entropy(z, torch.tensor([1]))) == pytest.approx(-math.log(0.5))
    assert float(reference.kl(z, t)) == pytest.approx(divergence, rel=1e-6)
    assert float(reference.tv(z, t)) == pytest.approx(1 - alpha) == pytest.approx(0.5 * (0.3 + 0.3))
    assert float(reference.lk_pure(z, t)) == pytest.approx(-math.log(alpha))
    share = math.exp(-3 * alpha)
    assert float(reference.lk(z, t, 3.0)) == pytest.approx(share * divergence + (1 - share) * (1 - alpha), rel=1e-6)
    # Softened: both distributions to the power 1/T, and the factor T².
    soft_p, soft_q = (x**0.5 / (x**0.5).sum() for x in (p, q))
    assert float(reference.kl(z, t, 2.0)) == pytest.approx(
        4 * float((soft_p * (soft_p / soft_q).log()).sum()), rel=1e-5
    )


def test_every_loss_is_least_where_the_draft_is_the_base():
    teacher = rand(5, V, seed=1)
    for name in ("kl", "tv", "lk", "lk_pure"):
        objective = OBJECTIVES[name]
        assert row_losses(objective, teacher, None, teacher)[1].abs().max() < 1e-12
        assert row_losses(objective, rand(5, V, seed=2), None, teacher)[1].min() > 0.01


def test_teachers_carry_no_gradient():
    z, t = rand(4, V, seed=1).requires_grad_(), rand(4, V, seed=2).requires_grad_()
    for name, objective in OBJECTIVES.items():
        sum(row_losses(objective, z, torch.arange(4), t)).sum().backward()
        assert t.grad is None and z.grad is not None, name


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([2, 3, 5, 8, 13, 21, 34, 55, 60])], ids=["all", "some"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_closed_forms(objective, vocabulary):
    size = V if vocabulary is None else len(vocabulary)
    z, t, targets = rand(9, size, seed=3).requires_grad_(), rand(9, V, seed=4), torch.arange(9)
    factor = None if vocabulary is None else rand(9, seed=5).abs()
    expected = row_losses(objective, z, targets, t, vocabulary)
    ((1.0 if factor is None else factor) * expected[0] + expected[1]).sum().backward()
    block = z.detach().clone()
    teacher = teacher_distribution(t, objective, vocabulary)
    *losses, found, acceptance = loss_and_gradient_(block, targets, teacher, objective, ce_factor=factor)
    if objective.pair_weights:
        q = z.detach().softmax(-1)
        of_target = q.gather(-1, targets[:, None])[:, 0]
        alpha = reference.acceptance(z.detach(), t, vocabulary) if objective.needs_teacher else of_target
        torch.testing.assert_close(acceptance, alpha, rtol=0, atol=1e-12)
    for loss, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, z.grad, rtol=0, atol=1e-12)
    assert found.data_ptr() == block.data_ptr()


def test_the_losses_of_a_draft_vocabulary_by_hand():
    """p = (1/2, 1/4, 1/8, 1/8) over four tokens, of which the draft has the first and the third: q = (3/4, 1/4)."""
    teacher, logits = torch.tensor([[4.0, 2, 1, 1]]).log(), torch.tensor([[3.0, 1]]).log()
    vocabulary = torch.tensor([0, 2])
    assert float(reference.acceptance(logits, teacher, vocabulary)) == pytest.approx(1 / 2 + 1 / 8)
    # The definition over all tokens, where q is 0 outside: half the sum of |p - q|.
    p, q = torch.tensor([4.0, 2, 1, 1]) / 8, torch.tensor([3 / 4, 0, 1 / 4, 0])
    assert float(reference.tv(logits, teacher, vocabulary)) == pytest.approx(float((p - q).abs().sum() / 2))
    assert float(reference.lk_pure(logits, teacher, vocabulary)) == pytest.approx(-math.log(5 / 8))
    # p restricted and normalised is (4/5, 1/5).
    divergence = 0.8 * math.log(0.8 / 0.75) + 0.2 * math.log(0.2 / 0.25)
    assert float(reference.kl(logits, teacher, vocabulary=vocabulary)) == pytest.approx(divergence, abs=1e-7)
    assert float(reference.cross_entropy(logits, torch.tensor([1]))) == pytest.approx(math.log(4))


def test_no_draft_continues_a_token_that_cannot_be_drafted():
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()
    covered = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    expected = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert torch.equal(reference.drafted_pairs(valid, covered), expected)


@pytest.mark.parametrize("loss", ["lk_pure", {"ce": 0.5, "lk_pure": 2, "lk": 1}])
def test_loss_where_acceptance_underflows_is_finite(loss):
    """α is 0 in float32 and log α is not: value and gradient of both forms against log α from float64, by hand."""
    objective = Objective.parse(loss)
    z, t, targets = rand(3, V, seed=3), rand(3, V, seed=4), torch.tensor([5, 0, 7])
    z[0, :30] += 200.0
    t[0, 30:] += 200.0  # α ≈ e^−200
    z[1, 0] += 600.0
    t[1, 1] += 600.0
    assert not reference.acceptance(z.float(), t.float())[:2].any()
    exact = z.clone().requires_grad_()
    alpha = torch.minimum(t.softmax(-1), exact.softmax(-1)).sum(-1)
    assert alpha.min() > 0
    weights = dict(objective.weights)
    other = Objective.parse({"ce": 1e-30} | {name: w for name, w in weights.items() if name != "lk_pure"})
    wanted = sum(row_losses(other, exact, targets, t)) - weights["lk_pure"] * alpha.log()
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    x, narrow = z.float().requires_grad_(), t.float()
    value = sum(row_losses(objective, x, targets, narrow))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    fast = loss_and_gradient_(z.float(), targets, teacher_distribution(narrow, objective), objective)
    for found, slope in ((value.detach(), gradient), (fast.ce + fast.compared, fast.gradient)):
        torch.testing.assert_close(found, wanted.detach().float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope, wanted_gradient.float(), rtol=1e-4, atol=1e-5)


# The whole loss.


class Batch:
    """Rows of every kind: whole, cut short, and without a single pair."""

    def __init__(self, dtype=torch.float64, rows=T, depths=K, vocab=V, width=D):
        self.hidden = rand(rows, width, seed=5).to(dtype)
        generator = torch.Generator().manual_seed(6)
        self.tokens, self.targets = torch.randint(vocab, (2, rows, depths), generator=generator)
        length = torch.randint(depths + 1, (rows,), generator=generator)
        self.valid = torch.arange(depths)[None] < length[:, None]
        self.teacher_hidden = rand(rows + depths + 1, width, seed=7).to(dtype)
        self.teacher_rows = torch.arange(rows)[:, None] + torch.arange(depths)[None] + 1
        self.base_head = rand(vocab, width, seed=8, scale=0.5).to(dtype)

    def arguments(self):
        return (self.hidden, self.tokens, self.targets, self.valid), {
            "teacher_hidden": self.teacher_hidden,
            "teacher_rows": self.teacher_rows,
            "base_head": self.base_head,
        }


def plain(speculator, batch, objective, counts=None):
    """All K blocks of logits at once, all rows, through autograd: the definition."""
    vocabulary, rows = speculator.draft_tokens, speculator.rows_of(batch.targets)
    valid = reference.drafted_pairs(batch.valid.T, rows.T >= 0)
    covered = valid & (rows.T >= 0)
    counts = torch.stack([covered.sum(1), valid.sum(1)]) if counts is None else counts
    weights = torch.tensor(objective.depths(batch.valid.shape[1]), dtype=torch.float64) * (counts > 0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9) / counts.clamp(min=1)
    states = speculator.unroll(batch.hidden, batch.tokens)
    wide = torch.float32 if states.dtype == torch.bfloat16 else states.dtype
    logits = torch.stack([speculator.draft_logits(k, state) for k, state in enumerate(states)]).to(wide)
    teacher = (batch.teacher_hidden[batch.teacher_rows.T] @ batch.base_head.T).to(wide)
    share = reference.pair_weights(objective, logits, rows.T, teacher, valid, vocabulary)
    total = 0.0
    for k in range(len(states)):
        parts = row_losses(objective, logits[k], rows[:, k], teacher[k], vocabulary)
        for weight, part, pairs in zip(weights[:, k], parts, (covered, valid), strict=True):
            total = total + weight * torch.where(pairs[k], share[k] * part, 0).sum()
    return total


def gradients(speculator, loss, hidden):
    speculator.zero_grad()
    hidden.grad = None
    loss.backward()
    return {name: p.grad for name, p in speculator.named_parameters()} | {"hidden": hidden.grad}


def assert_same_as_plain_loop(config, batch, objective, *, logit_cap=None, **options):
    shape = {"hidden_size": D, "vocab_size": V, "logit_cap": logit_cap}
    if config.draft_vocab_size is not None:
        shape["draft_tokens"] = torch.randperm(V, generator=torch.Generator().manual_seed(9))[: config.draft_vocab_size]
        shape["draft_tokens"] = shape["draft_tokens"].sort().values
    speculator = build_speculator(config, **shape, seed=0, dtype=torch.float64)
    if config.frozen_tables:
        speculator.attach(Tables(V, D, torch.float64))
    batch.hidden.requires_grad_()
    expected = plain(speculator, batch, objective, options.get("counts"))
    wanted = gradients(speculator, expected, batch.hidden)
    rows, teacher = batch.arguments()
    loss, sums = speculator_loss(speculator, *rows, **teacher, loss=objective, **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    found = gradients(speculator, loss, batch.hidden)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12, msg=name)
    return sums


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, T, 100])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_chunks_give_the_plain_loss_and_every_gradient(objective, chunk_rows):
    config = SpeculatorConfig(method="sum_lstm", n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    assert_same_as_plain_loop(config, Batch(), objective, chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_draft_vocabulary_gives_the_plain_loss_and_every_gradient(objective, chunk_rows):
    config = SpeculatorConfig(n_predict=K, draft_vocab_size=40, inner_dim=24, emb_dim=24, proj_dim=24)
    batch = Batch(rows=40)
    sums = assert_same_as_plain_loop(config, batch, objective, chunk_rows=chunk_rows)
    assert sums["covered"].sum() < sums["pairs"].sum() < batch.valid.sum()  # some targets are outside


UNROLLED = {
    name: config
    for name, config in configurations().items()
    if config.trainable == "head" and not config.reads_sequence
}


@pytest.mark.parametrize("config", UNROLLED.values(), ids=UNROLLED.keys())
def test_every_family(config):
    assert_same_as_plain_loop(config, Batch(depths=config.depths), OBJECTIVES["mix"], chunk_rows=4)
    assert_same_as_plain_loop(config, Batch(depths=config.depths), OBJECTIVES["ce"])


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", UNROLLED.values(), ids=UNROLLED.keys())
def test_every_family_under_fsdp1(config, compiled, gloo):
    """Which lays plain tensors over the parameters while the forward pass runs."""
    if compiled and not (COMPILER and config == UNROLLED["sum_lstm"]):
        pytest.skip("no C++ compiler, or compiled for one family already")
    rows, teacher = (batch := Batch(depths=config.depths, rows=40)).arguments()
    teacher["base_head"] = lambda states: states @ batch.base_head.T
    hidden, tokens, targets, valid = rows
    hidden.requires_grad_()
    found = []
    for shard in (None, ShardingStrategy.FULL_SHARD):
        speculator = build_attached(config, D, V, seed=0, dtype=torch.float64)
        draft = DraftLoss(speculator, OBJECTIVES["mix"], compiled=compiled)
        names = list(dict(speculator.named_parameters()))
        if shard is not None:
            cpu = torch.device("cpu")
            draft = FullyShardedDataParallel(draft, sharding_strategy=shard, device_id=cpu, use_orig_params=True)
        hidden.grad, given = None, teacher | {"teacher_rows": teacher["teacher_rows"].T}
        output = draft(hidden, tokens, targets.T, valid.T, **given)
        output["total"].backward()
        gradients = [p.grad for p in draft.parameters()]
        found.append([output["total"].detach(), hidden.grad.clone(), *gradients])
    for name, plain_one, sharded in zip(["total", "hidden", *names], *found, strict=True):
        torch.testing.assert_close(sharded, plain_one, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("objective", ["ce", "mix", "kl_by_gain"])
@pytest.mark.parametrize(
    "config",
    [
        SpeculatorConfig(method="medusa", n_predict=K),
        SpeculatorConfig(method="medusa", n_predict=K, head="shared"),
        SpeculatorConfig(method="early_exit", n_predict=K, exit_layer=0),
    ],
    ids=["medusa", "shared", "early_exit"],
)
def test_soft_capped_logits_give_the_plain_loss_and_every_gradient(config, objective):
    batch = Batch(depths=config.depths)
    assert_same_as_plain_loop(config, batch, OBJECTIVES[objective], logit_cap=1.5, chunk_rows=4)
    rows, teacher = batch.arguments()
    shape = {"hidden_size": D, "vocab_size": V, "seed": 0, "dtype": torch.float64}
    losses = [
        speculator_loss(build_speculator(config, **shape, logit_cap=cap), *rows, **teacher, loss="kl")[0].item()
        for cap in (None, 1.5)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_weighing_by_reach_keeps_the_sums_of_the_plain_loss():
    """What is reported per depth is the mean loss; what is minimised is weighted."""
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    batch = Batch()
    plain_sums = assert_same_as_plain_loop(config, batch, Objective.parse("kl"), chunk_rows=4)
    sums = assert_same_as_plain_loop(config, batch, OBJECTIVES["kl_by_reach"], chunk_rows=4)
    torch.testing.assert_close(sums["compared"], plain_sums["compared"], rtol=0, atol=1e-12)
    torch.testing.assert_close(plain_sums["weighted_compared"], plain_sums["compared"], rtol=0, atol=0)
    loss, weighted = sums["compared"], sums["weighted_compared"]
    assert weighted[0] == loss[0] and (weighted[1:] < 0.9 * loss[1:]).all()


def test_depth_weights_and_counts_of_a_larger_batch():
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    objective = Objective.parse({"ce": 1, "kl": 2}, depth_weights=[1.0, 0.5, 0.0])
    assert_same_as_plain_loop(config, Batch(), objective, chunk_rows=5, counts=torch.tensor([[100, 70, 9]] * 2))


def test_a_depth_without_a_valid_row_and_no_row_at_all():
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    batch = Batch()
    batch.valid[:, 1:] = False
    assert_same_as_plain_loop(config, batch, OBJECTIVES["mix"], chunk_rows=2)
    batch.valid[:] = False
    speculator = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64)
    rows, teacher = batch.arguments()
    loss, sums = speculator_loss(speculator, *rows, **teacher, loss="lk")
    assert float(loss.detach()) == 0 and not sums["pairs"].any()
    assert all(grad is not None and not grad.any() for grad in gradients(speculator, loss, batch.hidden).values())


def test_sums_are_those_of_the_drafts():
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    batch = Batch(rows=200, vocab=7)
    speculator = build_speculator(config, hidden_size=D, vocab_size=7, seed=0, dtype=torch.float64)
    _, sums = speculator_loss(speculator, batch.hidden, batch.tokens, batch.targets, batch.valid, chunk_rows=13)
    states = speculator.unroll(batch.hidden, batch.tokens)
    hits = torch.stack([(states[k] @ speculator.head(k).T).argmax(-1) == batch.targets[:, k] for k in range(K)], 1)
    alive = torch.ones(200, dtype=torch.bool)
    for k in range(K):
        reached = alive & batch.valid[:, k]
        alive = reached & hits[:, k]
        assert sums["pairs"][k] == batch.valid[:, k].sum()
        assert sums["correct"][k] == (hits[:, k] & batch.valid[:, k]).sum()
        assert sums["reached"][k] == reached.sum() and sums["accepted"][k] == alive.sum()
    assert sums["accepted"][0] > 0 and not any(total.requires_grad for total in sums.values())


def test_a_soft_capped_head_as_a_function():
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    batch, speculator = Batch(), build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64)
    rows, teacher = batch.arguments()
    capped = teacher | {"base_head": lambda states: torch.tanh(states @ batch.base_head.T / 2) * 2}
    loss, _ = speculator_loss(speculator, *rows, **capped, loss="kl")
    straight, _ = speculator_loss(speculator, *rows, **teacher, loss="kl")
    assert abs(float(loss - straight)) > 1e-3


def test_two_hundred_steps_are_those_of_the_plain_loop():
    """The same losses to 1e-8 in float64, and those that a file has kept."""
    config = SpeculatorConfig(method="sum_lstm", n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    batch, curves = Batch(rows=40), {}
    rows, teacher = batch.arguments()
    for fast in (False, True):
        speculator = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64)
        optimizer = torch.optim.AdamW(speculator.parameters(), lr=3e-3)
        curves[fast] = []
        for _ in range(200):
            if fast:
                loss, _ = speculator_loss(speculator, *rows, **teacher, loss=OBJECTIVES["mix"], chunk_rows=7)
            else:
                loss = plain(speculator, batch, OBJECTIVES["mix"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[fast].append(float(loss.detach()))
    assert curves[True] == pytest.approx(curves[False], abs=1e-8)
    assert curves[True][-1] < 0.5 * curves[True][0]
    kept = json.loads(CURVE.read_text())
    assert curves[True][:: len(curves[True]) // len(kept)] == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_half_precision_loses_no_more_than_the_plain_loop(method):
    """Gradients of bf16 parameters against float64 ones of the same numbers, in many small chunks."""
    config = SpeculatorConfig(method=method, n_predict=K, inner_dim=48, emb_dim=48, proj_dim=48)
    everything, large = [], []
    for seed in range(6):
        exact = build_speculator(config, hidden_size=D, vocab_size=V, seed=seed).to(torch.bfloat16)
        batch, wide = Batch(dtype=torch.bfloat16, rows=600), Batch(rows=600)
        for name in ("hidden", "teacher_hidden", "base_head"):
            setattr(wide, name, getattr(batch, name).double())
        double = build_speculator(config, hidden_size=D, vocab_size=V, seed=seed, dtype=torch.float64)
        double.load_state_dict({name: p.double() for name, p in exact.state_dict().items()})
        for x in (batch, wide):
            x.hidden.requires_grad_()
        truth = gradients(double, plain(double, wide, OBJECTIVES["ce"]), wide.hidden)
        loop = gradients(exact, plain(exact, batch, OBJECTIVES["ce"]), batch.hidden)
        loop = {name: grad.clone() for name, grad in loop.items()}
        rows, _ = batch.arguments()
        ours = gradients(exact, speculator_loss(exact, *rows, chunk_rows=32)[0], batch.hidden)
        assert {grad.dtype for grad in ours.values()} == {torch.bfloat16}

        def error(found, names, truth=truth):
            parts = ((found[n].double() - truth[n]).norm() ** 2 / truth[n].norm() ** 2 for n in names)
            return float(sum(parts)) ** 0.5

        everything.append(error(ours, truth) / error(loop, truth))
        tables = [name for name in truth if name.startswith(("emb", "heads"))]
        large.append(error(ours, tables) / error(loop, tables))
    # Both round alike within the unroll; what is summed over chunks is where they differ.
    assert statistics.median(everything) <= 1 and max(everything) < 1.02
    assert max(large) < 0.97


class Operations(TorchDispatchMode):
    """Counts the operations that run inside, and the tensors that each makes by shape."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        self.calls[name] += 1
        if isinstance(output, torch.Tensor):
            self.made[name, tuple(output.shape)] += 1
        return output


def operations_of(speculator, batch, objective, **options):
    """The loss, its sums, and the operations that its forward pass ran."""
    rows, teacher = batch.arguments()
    with Operations() as seen:
        loss, sums = speculator_loss(speculator, *rows, **teacher, loss=objective, **options)
    return loss, sums, seen


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_loss_without_gradients_computes_none(objective):
    """Validation: the same value and sums from the heads' products alone, without a buffer as large as a parameter."""
    config = SpeculatorConfig(method="medusa", n_predict=K, head="copy")
    speculator, batch = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64), Batch()
    batch.hidden.requires_grad_()
    expected, sums, training = operations_of(speculator, batch, objective, chunk_rows=4)
    with torch.no_grad():
        loss, found, seen = operations_of(speculator, batch, objective, chunk_rows=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, sums, rtol=0, atol=1e-12)
    chunks = -(-int(batch.valid.any(1).sum()) // 4)
    backward = 2 * chunks * K  # of each head's product: by its weight, and by its input
    products = seen.calls["mm"] + seen.calls["addmm_"]
    assert products == chunks * (K + objective.needs_teacher)
    assert training.calls["mm"] + training.calls["addmm_"] >= products + backward
    shapes = [tuple(p.shape) for p in (*speculator.parameters(), batch.hidden)]
    buffers = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty")
    assert any(training.made[name, shape] for name in buffers for shape in shapes)
    assert not any(seen.made[name, shape] for name in buffers for shape in shapes)


@pytest.mark.parametrize("pair_weights", [None, "reach"])
def test_loss_without_gradients_writes_no_block_of_them(pair_weights):
    """What cross-entropy needs of a block of logits is read, not written over: neither q nor a gradient."""
    objective, z = Objective.parse("ce", depth_weights=pair_weights), rand(9, V, seed=3)
    block, targets = z.clone(), torch.arange(9)
    found = loss_and_gradient_(block, targets, {}, objective, needs_gradient=False)
    expected = loss_and_gradient_(z.clone(), targets, {}, objective)
    assert found.gradient is None
    torch.testing.assert_close(found.ce, expected.ce, rtol=0, atol=0)
    torch.testing.assert_close(found.acceptance, expected.acceptance, rtol=0, atol=1e-15)
    assert torch.equal(block, z)


def test_fake_tensors():
    """Shapes alone: no value is read, so memory can be reckoned without memory."""
    config = SpeculatorConfig(method="sum_lstm", n_predict=K, inner_dim=64, emb_dim=64, proj_dim=64, tie_lstm_embs=True)
    with FakeTensorMode():
        speculator = build_speculator(config, hidden_size=64, vocab_size=1000, dtype=torch.bfloat16)
        hidden, tokens = torch.empty(50, 64, dtype=torch.bfloat16), torch.zeros(50, K, dtype=torch.long)
        rows = (hidden, tokens, tokens, torch.ones(50, K, dtype=torch.bool))
        loss, _ = speculator_loss(speculator, *rows, chunk_rows=16)
        loss.backward()
        assert {p.grad.dtype for p in speculator.parameters()} == {torch.bfloat16}
        assert all(p.grad.shape == p.shape for p in speculator.parameters())


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm", "medusa"])
def test_compiled_gives_the_same_for_any_number_of_rows(method):
    """One graph each for unroll and loss, where torch.compile would make one for each number of rows by default."""
    config = SpeculatorConfig(method=method, n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    assert_same_as_plain_loop(config, Batch(rows=15), OBJECTIVES["mix"], compiled=True)
    graphs = counters["stats"]["unique_graphs"]
    for rows, chunk_rows in ((25, 100), (40, 14), (14, 100)):
        assert_same_as_plain_loop(config, Batch(rows=rows), OBJECTIVES["mix"], compiled=True, chunk_rows=chunk_rows)
    assert graphs and counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("objective", ["mix", "ce_by_reach"])
def test_compiled_loss_without_gradients_has_no_backward_products(objective):
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    speculator, batch = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64), Batch()
    rows, teacher = batch.arguments()
    expected, sums = speculator_loss(speculator, *rows, **teacher, loss=OBJECTIVES[objective])
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        loss, found = speculator_loss(speculator, *rows, **teacher, loss=OBJECTIVES[objective], compiled=True)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, sums, rtol=0, atol=1e-12)
    assert not any("addmm_" in event.key for event in profile.key_averages())
    made = {event.key for event in profile.key_averages(group_by_input_shape=True)}
    assert "aten::mm" in made and "aten::index_add_" not in made


def test_the_fastest_kernel_is_taken(monkeypatch):
    """On an accelerator; which one that is, is what the measurement says."""
    speeds = {loss_and_gradient_: 2.0, kernels.liger_cross_entropy_: 1.0}
    monkeypatch.setattr(kernels, "_measure", lambda kernel, *_: speeds[kernel])
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    ce, other = Objective.parse("ce"), Objective.parse({"ce": 1, "kl": 1})
    assert kernels.choose_kernel(ce, 3, 7, "cuda", False) is kernels.liger_cross_entropy_
    assert kernels.choose_kernel(other, 3, 7, "cuda", False) is loss_and_gradient_
    assert kernels.choose_kernel(ce, 3, 7, "cpu", False) is loss_and_gradient_
    speeds[kernels.liger_cross_entropy_] = float("inf")
    assert kernels.choose_kernel(ce, 4, 7, "cuda", False) is loss_and_gradient_
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    speeds[kernels.liger_cross_entropy_] = 1.0
    assert kernels.choose_kernel(ce, 5, 7, "cuda", False) is loss_and_gradient_


def test_liger_gives_the_same():
    """Its Triton kernel, on a CPU in Triton's interpreter: TRITON_INTERPRET=1, with liger-kernel and triton there."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    pytest.importorskip("liger_kernel")
    z, targets = rand(7, 300, seed=1).float(), torch.arange(7) * 40
    objective = OBJECTIVES["ce_by_reach"]
    expected = loss_and_gradient_(z.clone(), targets, {}, objective)
    block = z.clone()
    found = kernels.liger_cross_entropy_(block, targets, {}, objective)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=1e-6)
    assert found.gradient.data_ptr() == block.data_ptr() and not found.gradient.requires_grad


@pytest.mark.parametrize(
    ("loss", "more", "message"),
    [
        (
            "kll",
            {},
            "loss=kll: kll is no loss (did you mean 'kl'?); expected one of ce, kl, tv, lk, lk_pure, or weights",
        ),
        ({"ce": -1}, {}, "model.speculator.loss.ce=-1: expected a weight ≥ 0"),
        ({"ce": "x"}, {}, "model.speculator.loss.ce=x: expected a weight ≥ 0"),
        ({"ce": 0, "kl": 0.0}, {}, "model.speculator.loss={'ce': 0, 'kl': 0.0}: all weights are 0, expected one above"),
        ({}, {}, "expected one of ce, kl, tv, lk, lk_pure"),
        ("kl", {"kl_temperature": 0}, "model.speculator.kl_temperature=0: expected a number > 0"),
        ("lk", {"lk_eta": -3}, "model.speculator.lk_eta=-3: expected a number > 0"),
        (
            "ce",
            {"depth_weights": [0, 0]},
            "model.speculator.depth_weights=[0, 0]: expected numbers ≥ 0, one of them above, or reach or gain",
        ),
    ],
)
def test_objectives_that_are_none(loss, more, message):
    with pytest.raises(UserError) as error:
        Objective.parse(loss, prefix="model.speculator.", **more)
    assert message in str(error.value)


def test_arguments_that_are_missing():
    batch = Batch()
    config = SpeculatorConfig(n_predict=K, inner_dim=24, emb_dim=24, proj_dim=24)
    speculator = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64)
    with pytest.raises(ValueError, match="teacher_hidden, teacher_rows and base_head are needed"):
        speculator_loss(speculator, *batch.arguments()[0], loss="kl")
    with pytest.raises(ValueError, match="chunk_rows=0"):
        speculator_loss(speculator, *batch.arguments()[0], chunk_rows=0)
    with pytest.raises(UserError, match="expected 3 numbers, one for each depth"):
        speculator_loss(speculator, *batch.arguments()[0], loss=Objective.parse("ce", depth_weights=[1, 1]))
