"""A speculator that uses or starts from the base model's embedding and LM head."""

from __future__ import annotations

import pytest
import torch

from helpers.drafters import alone, every_other, load_base, states_of
from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, weights
from helpers.family_variants import Tables, build_attached, configurations
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.config.schema import SpeculatorSettings
from verl_speculator.data.alignment import align
from verl_speculator.decoding import speculative_generate
from verl_speculator.interop.export import export_speculator
from verl_speculator.training.checkpointing import gather_speculator, write_speculator
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.compat import check_served

D, V = 20, 61
SHARING = {n: config for n, config in configurations().items() if config.base_tables and not config.reads_sequence}
PROMPT = [3, 17, 29, 4, 55]
BOTH = {"embedding": "base_frozen", "head": "base_frozen"}


def logits(speculator, hidden, tokens):
    states = speculator.unroll(hidden, tokens)
    return torch.stack([speculator.logits(k, state) for k, state in enumerate(states)])


def rows(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, D, generator=generator, dtype=dtype)
    return hidden, torch.randint(V, (7, count), generator=generator)


@pytest.fixture
def tables(monkeypatch):
    """A base model of two tables, wherever an export loads one."""
    monkeypatch.setattr("verl_speculator.interop.export.load_base", lambda *_, **__: Tables(V, D, torch.float64))
    monkeypatch.setattr("verl_speculator.checkpoint.format.base_shape", lambda base: (D, V))
    monkeypatch.setattr("verl_speculator.checkpoint.format.weights_fingerprint", lambda *_: None)


@pytest.mark.parametrize("config", SHARING.values(), ids=SHARING.keys())
def test_an_export_with_tables_of_its_own_computes_the_same(config, tmp_path, tables):
    """The base model's tables and the projections become one weight each."""
    speculator = build_attached(config, D, V, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_speculator(speculator, tmp_path / "spec")
    info = read_checkpoint_info(tmp_path / "spec")
    if config.frozen_tables:
        with pytest.raises(UserError, match=r"writes the base model's weights out; expected --base, the directory"):
            export_speculator(info, "safetensors", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export_speculator(info, "safetensors", tmp_path / "out", base="a base")
    exported = load_speculator(tmp_path / "out")
    assert not exported.config.base_tables and exported.config.n_predict == config.n_predict
    found, expected = (logits(s, *rows(config.n_predict)) for s in (exported, speculator))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_arctic_gets_the_tables_written_out(tmp_path, tables):
    config = SpeculatorConfig(n_predict=3, inner_dim=24, emb_dim=24, proj_dim=24, **BOTH)
    save_speculator(build_attached(config, D, V, seed=0), tmp_path / "spec", base_architectures=["LlamaForCausalLM"])
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), "arctic", tmp_path / "out", base="a base")
    tensors = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert tensors["emb.0.0.weight"].shape == tensors["head.2.weight"].shape == (V, 24)


def test_vllm_is_told_to_export_first(tmp_path):
    config = SpeculatorConfig(n_predict=3, inner_dim=24, emb_dim=24, proj_dim=24, head="base_frozen")
    save_speculator(build_attached(config, D, V), tmp_path)
    with pytest.raises(UserError, match=r"head=base_frozen: vLLM gives drafters no weights .* --format safetensors"):
        check_served(read_checkpoint_info(tmp_path), 3)


@pytest.mark.parametrize("draft_vocab_size", [None, 90])
@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
def test_greedy_text_is_the_base_models(bases, name, method, draft_vocab_size, tmp_path):
    """With the tables of the base model that it decodes with, which it does not copy."""
    model = load_base(bases[name])
    vocab, width = model.get_output_embeddings().weight.shape
    config = SpeculatorConfig(
        method, 3, draft_vocab_size, inner_dim=16, emb_dim=16, proj_dim=16, tie_lstm_embs=True, **BOTH
    )
    shape = {"hidden_size": width, "vocab_size": vocab, "draft_tokens": every_other(draft_vocab_size)}
    save_speculator(build_speculator(config, **shape, seed=0, dtype=torch.float64), tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert not {"head.0.weight", "emb.0.0.weight", "forget_emb.0.weight"} & set(tensors)
    speculator = load_speculator(tmp_path)
    result = speculative_generate(model, speculator, PROMPT, max_new_tokens=30, eos_token_id=())
    assert result.tokens == alone(model, PROMPT, 30, eos_token_id=None)
    embedding = dict(speculator.named_buffers())["emb.0.0.weight" if method == "sum_rnn" else "emb.first.weight"]
    assert embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    head, weight = speculator.head(0), model.get_output_embeddings().weight
    assert torch.equal(head, weight if draft_vocab_size is None else weight[1 : 2 * draft_vocab_size : 2])


def test_tables_are_taken_again_when_the_base_has_changed(bases):
    model = load_base(bases["qwen2_untied"])
    vocab, width = model.get_output_embeddings().weight.shape
    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16, draft_vocab_size=50, **BOTH)
    shape = {"hidden_size": width, "vocab_size": vocab, "draft_tokens": every_other(50)}
    speculator = build_speculator(config, **shape, seed=0, dtype=torch.float64)
    speculator.attach(model)
    first = speculator.head(0)
    speculator.attach(model)
    assert speculator.head(0) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    speculator.attach(model)
    torch.testing.assert_close(speculator.head(0), 2 * first)
    with torch.no_grad():
        model.lm_head.weight.div_(2.0)


def test_a_speculator_without_its_base_says_so():
    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16, **BOTH)
    speculator = build_speculator(config, hidden_size=D, vocab_size=V, seed=0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the embedding is the base model's: call speculator.attach\(base\)"):
        speculator.unroll(*rows(2))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
@pytest.mark.parametrize("joint", [False, True])
def test_training_uses_the_tables_that_the_base_has_now(bases, rows, name, joint, gloo, tmp_path):
    """The loss and every gradient are those of a trained copy of the same tables, which alone differ in what learns."""
    settings = {"method": "sum_lstm", "tie_lstm_embs": True, "inner_dim": 16, "loss": {"ce": 1.0, "kl": 1.0}}
    found = {}
    for source in ("base", "base_frozen"):
        speculator = settings | {"embedding": source, "head": source}
        engine = build_engine(bases[name], speculator=speculator, freeze_base_model=not joint, lr=1e-2)
        if found:  # the same random numbers in the rest
            others = dict(found["base"][-1].speculator.named_parameters())
            for key, parameter in engine.speculator.named_parameters():
                parameter.detach().to_local().copy_(others[key].detach().to_local())
        output = run_batch(engine, make_batch(rows))
        found[source] = output["loss"], gradients(engine), weights(engine), engine
    (loss, learned, start, _), (frozen_loss, frozen_learned, _, engine) = found.values()
    assert sum(frozen_loss) == pytest.approx(sum(loss), rel=1e-6)
    embedding = start["base.model.embed_tokens.weight"]
    head = embedding if name == "qwen2_tied" else start["base.lm_head.weight"]
    assert torch.equal(start["draft.speculator.emb.first.weight"], embedding)
    assert torch.equal(start["draft.speculator.heads.0.weight"], head)
    tables = {"draft.speculator.emb.first.weight", "draft.speculator.heads.0.weight"}
    assert tables <= set(learned) and set(frozen_learned) == set(learned) - tables
    for key, gradient in frozen_learned.items():
        scale = learned[key].abs().max()
        assert (gradient - learned[key]).abs().max() <= 1e-5 * scale, key
    engine.optimizer_step()
    run_batch(engine, make_batch(rows))  # with joint training the tables have moved
    state = gather_speculator(engine)
    write_speculator(engine, tmp_path, state, {})
    keys = set(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    assert not any(key.endswith("emb.0.weight") or key == "head.0.weight" for key in keys)
    assert "head.0.projection.weight" in keys


def test_a_batch_after_a_step_of_the_base_reads_the_new_tables(bases, rows, gloo):
    """Joint training: with tables that stayed behind, the loss would be another one."""
    speculator = {"loss": "ce"} | BOTH
    engine = build_engine(bases["qwen2_untied"], speculator=speculator, freeze_base_model=False, lr=3e-2)
    run_batch(engine, make_batch(rows))
    engine.optimizer_step()
    loss = sum(run_batch(engine, make_batch(rows), train=False)["metrics"]["draft_sums"][0])
    state, base = gather_speculator(engine), weights(engine)
    config, vocab = engine.speculator.config, engine.speculator.vocab_size
    own = build_speculator(config, hidden_size=32, vocab_size=vocab, seed=0)
    own.load_state_dict(state)
    model = load_base(bases["qwen2_untied"], torch.float32)
    model.load_state_dict({k.removeprefix("base."): v for k, v in base.items() if k.startswith("base.")})
    own.attach(model)
    expected = 0.0
    for row in rows:
        ids = row["input_ids"]
        aligned = align(ids, row["loss_mask"], torch.tensor([0, len(ids)]), 3, engine.model_config.end_token_ids)
        states = own.unroll(states_of(model, ids.tolist())[aligned.positions], aligned.tokens)
        for k, state in enumerate(states):
            losses = torch.nn.functional.cross_entropy(own.logits(k, state), aligned.targets[k], reduction="none")
            expected += float(losses[aligned.valid[k]].sum().detach())
    assert loss == pytest.approx(expected, rel=1e-4)
    load_base.cache_clear()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embedding": "theirs"}, "embedding=theirs: expected one of own, base, base_frozen, with {}method=sum_rnn"),
        ({"head": "copy"}, "head=copy: expected one of own, base, base_frozen, with {}method=sum_rnn"),
        (
            {"method": "medusa", "head": "base"},
            "head=base: expected one of copy, shared, frozen_shared, with {}method=medusa",
        ),
        ({"head": "base", "tie_weights": False}, "head=base: one table for all depths; expected {}tie_weights=true"),
        (
            {"method": "sum_lstm", "embedding": "base"},
            "embedding=base: one table for all gates; expected {}tie_lstm_embs=true",
        ),
        (
            {"embedding": "base_frozen", "init": "random"},
            "init=random: {}embedding=base_frozen starts as the base model's; expected init=null",
        ),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(UserError) as error:
        SpeculatorSettings.parse(settings)
    assert str(error.value) == "model.speculator." + words.format("model.speculator.")


def test_settings_at_their_defaults_stay_out_of_config_json():
    assert not {"embedding", "head"} & set(SpeculatorConfig().to_dict())
    config = SpeculatorConfig(embedding="base", head="base_frozen")
    assert {"embedding": "base", "head": "base_frozen"}.items() <= config.to_dict().items()
    settings = SpeculatorSettings.parse(BOTH)
    assert settings.training.init is None and SpeculatorSettings.parse(settings.to_dict()) == settings


def test_a_base_of_another_vocabulary_is_refused(bases, tmp_path):
    """A base model whose vocabulary was resized has other tables."""
    model = load_base(bases["qwen2_untied"], torch.float32)
    vocab, width = model.get_output_embeddings().weight.shape
    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16, **BOTH)
    save_speculator(build_speculator(config, hidden_size=width, vocab_size=vocab + 8, seed=0), tmp_path)
    with pytest.raises(
        UserError, match=rf"trained for a base of vocabulary \(vocab_size\) {vocab + 8}, this base has {vocab}"
    ):
        load_speculator(tmp_path, base=model)
