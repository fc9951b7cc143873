"""The console script."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.config.families import FAMILIES


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "verl_speculator", *map(str, arguments)], capture_output=True, text=True
    )


def test_inspect(tmp_path):
    config = SpeculatorConfig(n_predict=2, inner_dim="8.16", emb_dim=8, proj_dim=8)
    speculator = build_speculator(config, hidden_size=12, vocab_size=30, seed=0)
    provenance = {"base": {"name": "some/base"}, "data": {"train_files": ["a", "b"]}, "training": {"step": 7}}
    save_speculator(speculator, tmp_path / "spec", provenance=provenance)
    shown = command("inspect", tmp_path / "spec")
    assert shown.returncode == 0, shown.stderr
    count = sum(p.numel() for p in speculator.parameters())
    for words in ("sum_rnn", "8.16", f"{count:,}", "some/base", "a, b", "step"):
        assert words in shown.stdout
    facts = json.loads(command("inspect", "--json", tmp_path / "spec").stdout)
    assert facts["parameters"] == {"count": count, "dtype": "float32"}
    assert facts["training"]["step"] == 7


def test_a_users_error_is_one_line_and_exit_code_2(tmp_path):
    result = command("inspect", tmp_path / "nothing")
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"error: {tmp_path / 'nothing'}: no speculator checkpoint here "
        "(expected config.json or a run's latest_checkpointed_iteration.txt)"
    )


def test_inspect_says_which_engine_can_serve_it(tmp_path):
    def serving(**settings):
        config = SpeculatorConfig(**({"n_predict": 2, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8} | settings))
        save_speculator(build_speculator(config, hidden_size=12, vocab_size=30, seed=0), tmp_path / "spec")
        return json.loads(command("inspect", "--json", tmp_path / "spec").stdout)["serving"]

    arctic = "ArcticInference 0.3.0 (vLLM 0.26.0)"
    assert serving(inner_dim="8.16")[arctic] == "yes"
    assert serving(method="sum_lstm", tie_lstm_embs=True)[arctic] == "yes"
    assert "tie_lstm_embs=false" in serving(method="sum_lstm")[arctic]
    assert "emb_dim=4.8: it reads a single width" in serving(emb_dim="4.8", proj_dim="4.8")[arctic]
    assert "inner_dim=16, emb_dim=8" in serving(inner_dim=16)[arctic]
    assert serving()["verl_speculator.decoding"] == "yes"
    medusa = {"method": "medusa", "inner_dim": None}
    vllm = "vLLM 0.24 to 0.32 without plugins"
    assert serving(**medusa)[vllm] == serving(**medusa, head="shared", num_layers=2)[vllm] == "yes"
    assert "it serves sum_rnn and sum_lstm" in serving(**medusa)[arctic]
    assert "no bottleneck" in serving(**medusa | {"inner_dim": 8})[vllm]
    assert "after the final norm" in serving(**medusa, hidden_state="pre_norm")[vllm]
    assert "method=sum_rnn: no released version serves it" in serving()[vllm]


def module(name, *arguments):
    return subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("preflight.launch", [*FAMILIES, "usage: run_speculator_training.sh"]),
        ("train", [*FAMILIES, "run_speculator_training.sh", "model.partial_pretrain"]),
        ("train_ray", [*FAMILIES, "python -m verl_speculator.train_ray", "trainer.nnodes", "model.partial_pretrain"]),
        ("train_ppo", ["python -m verl_speculator.train_ppo", "rollout-args"]),
    ],
)
def test_entry_module_help_prints_usage(name, words, option):
    result = module(f"verl_speculator.{name}", option)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(word in result.stdout for word in words)


def test_version_is_the_packages():
    import verl_speculator

    for arguments in (("verl_speculator", "--version"), ("verl_speculator.preflight.launch", "--version")):
        result = module(*arguments)
        assert (result.returncode, result.stdout) == (0, f"verl_speculator {verl_speculator.__version__}\n")


def test_speculator_that_is_a_plain_model_says_what_is_expected(base):
    result = command("generate", "--base", base, "--speculator", base, "--prompt", "one")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {base}: a model (Qwen2ForCausalLM), expected a speculator's checkpoint, as training writes it: a "
        "global_step_N folder, or a run's folder for its latest step; the model itself is --base\n"
    )


def test_speculator_of_another_format_points_to_convert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "base_model_name_or_path": "x"}))
    result = command("inspect", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path}: Medusa heads in another format")
    assert f"verl-speculator convert {tmp_path}" in result.stderr
