"""Checkpoints on disk: what config.json says, what loading refuses, and that nothing is ever half there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.family_variants import configurations
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import read_checkpoint_info, resolve_checkpoint
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.utils.atomic_io import atomic_directory, atomic_file, remove_temporaries
from verl_speculator.utils.settings import UserError

# Read from ArcticInference 0.3.0: what its loader reads or asserts (docs/checkpoint-format.md).
ARCTIC_KEYS = {
    "architectures",
    "base_model_archs",
    "emb_dim",
    "inner_dim",
    "input_hidden_dim",
    "method",
    "model_type",
    "n_predict",
    "proj_dim",
    "scale_input",
    "tie_lstm_embs",
    "tie_weights",
    "top_k_tokens_per_head",
    "torch_dtype",
    "vocab_size",
}


def tiny(**settings):
    config = SpeculatorConfig(**({"n_predict": 2, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8} | settings))
    return build_speculator(config, hidden_size=12, vocab_size=30, seed=0)


ARCTIC = {
    name: config
    for name, config in configurations().items()
    if config.method.startswith("sum_") and config.draft_vocab_size is None and not config.base_tables
}


@pytest.mark.parametrize("config", ARCTIC.values(), ids=ARCTIC.keys())
def test_config_is_what_arctic_inference_reads(config, tmp_path):
    speculator = build_speculator(config, hidden_size=20, vocab_size=61, seed=0, dtype=torch.bfloat16)
    save_speculator(speculator, tmp_path, base_architectures=["Qwen2ForCausalLM"])
    content = json.loads((tmp_path / "config.json").read_text())
    assert set(content) == ARCTIC_KEYS | {"verl_speculator"}
    assert content["model_type"] == "mlp_speculator"
    assert content["architectures"] == ["ArcticLSTMSpeculatorPreTrainedModel"]
    assert content["vocab_size"] == 61
    assert content["input_hidden_dim"] == 20
    assert len(content["top_k_tokens_per_head"]) == content["n_predict"] == config.n_predict
    for name in ("inner_dim", "emb_dim", "proj_dim"):
        several = "." in str(getattr(config, name))
        assert content[name] == getattr(config, name)
        assert isinstance(content[name], str if several else int)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {str(t.dtype).removeprefix("torch.") for t in tensors.values()} == {content["torch_dtype"]}
    assert not any(name.startswith("speculator.") for name in tensors)


def test_a_base_of_another_shape_is_refused(tmp_path, base):
    save_speculator(tiny(), tmp_path)
    with pytest.raises(UserError, match=r"width \(hidden_size\) 12, this base has 32"):
        load_speculator(tmp_path, base=base)
    with pytest.raises(UserError, match="base=/no/such: no such directory"):
        load_speculator(tmp_path, base="/no/such")
    from transformers import AutoConfig, AutoModelForCausalLM

    with pytest.raises(UserError, match="this base has 32"):
        load_speculator(tmp_path, base=AutoConfig.from_pretrained(base))
    with pytest.raises(UserError, match="this base has 32"):
        load_speculator(tmp_path, base=AutoModelForCausalLM.from_pretrained(base))


def test_a_base_with_other_weights_is_refused(tmp_path, bases, caplog):
    """Llama and an untied Qwen2 of one shape: the fingerprint tells them apart, unless told to let it pass."""
    from transformers import AutoModelForCausalLM

    mine, other = bases["qwen2_untied"], bases["llama"]
    speculator = build_speculator(tiny().config, hidden_size=32, vocab_size=base_shape(mine)[1], seed=0)
    provenance = {"base": {"name": "my/base", "weights_fingerprint": weights_fingerprint(str(mine))}}
    save_speculator(speculator, tmp_path / "spec", provenance=provenance)
    load_speculator(tmp_path / "spec", base=mine)
    load_speculator(tmp_path / "spec", base=AutoModelForCausalLM.from_pretrained(mine))
    for base in (other, AutoModelForCausalLM.from_pretrained(other)):
        with pytest.raises(UserError) as error:
            load_speculator(tmp_path / "spec", base=base)
        assert str(error.value) == (
            f"{tmp_path / 'spec'}: trained for the weights of my/base, those of {other} are others; a base fine-tuned "
            "from it can be told to be fine: --allow-other-base (allow_other_base=True)"
        )
        assert not caplog.records
        load_speculator(tmp_path / "spec", base=base, allow_other_base=True)
        (warning,) = caplog.messages
        assert warning == (
            f"{tmp_path / 'spec'}: trained for the weights of my/base, those of {other} are others: expect fewer "
            "accepted drafts"
        )
        caplog.clear()
    load_speculator(tmp_path / "spec", base=mine, allow_other_base=True)
    assert not caplog.records
    save_speculator(speculator, tmp_path / "spec")
    load_speculator(tmp_path / "spec", base=mine)
    assert "the base's weights cannot be compared" in caplog.text


def test_a_base_that_was_trained_too_is_saved_with_its_speculator(tmp_path, bases):
    mine, other = bases["qwen2_untied"], bases["llama"]
    speculator = build_speculator(tiny().config, hidden_size=32, vocab_size=base_shape(mine)[1], seed=0)
    save_speculator(speculator, tmp_path, provenance={"base": {"name": "before", "weights_fingerprint": None}})
    shutil.copytree(mine, tmp_path / "huggingface")
    load_speculator(tmp_path, base=mine)
    with pytest.raises(UserError, match=f"trained for the weights of {tmp_path / 'huggingface'}"):
        load_speculator(tmp_path, base=other)


def test_loading_can_change_type(tmp_path):
    save_speculator(tiny(), tmp_path)
    loaded = load_speculator(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_runs_folder_means_its_latest_step(tmp_path):
    for step in (2, 10):
        save_speculator(tiny(n_predict=step), tmp_path / f"global_step_{step}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert load_speculator(tmp_path).n_predict == 10
    assert resolve_checkpoint(tmp_path / "global_step_2").name == "global_step_2"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{", "not a speculator's configuration"),
        ("config.json", "{}", "no key 'input_hidden_dim'"),
        ("pytorch_model.bin", "PK", "truncated, or not a file of tensors"),
        ("pytorch_model.bin", None, "no such file"),
        ("config.json", None, "no speculator checkpoint here"),
    ],
)
def test_broken_files_are_refused(tmp_path, file, content, words):
    save_speculator(tiny(), tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        load_speculator(tmp_path)
    assert words in str(error.value)


def test_weights_are_read_without_running_code(tmp_path):
    """A pickle that would run something is refused."""

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    save_speculator(tiny(), tmp_path)
    torch.save({"head.0.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="truncated, or not a file of tensors"):
        load_speculator(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("d2t", None, "missing d2t"),
        ("d2t", torch.zeros(4, dtype=torch.long), r"d2t is \[4\] of int64, the configuration says \[5\] of int64"),
        ("d2t", torch.zeros(5, dtype=torch.int32), r"d2t is \[5\] of int32"),
        ("d2t", torch.tensor([0, -1, 0, 0, 0]), "d2t names no ascending tokens below 30"),
        ("d2t", torch.tensor([0, 0, 0, 0, 26]), "d2t names no ascending tokens below 30"),
        ("token_map", torch.tensor([0, 1, 2, 3, 5]), "token_map names other tokens than d2t"),
    ],
)
def test_a_faulty_draft_vocabulary_is_refused(tmp_path, name, tensor, words):
    config = SpeculatorConfig(method="medusa", n_predict=2, draft_vocab_size=5)
    tokens = [0, 1, 2, 3, 29]
    speculator = build_speculator(config, hidden_size=12, vocab_size=30, draft_tokens=tokens, seed=0)
    save_speculator(speculator, tmp_path)
    assert load_speculator(tmp_path).draft_tokens.tolist() == tokens
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    changed = {key: value for key, value in tensors.items() if key != name}
    torch.save(changed if tensor is None else changed | {name: tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=words):
        load_speculator(tmp_path)


def test_saving_over_an_old_checkpoint(tmp_path):
    save_speculator(tiny(), tmp_path)
    save_speculator(tiny(n_predict=3), tmp_path, provenance={"note": "second"})
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert read_checkpoint_info(tmp_path).provenance == {"note": "second"}
    assert load_speculator(tmp_path).n_predict == 3


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "global_step_1") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as path:
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "global_step_1") as folder:
        (folder / "a").write_text("one")
    with atomic_directory(tmp_path / "global_step_1") as folder:
        (folder / "b").write_text("two")
    assert [entry.name for entry in (tmp_path / "global_step_1").iterdir()] == ["b"]
    (tmp_path / ".tmp.99.global_step_2").mkdir()
    remove_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["global_step_1"]


def test_fingerprint_moves_with_any_tensor(base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    before = weights_fingerprint(str(base))
    shutil.copytree(base, tmp_path / "copy")
    assert weights_fingerprint(str(tmp_path / "copy")) == before
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    save_file(tensors | {name: tensors[name] + 1}, file)
    assert weights_fingerprint(str(tmp_path / "copy")) not in (before, None)
    assert weights_fingerprint("/no/such/model") is None
