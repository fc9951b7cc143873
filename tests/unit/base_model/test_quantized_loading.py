"""Bases in 4 bits and from GGUF files: what is refused by name, decoding with them, and runs as users start them."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

import verl_speculator.preflight.launch as launch
from helpers.tiny_models import GGUF_FILE as FILE
from helpers.tiny_models import make_gguf
from helpers.training_runs import environment, overrides, read_log, script, train
from verl_speculator import build_speculator, load_speculator
from verl_speculator.base_model.loading import BaseModelFormat, BaseModelLoader, base_shape, load_base, load_tokenizer
from verl_speculator.checkpoint.format import read_checkpoint_info, write_checkpoint
from verl_speculator.checkpoint.provenance import file_fingerprint, weights_fingerprint
from verl_speculator.cli.options import LoadingOptions
from verl_speculator.decoding import speculative_generate
from verl_speculator.utils.settings import UserError

BNB4 = BaseModelFormat(quantization="bnb4")
GGUF = BaseModelFormat(gguf_file=FILE)

needs_bnb = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def installed(monkeypatch):
    """Make the two packages look installed, but for those named."""
    find, found = importlib.util.find_spec, {}

    def look(name, *more):
        return found[name] if name in found else find(name, *more)

    def pretend(*but: str) -> None:
        found.update({name: None if name in but else object() for name in ("bitsandbytes", "gguf")})
        monkeypatch.setattr(importlib.util, "find_spec", look)

    return pretend


@pytest.fixture
def attempt(base, chat, tmp_path, monkeypatch):
    """What the launcher says of a base in this form, before anything starts."""

    def run(*more, base=base) -> str:
        monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("was not refused"))
        with pytest.raises(UserError) as error:
            launch.launch(["1", str(tmp_path / "out"), *overrides(base, chat), *more])
        assert not (tmp_path / "out").exists()
        return str(error.value)

    return run


# What is refused, with and without the packages.


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["quantization=bnb5"], "model.quantization=bnb5: expected bnb4 or null (did you mean 'bnb4'?)"),
        (["quantization=4"], "model.quantization=4: expected bnb4 or null"),
        (
            ["quantization=bnb4", "freeze_base_model=false"],
            "model.quantization=bnb4: a base in 4 bits cannot be trained; expected model.freeze_base_model=true",
        ),
        (["quantization=bnb4", "gguf_file=x.gguf"], "expected one of the two"),
        (["gguf_file=model.safetensors"], "model.gguf_file=model.safetensors: expected the name of a .gguf file"),
        (["gguf_file=x.gguf"], "model.gguf_file=x.gguf: no such file in"),
    ],
)
def test_settings_refused(attempt, installed, more, words):
    installed()
    assert words in attempt(*(f"model.{setting}" for setting in more))


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [("quantization=bnb4", "bitsandbytes", "bnb"), ("gguf_file=x.gguf", "gguf", "gguf")],
)
def test_a_missing_package_is_refused(attempt, installed, base, setting, package, extra):
    installed(package)
    words = f"{setting}: the package {package} is not installed; expected: pip install 'verl_speculator[{extra}]'"
    assert attempt(f"model.{setting}") == f"model.{words}"
    with pytest.raises(UserError) as error:
        LoadingOptions(**dict([setting.split("=")])).base_format(str(base))
    assert str(error.value) == words


def test_a_gguf_file_that_is_not_there_names_those_that_are(attempt, installed, base, tmp_path):
    installed()
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "a.gguf").touch()
    assert attempt("model.gguf_file=b.gguf", base=folder).endswith(f"no such file in {folder}; its *.gguf: a.gguf")
    part = "b-00001-of-00002.gguf"
    (folder / part).touch()
    assert f"{part}: one part of several" in attempt(f"model.gguf_file={part}", base=folder)


def test_a_base_that_lies_in_4_bits_needs_the_setting(attempt, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "its weights are quantised by bitsandbytes; expected model.quantization=bnb4" in attempt(base=folder)


def test_a_refusal_is_one_line_and_exit_code_2(base, chat, tmp_path):
    result = script(1, tmp_path / "out", *overrides(base, chat), "model.quantization=bnb5")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    command = ["generate", "--base", str(base), "--prompt", "one", "--quantization", "bnb5"]
    result = subprocess.run([sys.executable, "-m", "verl_speculator", *command], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: quantization=bnb5: expected bnb4 or null (did you mean 'bnb4'?)\n"


# GGUF files


@needs_gguf
def test_the_tokenizer_is_the_one_of_the_file(gguf_bases, tokenizer, tmp_path):
    """With its own special tokens, and the same once written out for verl."""
    from transformers import AutoConfig, AutoTokenizer

    folder = gguf_bases["qwen2_tied"]
    GGUF.write_description(folder, tmp_path)
    text = "<|im_start|>user\nthree red cats sing, don't they?<|im_end|>\n"
    for found in (load_tokenizer(folder, GGUF), AutoTokenizer.from_pretrained(tmp_path)):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (found.eos_token, found.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        assert found.chat_template == tokenizer.chat_template
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Qwen2ForCausalLM"]


@needs_gguf
def test_end_tokens_gguf_that_names_another_eos_come_from_the_template(bases, tokenizer, tmp_path):
    """In training, in its checks and in decoding alike, whatever end token the file names."""
    import verl_speculator.training.plugin  # noqa: F401
    from verl_speculator.cli.options import load_models
    from verl_speculator.config.hydra import load_run_config
    from verl_speculator.preflight.base_model import check_base
    from verl_speculator.training.model_config import SpeculatorModelConfig

    make_gguf(bases["qwen2_untied"], tmp_path / FILE, eos="<|im_start|>")
    named, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    settings = [f"model.partial_pretrain={tmp_path}", f"model.gguf_file={FILE}", "trainer.default_local_dir=."]
    decoding = load_models(str(tmp_path), None, LoadingOptions("fp32", "cpu", gguf_file=FILE)).ends
    training = SpeculatorModelConfig(path=str(tmp_path), gguf_file=FILE).end_token_ids
    assert decoding == training == check_base(load_run_config(settings)).end_token_ids == tuple(sorted((named, end)))


def test_end_tokens_folder_with_the_gguf_readers_eos_come_from_the_generation_config(bases, tokenizer, tmp_path):
    """A GGUF file that was saved as a folder: the tokenizer's class has an end token of its own."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(bases["qwen2_untied"], tmp_path / "folder")
    read = AutoTokenizer.from_pretrained(folder)
    read.eos_token = "<|im_start|>"
    read.save_pretrained(folder)
    assert BaseModelLoader(folder, device="cpu").end_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@needs_gguf
def test_tensors_in_8_bits_are_dequantised(bases, tmp_path):
    make_gguf(bases["qwen2_tied"], tmp_path / FILE, quantised=True)
    exact = load_base(bases["qwen2_tied"], device="cpu", dtype=torch.float32).state_dict()
    rounded = load_base(tmp_path, device="cpu", dtype=torch.float32, form=GGUF).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (rounded[name] - exact[name]).abs().max() < exact[name].abs().max() / 100


@needs_gguf
def test_a_gguf_base_is_told_from_others(bases, gguf_bases, tmp_path):
    folder, speculator = gguf_bases["qwen2_tied"], tmp_path / "speculator"
    assert base_shape(folder, GGUF) == base_shape(bases["qwen2_tied"])
    fingerprint = weights_fingerprint(str(folder), FILE)
    assert fingerprint == file_fingerprint(folder / FILE) != weights_fingerprint(str(bases["qwen2_tied"]))
    _write(speculator, folder, {"weights_fingerprint": fingerprint, "gguf_file": FILE})
    info = read_checkpoint_info(speculator)
    assert info.base_name == f"{folder}/{FILE}"
    info.check_base_weights(str(folder), GGUF)
    with pytest.raises(UserError, match=f"trained for the weights of {folder}/{FILE}, those of"):
        info.check_base_weights(str(bases["qwen2_tied"]))


@needs_gguf
@pytest.mark.slow
def test_a_gguf_base_through_the_launcher_and_the_commands(gguf_bases, chat, tmp_path):
    """The same losses with one process and two; the commands then decode with what came of it."""
    folder = gguf_bases["qwen2_untied"]
    _train_both_ways(folder, chat, tmp_path, model__gguf_file=FILE)
    _generate(folder, tmp_path / "one", "--gguf-file", FILE)


# 4 bits


@needs_bnb
def test_decoding_with_a_base_in_4_bits(bases, tmp_path, tokenizer):
    """Greedy text is the base's own, and is not that of the weights as they lie."""
    folder = bases["qwen2_untied"]
    base = load_base(folder, device="cpu", dtype=torch.float32, form=BNB4)
    _write(tmp_path, folder, {})
    speculator = load_speculator(tmp_path, base=base)
    prompt = tokenizer("one two three")["input_ids"]
    alone, drafted = (
        speculative_generate(base, draft, prompt, max_new_tokens=20, eos_token_id=()).tokens
        for draft in (None, speculator)
    )
    assert alone == drafted
    with pytest.raises(UserError, match=r"dtype=torch\.float64: quantization=bnb4 takes fp32, bf16, fp16"):
        load_base(folder, device="cpu", dtype=torch.float64, form=BNB4)
    exact = load_base(folder, device="cpu", dtype=torch.float32)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        assert not torch.allclose(base(tokens).logits, exact(tokens).logits, atol=1e-3)


@needs_bnb
@pytest.mark.slow
def test_a_base_in_4_bits_through_the_launcher_and_the_commands(bases, chat, tmp_path):
    folder = bases["qwen2_untied"]
    _train_both_ways(folder, chat, tmp_path, model__quantization="bnb4", model__speculator__loss="kl")
    info = read_checkpoint_info(tmp_path / "one")
    assert info.base_fingerprint() == weights_fingerprint(str(folder))
    _generate(folder, tmp_path / "one", "--quantization", "bnb4")
    with pytest.raises(UserError) as error:
        launch.launch(["1", str(tmp_path / "one"), *overrides(folder, chat), "model.speculator.loss=kl"])
    assert "the run differs (its own, this run's): model.quantization (bnb4, null)" in str(error.value)


def test_weights_in_4_bits_and_as_they_lie_go_with_each_other(base, tmp_path, caplog):
    """One fingerprint, and a line in the log."""
    _write(tmp_path, base, {"weights_fingerprint": weights_fingerprint(str(base)), "quantization": "bnb4"})
    info = read_checkpoint_info(tmp_path)
    with caplog.at_level(logging.WARNING):
        info.check_base_weights(str(base), BNB4)
        assert not caplog.records
        info.check_base_weights(str(base))
    assert caplog.messages == [f"{tmp_path}: trained on the states of {base} (bnb4), not of {base}"]


def _write(folder, base, recorded) -> None:
    """A speculator that says that it was trained for this base."""
    from verl_speculator import SpeculatorConfig

    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16)
    width, vocab = base_shape(base, BaseModelFormat(gguf_file=recorded.get("gguf_file")))
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0)
    write_checkpoint(
        folder,
        config,
        dict(speculator.named_parameters()),
        hidden_size=width,
        vocab_size=vocab,
        provenance={"base": {"name": str(base)} | recorded},
    )


def _train_both_ways(base, chat, folder, **settings) -> None:
    settings = overrides(base, chat, trainer__total_training_steps=2, data__val_files=chat, **settings)
    log = folder / "one.jsonl"
    result = script(1, folder / "one", *settings, "trainer.logger=file", VERL_FILE_LOGGER_PATH=str(log))
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = read_log(log), train(2, folder / "two", settings)
    for step, metrics in one.items():
        for name in ("train/loss", "train/grad_norm"):
            assert metrics[name] == pytest.approx(two[step][name], rel=1e-4)


def _generate(base, speculator, *form) -> None:
    command = ["generate", "--base", str(base), "--speculator", str(speculator), "--prompt", "one two", "--compare"]
    command += ["--max-new-tokens", "12", "--device", "cpu", *form]
    result = subprocess.run(
        [sys.executable, "-m", "verl_speculator", *command], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert "the same text" in result.stderr
