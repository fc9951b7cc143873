"""Traces inside vLLM: slots, blocks and groups of its paged KV cache, and modules that two models share.

`Metadata` and `Context` have the attributes of `CPUAttentionMetadata` and `ForwardContext` in vLLM 0.24.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from verl_speculator.diagnose import compare, read_trace, trace

BLOCK, WIDTH = 4, 16
NAMES = ("slot_mapping", "block_table", "seq_lens")


@dataclass
class Metadata:
    """Of one KV-cache group in one step."""

    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    max_seq_len: int


@dataclass
class Context:
    """What `get_forward_context` gives."""

    no_compile_layers: dict[str, Any]
    attn_metadata: Any
    slot_mapping: dict[str, Tensor] = field(default_factory=dict)


class Attention(nn.Module):
    """Writes its input to its slots, and gives back the mean of what its request's blocks hold."""

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name, self.sliding_window = layer_name, None
        self.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
        self.kv_cache = torch.zeros(8, BLOCK, WIDTH)

    def forward(self, query: Tensor) -> Tensor:
        given = sys.modules["vllm.forward_context"].get_forward_context().attn_metadata[self.layer_name]
        self.kv_cache.view(-1, WIDTH)[given.slot_mapping] = query
        held = self.kv_cache[given.block_table[0]].view(-1, WIDTH)[: given.max_seq_len]
        return query + held.mean(0)


class Model(nn.Module):
    """Two layers; the norm has no weights, and is one module in all models that want the same, as vLLM's rotary is."""

    def __init__(self, prefix: str, shared: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, WIDTH)
        self.rotary, self.config = shared, SimpleNamespace(vocab_size=32)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.attn = nn.ModuleList(Attention(f"{prefix}layers.{i}.attn") for i in range(2))
        self.logits = nn.Linear(WIDTH, 32)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer, attention in zip(self.layers, self.attn, strict=True):
            x = x + layer(attention(self.rotary(x)))
        return x


@pytest.fixture
def engine(monkeypatch):
    """vLLM's module, and what it holds while a step runs."""
    module = ModuleType("vllm.forward_context")
    module.context = None
    module.is_forward_context_available = lambda: module.context is not None
    module.get_forward_context = lambda: module.context
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    return module


def step(engine, model: Model, tokens: list[int], start: int, blocks: list[int], shift: int = 0) -> Tensor:
    """Run a model on tokens at positions from `start`, in these blocks, and make logits of the last state."""
    positions = torch.arange(start, start + len(tokens))
    table = torch.tensor([blocks])
    slots = table[0, positions // BLOCK] * BLOCK + positions % BLOCK + shift
    end = start + len(tokens)
    one = [Metadata(slots, table.clone(), torch.tensor([end]), end) for _ in model.attn]  # a group for each layer
    layers = {layer.layer_name: layer for layer in model.attn}
    engine.context = Context(layers, dict(zip(layers, one, strict=True)))
    try:
        return model.logits(model(torch.tensor(tokens), positions)[-1:])
    finally:
        engine.context = None


def traced(engine, path, *, blocks=(2, 5), shift=0, prefix="", target=None, **settings):
    """The trace of a prompt and one more token, after a target has read the same."""
    shared = nn.LayerNorm(WIDTH, elementwise_affine=False)
    model = Model(prefix, shared)
    with torch.no_grad(), trace(model, path, **settings):
        if target is not None:
            step(engine, target(shared), [9, 9, 9], 0, [1, 1])
        for tokens, start, off in (([5, 9, 23, 4, 7], 0, 0), ([11], 5, shift)):
            step(engine, model, tokens, start, list(blocks), off)
    return read_trace(path)


def test_trace_in_vllm_records_cache_layout_and_places(engine, tmp_path):
    found = traced(engine, tmp_path / "a")
    assert found.environment["attention"] == "CPU_ATTN"
    groups = found.caches[0]["groups"]
    assert [group["layers"] for group in groups] == [["layers.0.attn"], ["layers.1.attn"]]
    assert groups[0]["kind"] == "Attention" and groups[0]["shape"] == [8, BLOCK, WIDTH] and groups[0]["slots"] == 6
    second = next(call for call in found.calls if call.name == "attn.1" and call.index == 1)
    given = {fact.name: fact.samples.tolist() for fact in second.inputs if fact.name.startswith("cache.")}
    assert given == {"cache.slot_mapping": [21], "cache.block_table": [2, 5], "cache.seq_lens": [6]}
    assert found.tokens == (5, 9, 23, 4, 7) and len(found.top) == 5
    # States are no logits, where an engine makes those in a module of its own.
    few = traced(engine, tmp_path / "few", modules=["layers.0"])
    assert few.tokens == found.tokens and few.caches and not few.top


def test_compare_other_cache_blocks_is_same(engine, tmp_path):
    a, b = traced(engine, tmp_path / "a"), traced(engine, tmp_path / "b", blocks=(3, 1), prefix="draft_model.")
    found = compare(a, b)
    assert found.verdict.kind == "same", found.verdict


@pytest.mark.parametrize("shift", [1, -1])
def test_compare_slot_off_by_one_names_the_slot(engine, tmp_path, shift):
    a, b = traced(engine, tmp_path / "a"), traced(engine, tmp_path / "b", shift=shift)
    found = compare(a, b).verdict
    assert found.kind == "inputs" and found.module == "attn.0", found
    assert found.sentence.startswith(
        f"attn.0 (call 1) is given other places in the KV cache: slot_mapping: 21 in A and {21 + shift} in B at place 0"
    )


def test_compare_other_sequence_length_names_the_length(engine, tmp_path, monkeypatch):
    a = traced(engine, tmp_path / "a")
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda x, **k: real([7], **k) if x == [6] else real(x, **k))
    found = compare(a, traced(engine, tmp_path / "b")).verdict
    assert found.kind == "inputs", found
    assert "the KV cache that attn.0 (call 1) finds, its seq_lens: 6 in A and 7 in B at place 0" in found.sentence
    assert found.evidence[0] == "no output shows it"  # this layer takes the other number, max_seq_len


def test_compare_module_shared_with_the_target_is_left_out(engine, tmp_path):
    a = traced(engine, tmp_path / "a")
    b = traced(engine, tmp_path / "b", prefix="draft_model.", target=lambda shared: Model("", shared))
    assert [call.name for call in b.calls if not call.inside][:2] == ["rotary", "rotary"]
    found = compare(a, b)
    assert found.verdict.kind == "same" and b.tokens == a.tokens, found.verdict
    assert "left out, for something else called it too: rotary" in found.notes


def test_trace_in_vllm_micro_batches_and_missing_metadata_are_read(engine, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].layer_name = "layers.0.attn"
    one = Metadata(torch.tensor([3]), torch.tensor([[1]]), torch.tensor([1]), 1)
    for given, names in (
        (None, set()),
        ({"layers.0.attn": one}, {f"cache.{name}" for name in NAMES}),
        ({"another": one}, set()),
        (
            [{"layers.0.attn": one}] * 2,
            {f"cache.{n}.{i}" for n in ("slot_mapping", "block_table", "seq_lens") for i in "01"},
        ),
    ):
        engine.context = Context({"layers.0.attn": model[0]}, given)
        with trace(model, tmp_path / "a"):
            model(torch.ones(1, 4))
        inputs = read_trace(tmp_path / "a").calls[1].inputs
        assert {fact.name for fact in inputs if fact.name.startswith("cache.")} == names
