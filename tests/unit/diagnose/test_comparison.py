"""`compare`: planted faults are found and named, and rounding is no fault."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Cache

from helpers.buffered_moe import BufferedMoE
from helpers.planted_faults import (
    MODELS,
    TOKENS,
    FusedLayer,
    OffByOne,
    Stale,
    build,
    copied,
    greedy,
    in_another_type,
    router_of,
    run,
    with_buffers,
)
from verl_speculator.diagnose import compare, read_trace, trace
from verl_speculator.diagnose.experiments import solo_vs_pair
from verl_speculator.diagnose.trace_file import TOLERANCES

MOE = MODELS[1:]


def verdict(a, b, **settings):
    """Of two trace files."""
    return compare(read_trace(a), read_trace(b), **settings).verdict


# No false positives


@pytest.mark.parametrize("name", MODELS)
def test_compare_same_run_twice_is_same(name, tmp_path):
    model = build(name)
    found = verdict(run(model, tmp_path / "a"), run(copy.deepcopy(model), tmp_path / "b"))
    assert (found.kind, found.sentence) == ("same", "The runs are the same, bit for bit.")


@pytest.mark.parametrize("name", MODELS)
def test_compare_one_thread_and_two_agrees(name, tmp_path):
    model = build(name, hidden_size=256, intermediate_size=512)
    tokens = torch.randint(330, (1, 100), generator=torch.Generator().manual_seed(0))
    run(model, tmp_path / "a", tokens=tokens)
    torch.set_num_threads(2)
    try:
        run(model, tmp_path / "b", tokens=tokens)
    finally:
        torch.set_num_threads(1)
    assert compare(read_trace(tmp_path / "a"), read_trace(tmp_path / "b")).agrees


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_compare_float32_and_bfloat16_is_accumulation(name, seed, tmp_path):
    model = build(name, num_hidden_layers=4)
    tokens = torch.randint(330, (1, 12), generator=torch.Generator().manual_seed(seed))
    run(model, tmp_path / "a", tokens=tokens)
    found = verdict(tmp_path / "a", run(model.bfloat16(), tmp_path / "b", tokens=tokens))
    assert found.kind == "accumulation", found
    assert found.sentence.startswith("Accumulation, no divergence: rounding alone, up to ")
    assert f"tolerance {TOLERANCES['bfloat16']:g}" in found.sentence and "-fold a layer" in found.sentence


class Amplify(nn.Module):
    """Multiplies the difference of its input from 1."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return 1 + self.factor * (x - 1)


@pytest.mark.parametrize(("factor", "kind"), [(5.0, "drift"), (50.0, "module")])
def test_compare_amplified_difference_is_a_jump_above_tenfold(factor, kind, tmp_path):
    """Both cross the tolerance in the same module: only the ratio to the difference of the inputs tells them apart."""
    model, noise = Amplify(factor), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for file, scale in (("a", 0.0), ("b", 1e-5)):
        with trace(model, tmp_path / file):
            model(1 + scale * noise)
    assert verdict(tmp_path / "a", tmp_path / "b", tolerance=3e-5).kind == kind


# Planted faults


def both_runs(model, other, folder, **settings):
    """The verdict on a good model and one with a fault."""
    return verdict(run(model, folder / "a", **settings), run(other, folder / "b", **settings))


@pytest.mark.parametrize("name", MODELS)
def test_compare_changed_weight_names_the_weight(name, tmp_path):
    model = build(name)
    other = copy.deepcopy(model)
    mlp = other.model.layers[1].mlp
    if name == "llama":
        mlp.down_proj.weight[3, 4] += 2.0
        weight = "model.layers.1.mlp.down_proj.weight"
    else:
        mlp.experts.down_proj[2] += 0.5
        weight = "model.layers.1.mlp.experts.down_proj"
    found = both_runs(model, other, tmp_path)
    assert found.kind == "weights" and found.sentence.startswith(f"Weights differ: {weight};"), found


@pytest.mark.parametrize("name", MOE)
def test_compare_stale_router_names_the_router(name, tmp_path):
    model = build(name)
    other = copy.deepcopy(model)
    for one, stale in ((model, False), (other, True)):
        _, router = router_of(one, 1)
        setattr(one.model.layers[1].mlp, "router" if name == "gpt_oss" else "gate", Stale(router, stale))
    where, _ = router_of(model, 1)
    for one, file in ((model, "a"), (other, "b")):
        with trace(one, tmp_path / file), torch.no_grad():
            one(input_ids=TOKENS)
            one(input_ids=TOKENS.flip(1))
    found = verdict(tmp_path / "a", tmp_path / "b")
    assert found.kind == "module" and found.sentence.startswith(f"{where} (call 1) is the first module"), found
    assert any("in B its output.0 is bit for bit that of its call 0: stale state" in line for line in found.evidence)


@pytest.mark.parametrize("name", MODELS)
def test_compare_fused_norm_without_residual_names_the_norm(name, tmp_path):
    model = build(name)
    other = copy.deepcopy(model)
    for one, drops in ((model, False), (other, True)):
        for i, layer in enumerate(one.model.layers):
            one.model.layers[i] = FusedLayer(layer, drops and i == 1)
    found = both_runs(model, other, tmp_path)
    assert found.kind == "module"
    assert found.sentence.startswith("model.layers.1.post_attention_layernorm (call 0) is the first module"), found


@pytest.mark.parametrize("name", MODELS)
def test_compare_layer_without_residual_names_the_place_between_its_calls(name, tmp_path):
    model = build(name)
    other = copy.deepcopy(model)
    layer = other.model.layers[1]
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(module, "given", kwargs["hidden_states"]), with_kwargs=True
    )
    layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0] - layer.given,))
    layer.register_forward_pre_hook(lambda module, args, kwargs: setattr(module, "given", args[0]), with_kwargs=True)
    found = both_runs(model, other, tmp_path)
    assert found.kind == "between" and found.module == "model.layers.1", found
    assert "between model.layers.1.self_attn and model.layers.1.post_attention_layernorm" in found.sentence


@pytest.mark.parametrize("name", MODELS)
def test_compare_cache_slot_off_by_one_names_the_attention(name, tmp_path):
    model = build(name)
    run(model, tmp_path / "a", cache=Cache(layer_class_to_replicate=type(OffByOne.__name__, (OffByOne.__base__,), {})))
    run(model, tmp_path / "b", cache=Cache(layer_class_to_replicate=OffByOne))
    found = verdict(tmp_path / "a", tmp_path / "b")
    assert found.module == "model.layers.0.self_attn" and "(call 0)" in found.sentence, found
    assert any(line.startswith("cache.keys:") for line in found.evidence)


@pytest.mark.parametrize("name", MODELS)
def test_compare_other_cache_at_the_start_names_the_inputs(name, tmp_path):
    model = build(name)
    caches = []
    for tokens in (TOKENS, TOKENS.flip(1)):
        cache = Cache(layer_class_to_replicate=OffByOne.__base__)
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache)
        caches.append(cache)
    for cache, file in zip(caches, "ab", strict=True):
        run(model, tmp_path / file, cache=cache)
    found = verdict(tmp_path / "a", tmp_path / "b")
    assert found.kind == "inputs", found
    assert found.sentence.startswith(
        "The inputs already differ at the start: the KV cache that model.layers.0.self_attn"
    )


@pytest.mark.parametrize("name", MODELS)
def test_compare_wrong_positions_names_the_positions(name, tmp_path):
    model = build(name)
    right = (torch.arange(8)[None], torch.tensor([[8]]))
    wrong = (torch.arange(8)[None], torch.tensor([[9]]))
    run(model, tmp_path / "a", positions=right)
    run(model, tmp_path / "b", positions=wrong)
    run(model, tmp_path / "c")
    found = verdict(tmp_path / "a", tmp_path / "b")
    assert found.kind == "inputs" and "the positions of the model" in found.sentence, found
    assert "8 in A and 9 in B at place 0" in found.sentence
    # Where one run is told the positions and the other finds them itself, the first to be given them tells.
    found = verdict(tmp_path / "c", tmp_path / "b")
    assert found.kind == "between" and "other positions, position_ids: 8 in A and 9 in B" in found.sentence, found
    assert any("in B alone: position_ids" in line for line in found.evidence)
    assert verdict(tmp_path / "a", tmp_path / "c").kind == "same"


@pytest.mark.parametrize("name", MODELS)
def test_compare_other_tokens_names_the_tokens(name, tmp_path):
    model, tokens = build(name), TOKENS.clone()
    tokens[0, 2] = 24
    found = verdict(run(model, tmp_path / "a"), run(model, tmp_path / "b", tokens=tokens))
    assert found.kind == "inputs"
    assert "the tokens of the model" in found.sentence and "23 in A and 24 in B at place 2" in found.sentence


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compare_layer_in_another_type_names_both_types(name, dtype, tmp_path):
    model = build(name)
    other = copy.deepcopy(model)
    if name != "llama" and dtype == torch.float64:
        other.set_experts_implementation("eager")
        model.set_experts_implementation("eager")
    in_another_type(other.model.layers[1].mlp, dtype)
    found = both_runs(model, other, tmp_path)
    kind = str(dtype).removeprefix("torch.")
    assert found.kind == "type"
    assert found.sentence.startswith(f"model.layers.1.mlp runs in another type: float32 in A, {kind} in B"), found


# Modules that only one run has


@pytest.mark.parametrize("name", MODELS)
def test_compare_draft_inside_a_larger_model_is_found(name, tmp_path):
    draft, target = build(name), build(name, num_hidden_layers=5)
    pair = nn.ModuleDict({"target": target, "draft": nn.Sequential(copy.deepcopy(draft))})
    bad = copy.deepcopy(pair)
    bad["draft"][0].model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2
    )
    with torch.no_grad():
        with trace(draft, tmp_path / "alone"):
            draft(input_ids=TOKENS)
        for one, file in ((pair, "good"), (bad, "bad")):
            with trace(one, tmp_path / file):
                one["target"](input_ids=TOKENS.flip(1))
                one["draft"][0](input_ids=TOKENS)
    assert verdict(tmp_path / "alone", tmp_path / "good").kind == "same"
    found = verdict(tmp_path / "alone", tmp_path / "bad")
    assert found.kind == "module" and found.module == "model.layers.1.mlp", found
    found = verdict(tmp_path / "alone", tmp_path / "bad", under=("", "target"))
    assert found.kind == "inputs"


def test_compare_wrapped_modules_are_matched(tmp_path):
    model = build("llama")
    other = copy.deepcopy(model)
    for i, layer in enumerate(other.model.layers):
        wrapped = nn.Module()
        wrapped._orig_mod, wrapped.forward = layer, layer.forward
        other.model.layers[i] = wrapped
    run(model, tmp_path / "a")
    found = compare(read_trace(tmp_path / "a"), read_trace(run(other, tmp_path / "b")))
    assert found.agrees and {p.name for p in found.traces.calls} >= {"model.layers.1.mlp.up_proj", "model.layers.0"}


# Memory that is overwritten


def test_solo_vs_pair_overwritten_expert_buffer_names_the_mlp(tmp_path):
    BufferedMoE.buffers.clear()
    draft = with_buffers(build("llama"), experts=4, seed=0)
    twin = copied(draft)
    target = with_buffers(build("llama", hidden_size=64, num_hidden_layers=3), experts=8, seed=100)
    found = solo_vs_pair(
        draft,
        lambda: greedy(draft, TOKENS, 4),
        {"its own weights": lambda: greedy(twin, TOKENS, 1), "the target": lambda: greedy(target, TOKENS, 1)},
        tmp_path,
    )
    assert found.comparisons["its own weights"].verdict.kind == "same"
    seen = found.comparisons["the target"].verdict
    assert seen.kind == "module" and seen.module == "model.layers.0.mlp", seen
    assert "its 2 weights are the same" in seen.evidence
    assert found.verdict.startswith("After the target has run the draft is not the same; after its own weights it is. ")
    assert "model.layers.0.mlp (call 0) is the first module whose inputs and weights agree" in found.verdict
    assert found.tokens["alone"] == found.tokens["its own weights"] != found.tokens["the target"]


def test_compare_weight_overwritten_during_the_run_names_it(tmp_path):
    model = build("llama")
    norm = model.model.layers[1].input_layernorm
    run(model, tmp_path / "a")

    def overwrite(*_):
        norm.weight.mul_(1.5)

    model.model.layers[0].register_forward_hook(overwrite)
    found = verdict(tmp_path / "a", run(model, tmp_path / "b"))
    name = "model.layers.1.input_layernorm"
    assert found.kind == "weights"
    assert found.sentence.startswith(f"Weights were overwritten while run B was under way: {name}.weight; {name}"), (
        found
    )
