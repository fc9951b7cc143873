"""Exports: exactly what each engine's contract lists, the training's logits, and refusals that say what to train."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from helpers import engine_format_readers as readings
from helpers.family_variants import configurations, shape_of
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.__main__ import app
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.engine_formats import FORMATS, arctic_mlp_unsupported_reason, contract_faults
from verl_speculator.interop.export import export_speculator, model_card
from verl_speculator.utils.settings import UserError

D, V = 20, 61
READERS = {"arctic": readings.arctic, "arctic-mlp": readings.arctic_mlp, "vllm-medusa": readings.vllm_medusa}
# Of those that use the base model's tables the exports are in tests/unit/models/test_base_tables.py.
OWN_TABLES = {name: config for name, config in configurations().items() if not config.base_tables}
CONFIGURATIONS = OWN_TABLES | {
    "lstm_for_arctic": SpeculatorConfig(
        method="sum_lstm", n_predict=3, inner_dim=16, emb_dim=16, proj_dim=16, tie_lstm_embs=True, scale_input=True
    ),
    "medusa_two_blocks": SpeculatorConfig(method="medusa", n_predict=3, num_layers=2),
    "medusa_shared": SpeculatorConfig(method="medusa", n_predict=3, head="frozen_shared"),
}
PROVENANCE = {
    "base": {"name": "some/base", "weights_fingerprint": "abc"},
    "data": {"train_files": ["/secret/place/chats.parquet"], "train_rows": 1234},
    "training": {"step": 7, "lr": 1e-3, "loss": {"ce": 1.0}, "seed": 1},
    "versions": {"torch": "2.13.0"},
}


def checkpoint(config, folder, dtype=torch.float64, **settings):
    """Every parameter drawn anew, so that no two are alike by accident."""
    speculator = build_speculator(config, **shape_of(config, D, V), seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    settings = {"base_architectures": ["Qwen2ForCausalLM"], "provenance": PROVENANCE} | settings
    save_speculator(speculator, folder, **settings)
    return speculator.requires_grad_(False)


def rows(count):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, D, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(V, (7, count), generator=generator)


def logits(speculator, hidden, tokens):
    states = speculator.unroll(hidden, tokens)
    return torch.stack([speculator.logits(k, states[k]) for k in range(speculator.n_predict)])


ALL = [(name, one) for name in READERS for one in CONFIGURATIONS]
REFUSED = [(name, one) for name, one in ALL if FORMATS[name].unsupported_reason(CONFIGURATIONS[one])]
PAIRS = [pair for pair in ALL if pair not in REFUSED]


@pytest.mark.parametrize(("name", "one"), PAIRS)
def test_an_export_gives_the_training_logits(name, one, tmp_path):
    speculator = checkpoint(CONFIGURATIONS[one], tmp_path / "spec")
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), name, tmp_path / "out")
    hidden, tokens = rows(speculator.n_predict)
    torch.testing.assert_close(READERS[name](out, hidden, tokens), logits(speculator, hidden, tokens))
    assert {entry.name for entry in out.iterdir()} == {"config.json", FORMATS[name].weights_file}


def test_export_of_soft_capped_medusa_heads_keeps_tensors_and_cap(tmp_path):
    """vLLM drafts Medusa's most likely tokens, which a cap never changes, and reads no key that it does not know."""
    config = CONFIGURATIONS["medusa_two_blocks"]
    speculator = build_speculator(config, hidden_size=D, vocab_size=V, logit_cap=5.0, seed=0, dtype=torch.float64)
    save_speculator(speculator, tmp_path / "spec", base_architectures=["Gemma2ForCausalLM"])
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), "vllm-medusa", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["logit_cap"] == 5.0
    assert load_speculator(out).logit_cap == 5.0
    hidden, tokens = rows(config.n_predict)
    capped, served = logits(speculator, hidden, tokens), READERS["vllm-medusa"](out, hidden, tokens)
    torch.testing.assert_close(torch.tanh(served / 5.0) * 5.0, capped)
    assert torch.equal(served.argmax(-1), capped.argmax(-1))


def test_every_family_that_an_engine_reads_has_an_export():
    exported = {(name, CONFIGURATIONS[one].method) for name, one in PAIRS}
    arctic = {("arctic", "sum_rnn"), ("arctic", "sum_lstm"), ("arctic-mlp", "sum_rnn")}
    assert exported == arctic | {("vllm-medusa", "medusa")}


@pytest.mark.parametrize(("name", "one"), [pair for pair in PAIRS if pair[0] in ("arctic", "vllm-medusa")])
def test_the_training_checkpoint_is_already_what_the_engine_reads(name, one, tmp_path):
    config = CONFIGURATIONS[one]
    speculator = checkpoint(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["verl_speculator"]
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert contract_faults(name, config, D, V, shapes, content) == []
    hidden, tokens = rows(speculator.n_predict)
    torch.testing.assert_close(READERS[name](tmp_path, hidden, tokens), logits(speculator, hidden, tokens))


@pytest.mark.parametrize(("name", "one"), REFUSED)
def test_a_refusal_says_why_and_what_to_train(name, one, tmp_path):
    checkpoint(CONFIGURATIONS[one], tmp_path / "spec")
    with pytest.raises(UserError) as error:
        export_speculator(read_checkpoint_info(tmp_path / "spec"), name, tmp_path / "out")
    told = str(error.value)
    assert told.startswith(f"--format {name}: {FORMATS[name].engine} cannot load {tmp_path / 'spec'}: ")
    advice = "--format vllm-eagle3" if CONFIGURATIONS[one].method == "eagle3" else "train"
    assert advice in told.split(": ", 2)[2] and "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sum_lstm", "tie_lstm_embs": False}, "tie_lstm_embs=false: it decodes with tied embeddings alone"),
        ({"emb_dim": "8.16", "proj_dim": "8.16", "inner_dim": 16}, "emb_dim=8.16: it reads a single width"),
        ({"inner_dim": 24}, "train with inner_dim=16, or one that starts with it"),
        ({"method": "sum_lstm", "tie_lstm_embs": True, "inner_dim": "16.24"}, "train with inner_dim=16, or sum_rnn"),
        ({"method": "sum_lstm", "tie_lstm_embs": True, "n_predict": 1}, "train with n_predict=2"),
        ({"method": "medusa", "inner_dim": None}, "it serves sum_rnn and sum_lstm; train one of these"),
    ],
)
def test_what_arctic_does_not_read(settings, words):
    config = SpeculatorConfig(**({"inner_dim": 16, "emb_dim": 16, "proj_dim": 16} | settings))
    assert words in FORMATS["arctic"].unsupported_reason(config)


def test_faults_that_an_engine_would_not_notice():
    config = CONFIGURATIONS["lstm_for_arctic"]
    shapes = FORMATS["arctic"].tensors(config, D, V)
    shapes["forget_emb.weight"] = shapes.pop("forget_emb.0.weight")
    shapes["head.1.weight"] = (V, 8)
    content = dict.fromkeys(FORMATS["arctic"].keys - {"top_k_tokens_per_head"}) | {"hidden_size": D}
    assert contract_faults("arctic", config, D, V, shapes, content) == [
        "missing forget_emb.0.weight",
        "unexpected forget_emb.weight",
        "head.1.weight is [61, 8], expected [61, 16]",
        "config.json has no top_k_tokens_per_head",
        "config.json has hidden_size",
    ]


def test_an_export_that_is_no_checkpoint_any_more(tmp_path):
    """ArcticMLPSpeculator calls the base's width emb_dim: read as ours, that would be another shape."""
    checkpoint(next(c for c in CONFIGURATIONS.values() if arctic_mlp_unsupported_reason(c) is None), tmp_path / "spec")
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), "arctic-mlp", tmp_path / "out")
    with pytest.raises(UserError, match="for ArcticInference alone \\(arctic-mlp\\); expected the checkpoint"):
        read_checkpoint_info(out)


@pytest.mark.parametrize("one", CONFIGURATIONS)
def test_safetensors_come_back(one, tmp_path):
    """Each tied tensor once, and every name of it again on loading."""
    speculator = checkpoint(CONFIGURATIONS[one], tmp_path / "spec")
    out = export_speculator(read_checkpoint_info(tmp_path / "spec"), "safetensors", tmp_path / "out", dtype="bf16")
    back = load_speculator(out)
    for name, parameter in speculator.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter.to(torch.bfloat16))
    own = sum(2 * p.numel() for p in speculator.parameters())
    assert own <= (out / "model.safetensors").stat().st_size < own + 20000
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    (out / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="truncated, or not a file of tensors"):
        load_speculator(out)


def test_types(tmp_path):
    speculator = checkpoint(CONFIGURATIONS["lstm_for_arctic"], tmp_path / "spec", dtype=torch.float32)
    info = read_checkpoint_info(tmp_path / "spec")
    out = export_speculator(info, "arctic", tmp_path / "out", dtype="bf16")
    content, tensors = readings.read(out)
    assert content["torch_dtype"] == "bfloat16"
    # Tied tensors are one on disk, however many names they have.
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(list(speculator.parameters()))
    with pytest.raises(UserError, match=r"--dtype bf32: expected one of auto, fp32, bf16, fp16 \(did you mean"):
        export_speculator(info, "arctic", tmp_path / "two", dtype="bf32")


def run(*arguments):
    """The command in this process, its error as the console script would print it."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return result, f"{result.exception}" if isinstance(result.exception, UserError) else result.output


def test_the_command(tmp_path, base):
    checkpoint(CONFIGURATIONS["lstm_for_arctic"], tmp_path / "spec", base_architectures=())
    spec, out = tmp_path / "spec", tmp_path / "out"
    assert "did you mean 'arctic'" in run(spec, "--format", "arctik", "--out", out)[1]
    assert "the checkpoint itself lies there" in run(spec, "--format", "arctic", "--out", tmp_path, "--overwrite")[1]
    assert "this base has 32" in run(spec, "--format", "arctic", "--out", out, "--base", base)[1]
    assert not out.exists()
    # ArcticInference 0.3.0 does not compare architectures: a checkpoint that does not say which can be served too.
    result, told = run(spec, "--format", "arctic", "--out", tmp_path / "nameless")
    assert result.exit_code == 0, told
    assert json.loads((tmp_path / "nameless" / "config.json").read_text())["base_model_archs"] == []
    result, told = run(spec, "--format", "safetensors", "--out", out)
    assert result.exit_code == 0, told
    assert {entry.name for entry in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "is there already" in run(spec, "--format", "safetensors", "--out", out)[1]
    assert run(spec, "--format", "safetensors", "--out", out, "--overwrite")[0].exit_code == 0
    assert (
        "no such file; expected the results.csv"
        in run(spec, "--format", "safetensors", "--out", out, "--overwrite", "--results", tmp_path / "no.csv")[1]
    )


def test_format_vllm_of_what_it_cannot_serve_says_why(tmp_path):
    checkpoint(SpeculatorConfig(method="early_exit", n_predict=2, exit_layer=0), tmp_path / "spec")
    told = run(tmp_path / "spec", "--format", "vllm", "--out", tmp_path / "out")[1]
    assert told.startswith("--format vllm: vLLM 0.29 to 0.33 with SpeculatorDraftModel (V2 runner) cannot load"), told
    assert "method=early_exit: it serves sum_rnn, sum_lstm and medusa" in told


RESULTS = """base,speculator,method,n_predict,prompts,temperature,top_p,top_k,draft_length,seed,tau,accept_rate,speedup
b,none,,,gsm8k.parquet,0.0,1.0,0,,0,,,
b,random,sum_rnn,3,gsm8k.parquet,0.0,1.0,0,3,0,1.0,0.0,0.8
b,runs/spec,sum_rnn,3,gsm8k.parquet,0.0,1.0,0,3,0,2.4567,0.4856,1.71
b,runs/other,sum_rnn,3,gsm8k.parquet,0.0,1.0,0,3,0,9.9,0.9,9.9
"""


def test_the_model_card(tmp_path):
    (tmp_path / "results.csv").write_text(RESULTS)
    checkpoint(CONFIGURATIONS["lstm_for_arctic"], tmp_path / "spec")
    out = tmp_path / "card"
    result, told = run(
        *(tmp_path / "spec", "--format", "arctic", "--out", out, "--dry-run"),
        *("--push-to-hub", "me/spec", "--results", tmp_path),
    )
    assert result.exit_code == 0, told
    assert [entry.name for entry in out.iterdir()] == ["README.md"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: verl_speculator\n") and "base_model: some/base" in card
    assert "# sum_lstm speculator for some/base" in card
    assert "drafts **3 tokens** (K)" in card and "width 20, vocabulary 61" in card
    assert "chats.parquet (1,234 rows)" in card and "/secret" not in card
    assert "| gsm8k | **this speculator** | 0 | 3 | 2.46 | 48.6% | 1.71 |" in card
    assert "| gsm8k | none | 0 | – | – | – | – |" in card and "9.9" not in card
    assert '"method": "arctic"' in card and "ARCTIC_INFERENCE_ENABLED=1" in card
    assert '"model": "verl_speculator.vllm_plugin.proposer.SpeculatorProposer"' in card
    assert str(tmp_path) not in card


def test_a_card_never_claims_what_cannot_be(tmp_path):
    """A base that is a directory is no hub name; a Medusa with its own norm is nothing that vLLM serves."""
    provenance = {"base": {"name": "/home/me/bases/my-base"}}
    config = SpeculatorConfig(method="medusa", n_predict=2, hidden_state="pre_norm")
    checkpoint(config, tmp_path, provenance=provenance)
    card = model_card(read_checkpoint_info(tmp_path), "safetensors")
    assert "base_model:" not in card and "/home" not in card and "speculator for my-base" in card
    assert "custom_class" not in card and "verl-speculator generate" in card


def test_pushing(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **settings):
            calls.append(("create", repo, settings))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, {entry.name for entry in folder_path.iterdir()}))
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    checkpoint(CONFIGURATIONS["medusa_shared"], tmp_path / "spec")
    arguments = (tmp_path / "spec", "--format", "vllm-medusa")
    told = run(*arguments, "--out", tmp_path / "one", "--push-to-hub", "no spaces/please")[1]
    assert told.startswith("--push-to-hub no spaces/please: ")
    assert "expected owner/name" in run(*arguments, "--out", tmp_path / "one", "--push-to-hub", "alone")[1]
    assert not calls and not (tmp_path / "one").exists()
    result, told = run(*arguments, "--out", tmp_path / "one", "--push-to-hub", "me/spec", "--private")
    assert result.exit_code == 0 and "https://hub/me/spec/commit/1" in told
    assert calls == [
        ("create", "me/spec", {"private": True, "exist_ok": True}),
        ("upload", "me/spec", {"README.md", "config.json", "model.safetensors"}),
    ]


def test_a_hub_that_refuses_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    class Api:
        def create_repo(self, *arguments, **settings):
            raise LocalTokenNotFoundError("Token is required,\nbut no token found.")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    checkpoint(CONFIGURATIONS["medusa_shared"], tmp_path / "spec")
    told = run(tmp_path / "spec", "--format", "vllm-medusa", "--out", tmp_path / "one", "--push-to-hub", "me/spec")[1]
    where = f"what was exported is in {tmp_path / 'one'}"
    assert told == f"--push-to-hub me/spec: Token is required, but no token found.; {where}"
