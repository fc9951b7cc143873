"""Our draft model for vLLM's V2 runner, called as that runner calls it: the drafts of our own decoder, on one worker
and on more, and what it refuses. `tests/gpu` runs it in vLLM itself."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers.vllm_workers import Workers
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.export import export_speculator
from verl_speculator.utils.settings import UserError

WIDTH, VOCAB, ROWS, DEPTHS = 16, 61, 12, 3
FAMILIES = {
    "sum_rnn": {"inner_dim": 8, "emb_dim": 8, "proj_dim": 8, "scale_input": True},
    "sum_rnn_untied": {"inner_dim": "12.10", "emb_dim": "8.12", "proj_dim": 12, "tie_weights": False},
    "sum_lstm": {"method": "sum_lstm", "inner_dim": 8, "emb_dim": 8, "proj_dim": 8, "tie_lstm_embs": True},
    "sum_lstm_untied": {"method": "sum_lstm", "inner_dim": "8.6", "emb_dim": "6.8", "proj_dim": "4.8"},
    "medusa": {"method": "medusa", "num_layers": 2},
    "medusa_shared": {"method": "medusa", "head": "shared"},
    "draft_vocabulary": {"inner_dim": 8, "emb_dim": 8, "proj_dim": 8, "draft_vocab_size": 17},
}


@pytest.fixture
def draft_model_class(monkeypatch):
    """The class, in a process that has vLLM's two collectives."""

    def load(workers: Workers):
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.distributed", workers.module())
        for name in ("draft_model", "sharding"):
            monkeypatch.delitem(sys.modules, f"verl_speculator.vllm_plugin.{name}", raising=False)
        return importlib.import_module("verl_speculator.vllm_plugin.draft_model").SpeculatorDraftModel

    yield load
    for name in ("draft_model", "sharding"):
        sys.modules.pop(f"verl_speculator.vllm_plugin.{name}", None)


def export(folder, name):
    """A speculator of random weights, nothing tied to 1 or 0, and its export."""
    config = SpeculatorConfig(**({"n_predict": DEPTHS} | FAMILIES[name]))
    size = config.draft_vocab_size
    tokens = None if size is None else [3 * i + 2 for i in range(size)]
    speculator = build_speculator(config, hidden_size=WIDTH, vocab_size=VOCAB, draft_tokens=tokens, seed=0)
    for seed, parameter in enumerate(speculator.parameters()):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    checkpoint = save_speculator(speculator, folder / "checkpoint")
    return export_speculator(read_checkpoint_info(checkpoint), "vllm", folder / "export")


def engine(directory, drafts=DEPTHS, **more):
    """vLLM's configuration of an engine, as far as the draft model reads it."""
    content = json.loads((directory / "config.json").read_text())
    draft = SimpleNamespace(model=str(directory), hf_config=SimpleNamespace(**content))
    speculation = {"draft_model_config": draft, "num_speculative_tokens": drafts, "draft_load_config": None}
    settings = {
        "use_v2_model_runner": True,
        "load_config": SimpleNamespace(load_format="auto"),
        "model_config": SimpleNamespace(get_hidden_size=lambda: WIDTH, get_vocab_size=lambda: VOCAB),
        "speculative_config": SimpleNamespace(**speculation),
        "scheduler_config": SimpleNamespace(max_num_batched_tokens=ROWS),
    }
    return SimpleNamespace(**(settings | more))


@torch.inference_mode()
def drafts_in_v2(model, hidden, tokens, last, *, names_depth):
    """[R, K] drafts and [K, R, V] logits, made as `MultiModuleMTPSpeculator` does: every row goes through every depth,
    and at each depth a request's tokens move up by one, the newest draft behind them.

    Args:
        model: the draft model.
        hidden: [T, D] the target's states of all rows.
        tokens: [T] the token after each row.
        last: [R] each request's last row; rows of a request follow each other.
        names_depth: whether `compute_logits` is told the depth, as from vLLM 0.32 on.
    """
    tokens, drafts, logits = tokens.clone(), [], []
    starts = [0, *(row + 1 for row in last[:-1])]
    for depth in range(DEPTHS):
        output, after = model(input_ids=tokens, positions=None, hidden_states=hidden, spec_step_idx=depth)
        assert after is hidden
        logits.append(model.compute_logits(output[last], **({"spec_step_idx": depth} if names_depth else {})))
        drafts.append(logits[-1].argmax(-1))
        for start, end, draft in zip(starts, last, drafts[-1], strict=True):
            tokens[start:end] = tokens[start + 1 : end + 1].clone()
            tokens[end] = draft
    return torch.stack(drafts, 1), torch.stack(logits)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_drafts_what_our_decoder_drafts(name, size, draft_model_class, tmp_path):
    directory, workers = export(tmp_path, name), Workers(size)
    kind = draft_model_class(workers)
    whole = load_speculator(directory)  # the export is a checkpoint of ours as well
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    tokens = torch.randint(VOCAB, (ROWS,), generator=generator)
    last = [2, 3, 8, ROWS - 1]

    def work(rank):
        model = kind(vllm_config=engine(directory))
        written = model.load_weights(load_file(directory / "model.safetensors").items())
        assert written == {f"speculator.{name}" for name, _ in model.speculator.named_parameters()}
        # A weight update of vLLM's expects values for every buffer of a module.
        assert {name for name, _ in model.named_buffers()} <= {"speculator.draft_tokens"}
        places = [None if tensor is None else tensor.data_ptr() for tensor in (model.carried, model.cell)]
        first = drafts_in_v2(model, hidden, tokens, last, names_depth=True)
        second = drafts_in_v2(model, hidden, tokens, last, names_depth=False)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert places == [None if tensor is None else tensor.data_ptr() for tensor in (model.carried, model.cell)]
        return *first, sum(p.numel() for p in model.parameters())

    with torch.inference_mode():
        expected = whole.draft(whole.start(hidden[last]), tokens[last], DEPTHS)
        states = whole.unroll(hidden[last], torch.cat([tokens[last, None], expected[:, :-1]], 1))
        logits = torch.stack([whole.logits(k, states[k]) for k in range(DEPTHS)])
    for drafts, seen, count in workers.run(work):
        assert torch.equal(drafts, expected)
        torch.testing.assert_close(seen, logits, rtol=1e-5, atol=1e-5)
        assert size == 1 or count < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_weights_come_in_pieces_after_the_first_time(size, draft_model_class, tmp_path):
    directory, workers = export(tmp_path, "sum_lstm_untied"), Workers(size)
    kind = draft_model_class(workers)
    weights = load_file(directory / "model.safetensors")

    def work(rank):
        model = kind(vllm_config=engine(directory))
        model.load_weights(weights.items())
        before = {name: parameter.clone() for name, parameter in model.speculator.named_parameters()}
        for name, tensor in weights.items():
            model.load_weights([(name, tensor + 1)])
        # Rows that fill up the last worker's tables are nobody's.
        used = {name: shard.stop - shard.start for name, shard in model.shards.items()}
        now = dict(model.speculator.named_parameters())
        return [torch.equal(now[name][: used.get(name)], (before[name] + 1)[: used.get(name)]) for name in now]

    assert all(map(all, workers.run(work)))


def test_vllm_looks_for_the_targets_buffers_in_it(draft_model_class, tmp_path):
    """Where the target has a `topk_indices_buffer` (DeepSeek V3.2), vLLM walks the modules of the draft's `model`."""
    directory, workers = export(tmp_path, "sum_rnn"), Workers(1)
    kind = draft_model_class(workers)
    (model,) = workers.run(lambda rank: kind(vllm_config=engine(directory)))
    assert not any(hasattr(module, "topk_indices_buffer") for _, module in model.model.named_modules())
    assert model.model.embed_tokens is model.speculator.emb[0][0]
    assert all(name.startswith("speculator.") for name, _ in model.named_parameters())


def test_what_its_weights_must_be(draft_model_class, tmp_path):
    directory, workers = export(tmp_path, "draft_vocabulary"), Workers(1)
    kind = draft_model_class(workers)
    weights = load_file(directory / "model.safetensors")

    def refusal(tensors) -> str:
        def work(rank):
            with pytest.raises(UserError) as error:
                kind(vllm_config=engine(directory)).load_weights(tensors.items())
            return str(error.value)

        (message,) = workers.run(work)
        return message

    some = {name: tensor for name, tensor in weights.items() if name not in ("proj.1.0.weight", "d2t")}
    assert refusal(some) == "the draft model's file has no proj.1.0.weight, d2t: export the speculator again"
    assert refusal(weights | {"emb.0.0.weight": torch.zeros(3, 3)}) == (
        "emb.0.0.weight is [3, 3], the speculator's is [61, 8]"
    )
    assert refusal(weights | {"lm_head": torch.zeros(1)}).startswith("lm_head: this speculator has no such tensor")


def test_what_is_refused_before_a_weight_is_read(draft_model_class, tmp_path, monkeypatch):
    directory, workers = export(tmp_path, "sum_rnn"), Workers(1)
    kind = draft_model_class(workers)

    def refusal(config) -> str:
        def work(rank):
            with pytest.raises(UserError) as error:
                kind(vllm_config=config)
            return str(error.value)

        (message,) = workers.run(work)
        assert "\n" not in message
        return message

    assert "num_speculative_tokens=2: expected 3" in refusal(engine(directory, 2))
    assert "method=mtp: SpeculatorDraftModel runs in vLLM's V2 runner alone" in refusal(
        engine(directory, use_v2_model_runner=False)
    )
    narrow = SimpleNamespace(get_hidden_size=lambda: 8, get_vocab_size=lambda: VOCAB)
    assert "width (hidden_size) 16, this base has 8" in refusal(engine(directory, model_config=narrow))
    config = engine(directory, load_config=SimpleNamespace(load_format="dummy"))
    assert "load_format=dummy: the draft model's weights would be random" in refusal(config)
    config.speculative_config.draft_load_config = SimpleNamespace(load_format="auto")
    monkeypatch.setattr("verl_speculator.vllm_plugin.compat.installed_vllm", lambda: "0.30.0")
    assert "with vLLM 0.31 or newer" in refusal(config)
    monkeypatch.setattr("verl_speculator.vllm_plugin.compat.installed_vllm", lambda: "0.31.0")
    workers.run(lambda rank: kind(vllm_config=config))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert refusal(engine(directory)) == f"{weights}: truncated, or not a file of tensors"
    weights.unlink()
    assert refusal(engine(directory)) == f"{weights}: no such file"
    content = json.loads((directory / "config.json").read_text())
    content["speculator"] |= {"method": "early_exit", "exit_layer": 0}
    (directory / "config.json").write_text(json.dumps(content))
    assert "cannot serve it: method=early_exit" in refusal(engine(directory))


def test_vllm_finds_class_and_configuration_of_an_export(tmp_path, monkeypatch):
    from importlib.metadata import entry_points

    from transformers import AutoConfig

    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (plugin,) = entry_points(group="vllm.general_plugins", name="verl_speculator")
    for _ in range(2):  # vLLM may call it again in the same process
        plugin.load()()
    assert registered == {"SpeculatorDraftModel": "verl_speculator.vllm_plugin.draft_model:SpeculatorDraftModel"}
    config = AutoConfig.from_pretrained(export(tmp_path, "sum_rnn"))
    assert (config.model_type, config.architectures) == ("mtp", list(registered))
    assert (config.num_nextn_predict_layers, config.hidden_size) == (DEPTHS, WIDTH)
    assert config.speculator["method"] == "sum_rnn"
    assert config.num_attention_heads % 8 == 0  # vLLM divides them among tensor-parallel workers
    assert pickle.loads(pickle.dumps(config)).speculator == config.speculator  # as vLLM sends it to its workers
