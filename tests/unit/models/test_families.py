"""The contract that every family keeps: one suite over every row of the table."""

from __future__ import annotations

import pytest
import torch

from helpers.family_variants import VARIANTS, as_documents, build_attached, configurations, unrolled
from verl_speculator import SpeculatorConfig, load_speculator, save_speculator
from verl_speculator.config.families import FAMILIES
from verl_speculator.decoding.target import RollbackLayer
from verl_speculator.losses import DraftLoss
from verl_speculator.models import family_class
from verl_speculator.utils.settings import UserError

D, V, T = 20, 61, 7
CONFIGS = configurations()


def build(config, **options):
    return build_attached(config, D, V, **({"seed": 0, "dtype": torch.float64} | options))


@torch.no_grad()
def perturb(speculator):
    """Move the parameters off their constants: some have no gradient while others are still zero."""
    for parameter in speculator.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn_like(parameter))
    return speculator


def inputs(config, rows=T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    width = 3 * D if config.reads_sequence else D
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(V, (rows, config.depths), generator=generator)


def test_families_are_all_in_the_suite():
    assert set(VARIANTS) == set(FAMILIES)
    assert all(family_class(method).method == method for method in FAMILIES)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def test_family_shapes(config):
    speculator = build(config)
    states = unrolled(speculator, *inputs(config))
    width = D if config.reads_sequence or speculator.keeps_head_scale or config.head != "own" else config.inner_dims[-1]
    assert states.shape == (config.depths, T, width)
    for k in range(config.depths):
        assert speculator.head(k).shape == (config.draft_vocab_size or V, width)


def test_family_unroll_equals_repeated_step(config):
    speculator, (hidden, tokens) = build(config), inputs(config)
    states = unrolled(speculator, hidden, tokens)
    for row in range(T):
        caches = [RollbackLayer() for _ in range(speculator.cache_layers)]
        state = speculator.begin(hidden[row : row + 1], tokens[row, :1], caches)
        for k in range(config.depths):
            state = speculator.step(state, tokens[row, k : k + 1])
            torch.testing.assert_close(state.output[0], states[k, row], rtol=0, atol=1e-12)


def test_family_rows_are_independent(config):
    speculator, (hidden, tokens) = build(config), inputs(config)
    together = unrolled(speculator, hidden, tokens)
    apart = torch.cat([unrolled(speculator, hidden[i : i + 1], tokens[i : i + 1]) for i in range(T)], 1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_family_depth_reads_no_later_token(config):
    speculator, (hidden, tokens) = build(config), inputs(config)
    before = unrolled(speculator, hidden, tokens)
    for k in range(config.depths):
        changed = tokens.clone()
        changed[:, k] = (changed[:, k] + 1) % V
        after = unrolled(speculator, hidden, changed)
        assert torch.equal(after[:k], before[:k])
        assert torch.equal(after[k], before[k]) != speculator.reads_tokens


def test_family_every_parameter_gets_a_gradient(config):
    loss = DraftLoss(perturb(build(config)))
    hidden, tokens = inputs(config)
    targets = torch.randint(V, (config.depths, T))
    hidden, batch = as_documents(hidden, tokens) if config.reads_sequence else (hidden, None)
    loss(hidden, tokens, targets, torch.ones_like(targets, dtype=torch.bool), batch=batch)["total"].backward()
    grads = {name: p.grad for name, p in loss.speculator.named_parameters()}
    # A block of the base is trained through the base's own pass: tests/unit/models/test_early_exit.py.
    elsewhere = set(grads) - set(loss.speculator.unroll_parameters()) if config.method == "early_exit" else set()
    assert all(name.startswith("block.") for name in elsewhere)
    frozen = loss.speculator.frozen() | elsewhere
    assert {name for name, grad in grads.items() if grad is None} == frozen
    slots = loss.speculator.checkpoint_slots().items()
    without = {key for key, slot in slots if slot.parameter not in frozen and not slot.of(grads).any()}
    # sum_lstm: at the first step the forget gate multiplies an empty cell.
    idle = {key for key in without if config.method == "sum_lstm" and key.startswith("forget_")}
    assert without == idle
    assert not idle or config.n_predict == 1 or all(key.startswith("forget_proj.0") for key in idle)


def test_family_no_rows_give_zero_gradients(config):
    loss = DraftLoss(build(config))
    hidden, tokens = inputs(config, rows=0)
    nothing = torch.zeros(config.depths, 0, dtype=torch.long)
    batch = None
    if config.reads_sequence:  # tokens, of which none is drafted after
        hidden, batch = as_documents(*inputs(config))
        batch = batch._replace(rows=batch.rows[:0])
    output = loss(hidden, tokens, nothing, nothing.bool(), batch=batch)
    output["total"].backward()
    assert not output["sums"].any()
    parameters = loss.speculator.parameters() if batch else loss.speculator.unroll_parameters().values()
    assert all(p.grad is not None and not p.grad.any() for p in parameters if p.requires_grad)


def test_family_reset_parameters_is_seeded_with_the_right_spread(config):
    speculator = build(config, dtype=torch.float32)
    again, other = build(config, dtype=torch.float32), build(config, dtype=torch.float32, seed=1)
    for name, parameter in speculator.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    for slot in speculator.checkpoint_slots().values():
        tensor = slot.of(dict(speculator.named_parameters()))
        if slot.parameter.startswith("block."):
            continue
        if (value := speculator.constants().get(slot.parameter)) is None:
            assert tensor.std().item() == pytest.approx(1 / min(tensor.shape) ** 0.5, rel=0.2)
            assert not torch.equal(tensor, slot.of(dict(other.named_parameters())))
        else:
            assert torch.equal(tensor, torch.full_like(tensor, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_family_save_and_load_are_bitwise(config, dtype, tmp_path):
    speculator = build(config, dtype=dtype)
    save_speculator(speculator, tmp_path / "spec")
    loaded = load_speculator(tmp_path / "spec")
    assert loaded.config == config
    for name, parameter in speculator.named_parameters():
        assert parameter.dtype == loaded.get_parameter(name).dtype == dtype
        assert torch.equal(parameter, loaded.get_parameter(name))


def test_family_checkpoint_holds_tied_tensors_under_every_name(config, tmp_path):
    save_speculator(build(config), tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    if config.method == "medusa":  # vLLM takes one shared head under the first one's name
        heads = config.n_predict if config.head == "copy" else 1
        assert {n for n in tensors if n.startswith("lm_heads.")} == {f"lm_heads.{k}.weight" for k in range(heads)}
        return
    if config.method == "early_exit":
        assert {n for n in tensors if "head" in n} == {"exit_head.weight"}
        return
    if config.method == "eagle3":
        kept = {n for n in ("lm_head.weight", "embed_tokens.weight") if n in tensors}
        tables = {"lm_head.weight": config.head, "embed_tokens.weight": config.embedding}
        assert kept == {n for n, source in tables.items() if source != "base_frozen"}
        return
    if config.head == "base_frozen":
        assert not {f"head.{k}.weight" for k in range(config.n_predict)} & set(tensors)
        has_projection = config.inner_dims[-1] != D
        assert {n for n in tensors if n.startswith("head.")} == {
            f"head.{k}.projection.weight" for k in range(config.n_predict) if has_projection
        }
    else:
        heads = [tensors[f"head.{k}.weight"] for k in range(config.n_predict)]
        assert not config.tie_weights or all(torch.equal(head, heads[0]) for head in heads)
    if config.tie_lstm_embs and config.embedding != "base_frozen":
        assert sum(name.endswith("_emb.0.weight") or name.endswith("_emb.0.0.weight") for name in tensors) == 4


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "tied"])
def test_family_load_wrong_key_set_is_refused_by_name(config, fault, tmp_path):
    save_speculator(build(config), tmp_path)
    file = tmp_path / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    key = sorted(tensors)[-1]
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        key = "head.99.weight"
        tensors[key] = torch.zeros(1)
    elif fault == "shape":
        tensors[key] = tensors[key][:-1]
    else:
        key = f"head.{config.n_predict - 1}.weight"
        if (
            config.method in ("medusa", "early_exit", "eagle3")
            or not config.tie_weights
            or key not in tensors
            or key == "head.0.weight"
        ):
            pytest.skip("nothing is tied here")
        tensors[key] = tensors[key] + 1
    torch.save(tensors, file)
    with pytest.raises(UserError) as error:
        load_speculator(tmp_path)
    assert key in str(error.value)


def test_family_is_untrained_until_the_first_optimizer_step(config):
    """Also in bf16, where small steps leave a norm's weight at 1, but not its bias at 0."""
    if config.method == "early_exit":  # all that learns starts as the base's: nothing tells
        assert not build(config).is_untrained()
        return
    for dtype in (torch.float64, torch.bfloat16):
        speculator = build(config, seed=4, dtype=dtype)
        assert speculator.is_untrained()
        hidden, tokens = inputs(config)
        trained = [p for p in speculator.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2 if config.method == "eagle3" else 1e-5)
        unrolled(speculator, hidden.to(dtype), tokens).float().pow(2).sum().backward()
        optimizer.step()
        assert not speculator.is_untrained()


@pytest.mark.parametrize("tied", [True, False])
def test_sum_lstm_gates_share_one_product_and_one_lookup(tied):
    config = SpeculatorConfig(method="sum_lstm", n_predict=3, inner_dim=8, emb_dim=8, proj_dim=8, tie_lstm_embs=tied)
    speculator = build(config)
    with torch.profiler.profile() as profile:
        speculator.step(speculator.start(inputs(config)[0]), inputs(config)[1][:, 0])
    calls = {event.key: event.count for event in profile.key_averages()}
    assert (calls["aten::linear"], calls["aten::embedding"]) == (1, 1)
