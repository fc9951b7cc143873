"""What a user can get wrong: one line that names it, exit code 2, nothing written, no base loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import verl_speculator.preflight.launch as launch
from helpers.tiny_models import VISION, make_chat_rows, make_vision_base, write_parquet
from helpers.training_runs import SCRIPT, environment, overrides, script
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.checkpoint.format import STATE_FILES
from verl_speculator.config.hydra import flash_attention_installed, load_run_config, load_settings
from verl_speculator.preflight.settings import LOGGERS
from verl_speculator.utils.settings import UserError

SMALL = {"n_predict": 3, "inner_dim": 16, "emb_dim": 16, "proj_dim": 16}


class Started(Exception):
    """The checks passed and torchrun would have taken over."""


@pytest.fixture
def attempt(base, chat, tmp_path, monkeypatch):
    """Run the launcher in this process up to the start of torchrun."""

    def reached(path, command, environment):
        raise Started(command, environment)

    monkeypatch.setattr(os, "execve", reached)

    def run(*more, nproc="1", save_path=tmp_path / "out", **settings):
        launch.launch([nproc, str(save_path), *overrides(base, chat, **settings), *more])

    return run


def assert_refused(attempt, words, tmp_path, *more, **settings):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        attempt(*more, **settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_launch_valid_run_starts_one_torchrun(attempt, tmp_path):
    with pytest.raises(Started) as started:
        attempt('model.speculator.inner_dim="16.24"', nproc="2")
    command, environment = started.value.args
    torchrun = "from verl_speculator.train import torchrun; torchrun()"
    assert command[:4] == [sys.executable, "-c", torchrun, "--nproc-per-node=2"]
    assert command.count("verl_speculator.train") == 1
    assert "--standalone" in command
    assert environment["MALLOC_TRIM_THRESHOLD_"]
    assert not (tmp_path / "out").exists()


def test_launch_several_machines_passes_rendezvous_options(attempt, monkeypatch):
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Started) as started:
        attempt("data.micro_batch_size_per_gpu=2", nproc="2")
    command = started.value.args[0]
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29501"} <= set(command)
    assert "--standalone" not in command
    with pytest.raises(UserError, match="not divisible by 6 processes"):
        attempt(nproc="3")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(UserError, match="MASTER_PORT=0: expected a port from 1 to 65535"):
        attempt()
    monkeypatch.delenv("NODE_RANK")
    with pytest.raises(UserError, match="NNODES=2: set NODE_RANK too"):
        attempt()


def test_launch_recipe_comes_before_the_users_own_settings(attempt):
    with pytest.raises(Started) as started:
        attempt("--recipe", "acceptance", "model.speculator.loss=tv")
    command = started.value.args[0]
    losses = [argument for argument in command if argument.startswith("model.speculator.loss=")]
    assert losses == ["model.speculator.loss={kl:1.0,tv:1.0}", "model.speculator.loss=tv"]
    assert "optim.betas=[0.9,0.95]" in command and not any(argument.startswith("--recipe") for argument in command)
    with pytest.raises(
        UserError, match=r"--recipe acceptence: expected one of acceptance, medusa, small \(did you mean"
    ):
        attempt("--recipe=acceptence")


@pytest.mark.parametrize("more", [{}, {"PET_LOG_DIR": "log", "PET_NPROC_PER_NODE": "2"}, {"PET_NNODES": "1"}], ids=str)
def test_launch_one_machine_ignores_master_address(attempt, monkeypatch, more):
    """Also with other variables of torchrun in the environment."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Started) as started:
        attempt(nproc="2")
    command = started.value.args[0]
    assert "--standalone" in command
    assert not any("master" in argument for argument in command)


@pytest.mark.parametrize("name", ["PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_MASTER_ADDR", "PET_NODE_RANK"])
def test_launch_one_machine_keeps_rendezvous_variables(attempt, monkeypatch, name):
    """torchrun reads its own variables; an option from MASTER_ADDR would replace them."""
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    monkeypatch.setenv(name, "0")
    with pytest.raises(Started) as started:
        attempt(nproc="2")
    command = started.value.args[0]
    assert "--standalone" not in command
    assert not any("master" in argument for argument in command)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("model.speculator.n_predct=3", "did you mean 'n_predict'"),
        ("n_predict=3", "n_predict is not a setting (did you mean 'model.speculator.n_predict'?)"),
        ("lr=3", "lr is not a setting (did you mean 'optim.lr'?)"),
        ("train_files=a", "train_files is not a setting (did you mean 'data.train_files'?)"),
        ("save_frq=3", "save_frq is not a setting (did you mean 'trainer.save_freq'?)"),
        ("no.such=3", "no.such is not a setting; docs/configuration.md lists them"),
        ("model.override_config.x=3", "x is not a setting of verl's own; expected +model.override_config.x=…"),
        ("model.speculator.loss={kl:1", "model.speculator.loss={kl:1: its value cannot be read; expected a list as"),
        ("data.val_files=a,b", "data.val_files=a,b: several values; expected a list as [a,b]"),
        ("model.speculator.n_predict=0", "n_predict=0: expected an integer of at least 1"),
        ("model.speculator.n_predict=2.5", "n_predict=2.5: expected an integer"),
        ("model.speculator.n_predict=many", "n_predict=many: expected an integer"),
        ("model.speculator.inner_dim=0", "inner_dim=0 is no width"),
        ("model.speculator.emb_dim=-8", "emb_dim=-8 is no width"),
        ("model.speculator.proj_dim=1024.", "proj_dim=1024. is no width"),
        ("model.speculator.inner_dim=a.b", "inner_dim=a.b is no width"),
        ("model.speculator.emb_dim=8", "must end in the same width"),
        ("model.speculator.method=sum_lstms", "did you mean 'sum_lstm'"),
        ("model.speculator.loss=kll", "loss=kll: kll is no loss (did you mean 'kl'?)"),
        ("model.speculator.loss={ce: -1}", "model.speculator.loss.ce=-1: expected a weight ≥ 0"),
        ("model.speculator.loss={ce: 0}", "all weights are 0"),
        ("model.speculator.kl_temperature=0", "kl_temperature=0: expected a number > 0"),
        ("model.speculator.depth_weights=[1]", "depth_weights=[1.0]: expected 3 numbers, one for each depth"),
        ("model.speculator.loss_chunk_rows=0", "loss_chunk_rows=0: expected an integer of at least 1"),
        ("model.speculator.compile=2", "model.speculator.compile=2: expected true, false or null"),
        ("model.speculator.init=base", "16 wide, the base 32; expected the first of emb_dim to be 32"),
        ("data.train_batch_size=7", "its 7 rows per process are not divisible by data.micro_batch_size_per_gpu=4"),
        ("data.train_batch_size=44", "data.train_batch_size=44: the training files have only 40 rows"),
        ("data.train_batch_size=0", "data.train_batch_size=0: expected an integer of at least 1"),
        ("data.max_length=20", "data.max_length is 20"),
        ("engine.strategy=fsdp", "torch has no FSDP1 for the CPU"),
        ("engine.strategy=fdsp2", "did you mean 'fsdp2'"),
        ("engine.ulysses_sequence_parallel_size=2", "engine.ulysses_sequence_parallel_size=2"),
        ("model.lora_rank=8", "model.lora_rank=8"),
        ("model.partial_pretrain=./no/such/base", "model.partial_pretrain=./no/such/base: no such directory"),
        ("data.train_files=/no/such.parquet", "data.train_files=/no/such.parquet: no such file"),
        ("data.val_files=/no/such.parquet", "data.val_files=/no/such.parquet: no such file"),
        ("model.speculator.path=/no/such", "/no/such: no speculator checkpoint here"),
        ("trainer.resume_mode=automatic", "did you mean 'auto'"),
        ("trainer.resume_mode=resume_path", "needs trainer.resume_from_path"),
        ("optim.lr=0", "optim.lr=0: expected a number > 0"),
        ("trainer.default_local_dir=x", "this is <save_path>"),
        ("optim.lr=nan", "optim.lr=nan: expected a number > 0"),
        ("optim.lr=${foo.bar}", "foo"),
        ("optim.min_lr_ratio=2", "expected a number of at least 0 and at most 1"),
        ("optim.lr_scheduler_type=linear", "optim.lr_scheduler_type=linear: expected one of cosine, constant"),
        ("optim.lr_warmup_steps=foo", "optim.lr_warmup_steps=foo: expected an integer of at least -1, or null"),
        ("optim.lr_warmup_steps=false", "optim.lr_warmup_steps=false: expected an integer"),
        ("optim.lr_warmup_steps=-2", "optim.lr_warmup_steps=-2: expected an integer of at least -1, or null"),
        ("optim.num_cycles=abc", "optim.num_cycles=abc: expected a number of at least 0"),
        ("optim.betas=0.9", "optim.betas=0.9: expected two numbers of at least 0 and below 1, such as [0.9,0.95]"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: expected two numbers"),
        ("optim.betas=[0.9,1.0]", "optim.betas=[0.9, 1.0]: expected two numbers"),
        ("optim.betas=[a,b]", "optim.betas=['a', 'b']: expected two numbers"),
        ("optim.betas=null", "optim.betas=null: expected two numbers"),
        ("optim.zero_indexed_step=2", "optim.zero_indexed_step=2: expected true or false"),
        ("optim.warmup_style=linear", "optim.warmup_style=linear: expected one of null, cosine, constant"),
        ("+optim.grad_clip=x", "optim.grad_clip=x: expected a number > 0"),
        ("+optim.eps=1e-6", "optim.eps is not a setting; arguments of the optimizer's own go into"),
        ("+optim.weight_decy=1", "optim.weight_decy is not a setting (did you mean 'weight_decay'?)"),
        ("optim.optimizer=AdamWW", "optim.optimizer=AdamWW: torch.optim has no such optimizer (did you mean 'AdamW'?)"),
        ("optim.optimizer=LBFGS", "optim.optimizer=LBFGS: "),
        ("optim.optimizer_impl=no.such", "optim.optimizer_impl=no.such: No module named 'no'"),
        ("optim.override_optimizer_config={eps: -1}", "Invalid epsilon value: -1"),
        ("optim.override_optimizer_config={epsilon: 1}", "unexpected keyword argument 'epsilon'"),
        ("optim.override_optimizer_config=3", "optim.override_optimizer_config=3: expected settings such as"),
        ("model.speculator.lr=nan", "model.speculator.lr=nan: expected a number > 0, or null"),
        ("trainer.profile_interval=[3]", "trainer.profile_interval=[3]: expected two steps"),
        ("trainer.profile_interval=[3,1]", "trainer.profile_interval=[3, 1]: expected two steps"),
        ("trainer.profile_interval=[-1,4]", "trainer.profile_interval=[-1, 4]: expected two steps"),
        ("checkpoint.save_contents=null", "checkpoint.save_contents=null: expected a list of some of model, optimizer"),
        ("checkpoint.save_contents=[modle]", "did you mean 'model'"),
        ("engine.model_dtype=bf17", "engine.model_dtype=bf17: expected one of"),
        ("engine.mixed_precision.reduce_dtype=fp", "engine.mixed_precision.reduce_dtype=fp: expected one of"),
        ("engine.mixed_precision.param_dtype=bf17", "did you mean 'bf16'"),
        ("engine.strategy=null", "engine.strategy=null: expected one of fsdp2, fsdp"),
        ("trainer.seed=abc", "trainer.seed=abc: expected an integer"),
        ("trainer.logger=wandbb", "did you mean 'wandb'"),
        ("trainer.logger=[console,swanlab]", "the package swanlab is not installed"),
        ("trainer.logger=[console,wandbb]", "trainer.logger=[console,wandbb]: wandbb is no backend; expected one or"),
        ("trainer.logger=null", "trainer.logger=null: expected one or several of console"),
        ("trainer.experiment_name=null", "trainer.experiment_name=null: expected a name"),
        ("data.train_max_samples=null", "data.train_max_samples=null: expected an integer of at least -1"),
        ("model.speculator=null", "model.speculator=None: expected settings"),
        ("model.tokenizer_path=/no/such", "model.tokenizer_path=/no/such"),
    ],
)
def test_settings_refused(attempt, tmp_path, more, words):
    assert_refused(attempt, words, tmp_path, more)


@pytest.mark.parametrize(
    "more",
    [
        ("optim.lr_warmup_steps=null",),
        ("optim.lr_warmup_steps=0",),
        ("optim.lr_warmup_steps=-1",),
        ("optim.betas=[0.8,0.95]", "optim.override_optimizer_config={eps: 1e-6}"),
        ("optim.override_optimizer_config={capturable: true}",),
        ("optim.optimizer=SGD", "optim.override_optimizer_config={momentum: 0.9}"),
        ("trainer.profile_interval=[2,3]",),
        ("trainer.experiment_name=3", "trainer.logger=file"),
        ("checkpoint.save_contents=[model]",),
        ("+optim.grad_clip=0.5",),
    ],
)
def test_settings_accepted(attempt, more):
    with pytest.raises(Started):
        attempt(*more)


def test_model_dtype_of_frozen_base_must_be_compute_dtype(attempt, tmp_path):
    types = ("engine.model_dtype=fp32", "engine.mixed_precision.param_dtype=bf16")
    words = "engine.model_dtype=fp32: a frozen base is held in the type that it computes in"
    assert_refused(attempt, words, tmp_path, *types)
    assert_refused(attempt, words, tmp_path, "engine.model_dtype=fp32", "engine.mixed_precision=null")
    with pytest.raises(Started):
        attempt(*types, "model.freeze_base_model=false")
    with pytest.raises(Started):
        attempt("engine.model_dtype=float32", "engine.mixed_precision.param_dtype=fp32")


def test_fsdp1_in_one_process_refused(attempt, tmp_path):
    words = "engine.strategy=fsdp: FSDP1 has nothing to shard in one process; expected fsdp2"
    assert_refused(attempt, words, tmp_path, "engine.strategy=fsdp", trainer__device="cuda")


@pytest.mark.parametrize("name", VISION)
def test_base_that_reads_images_refused(attempt, tmp_path_factory, tmp_path, tokenizer, name):
    """verl gives some of them positions in four rows, and no command of this package can load them."""
    base = make_vision_base(name, tmp_path_factory.mktemp(name), tokenizer)
    words = f"model.partial_pretrain={base}: {name} is a model of images and text"
    assert_refused(attempt, words, tmp_path, model__partial_pretrain=base)


def test_sum_lstm_untied_weights_refused(attempt, tmp_path):
    more = ("model.speculator.method=sum_lstm", "model.speculator.tie_weights=false")
    assert_refused(attempt, "needs model.speculator.tie_weights=true", tmp_path, *more)


@pytest.mark.skipif(flash_attention_installed(), reason="flash-attn is installed here")
def test_flash_attention_not_installed_refused(attempt, tmp_path):
    more = "+model.override_config.attn_implementation=flash_attention_2"
    assert_refused(attempt, "flash-attn is not installed", tmp_path, more)


def test_compile_without_compiler_refused(attempt, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = "model.speculator.compile=true: no C++ compiler (no-such-compiler)"
    assert_refused(attempt, words, tmp_path, "model.speculator.compile=true")


@pytest.mark.parametrize("nproc", ["two", "0", "-1", "1.5", "", "²"])
def test_nproc_invalid_refused(attempt, nproc, tmp_path):
    assert_refused(attempt, f"nproc_per_node={nproc}: expected a positive integer", tmp_path, nproc=nproc)


@pytest.mark.parametrize("argv", [["2"], ["optim.lr=1", "x"], ["2", "optim.lr=1"]])
def test_launch_missing_arguments_shows_usage(argv):
    with pytest.raises(UserError, match=r"usage: run_speculator_training\.sh"):
        launch.launch(argv)


def test_save_path_with_special_characters_accepted(attempt, tmp_path):
    for name in ("bob's", "runs/lr=1e-4", "a b"):
        with pytest.raises(Started) as started:
            attempt(save_path=tmp_path / name)
        (given,) = [text for text in started.value.args[0] if text.startswith("trainer.default_local_dir=")]
        assert load_settings([given, "trainer.device=cpu"]).trainer.default_local_dir == str(tmp_path / name)


@pytest.mark.parametrize("name", ["/proc/runs/out", "x" * 300])
def test_save_path_that_cannot_be_made_refused(attempt, tmp_path, name):
    """Permissions would allow it: to a superuser anything, to anyone a name that is too long."""
    path = tmp_path / name
    assert_refused(attempt, f"save_path={path}: {path} cannot be written to (", tmp_path, save_path=path)


def test_save_path_link_to_nothing_refused(attempt, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert_refused(attempt, "is a link to nothing, expected a directory", tmp_path)


@pytest.fixture
def no_credentials(monkeypatch, tmp_path_factory):
    """An environment that is logged in nowhere."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in [
        name for name in os.environ if name.startswith(("WANDB_", "NETRC", "CLEARML_", "TRAINS_", "SWANLAB_"))
    ]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.usefixtures("no_credentials")
def test_wandb_without_login_refused(attempt, tmp_path):
    pytest.importorskip("wandb")
    assert_refused(attempt, "trainer.logger=wandb: not logged in; run `wandb login`", tmp_path, "trainer.logger=wandb")


def test_wandb_broken_key_refused(attempt, tmp_path, no_credentials):
    pytest.importorskip("wandb")
    no_credentials.setenv("WANDB_API_KEY", "short")
    assert_refused(attempt, "API key must have 40+ characters", tmp_path, "trainer.logger=wandb")


def test_wandb_offline_needs_no_login(attempt, no_credentials):
    pytest.importorskip("wandb")
    no_credentials.setenv("WANDB_MODE", "offline")
    with pytest.raises(Started):
        attempt("trainer.logger=wandb")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swanlab", "not logged in; run `swanlab login`"),
        ("clearml", "no credentials; run `clearml-init`"),
        ("vemlp_wandb", "no credentials; set VOLC_ACCESS_KEY_ID, VOLC_SECRET_ACCESS_KEY, MLP_TRACKING_REGION"),
    ],
)
def test_loggers_without_login_refused(attempt, tmp_path, tmp_path_factory, no_credentials, name, words):
    """The packages, which are not installed here, are empty ones: their credentials are stored elsewhere."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / f"{LOGGERS[name][0]}.py").write_text("")
    no_credentials.syspath_prepend(packages)
    assert_refused(attempt, f"trainer.logger={name}: {words}", tmp_path, f"trainer.logger={name}")


@pytest.mark.parametrize(
    ("logger", "variable", "value"),
    [
        ("tensorboard", "TENSORBOARD_DIR", "/proc/log"),
        ("file", "VERL_FILE_LOGGER_PATH", "no/such/folder/log.jsonl"),
        ("file", "VERL_FILE_LOGGER_ROOT", "/proc"),
    ],
)
def test_loggers_without_a_place_to_write_refused(attempt, tmp_path, monkeypatch, logger, variable, value):
    monkeypatch.setenv(variable, value)
    assert_refused(attempt, f"trainer.logger={logger}: ", tmp_path, f"trainer.logger={logger}")


def test_save_path_is_a_file_refused(attempt, tmp_path):
    (tmp_path / "out").write_text("")
    assert_refused(attempt, "is a file, expected a directory", tmp_path)


def test_data_refused(attempt, tmp_path):
    (tmp_path / "bad.parquet").write_text("no parquet")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), empty)
    other = write_parquet(tmp_path / "other.parquet", [{"question": "a"}] * 8)
    text = write_parquet(tmp_path / "text.parquet", [{"text": "one two"}] * 8)
    silent = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": ""}]}] * 8
    mute = write_parquet(tmp_path / "mute.parquet", silent)
    for file, words in {
        tmp_path / "bad.parquet": "not a parquet file",
        empty: "holds no rows",
        other: "no column 'messages'",
        mute: "no row has anything to draft",
    }.items():
        assert_refused(attempt, words, tmp_path, data__train_files=file)
    assert_refused(attempt, "hold plain text", tmp_path, data__val_files=text)
    odd = write_parquet(tmp_path / "odd.parquet", [{"messages": "one"}] * 8)
    holes = write_parquet(tmp_path / "holes.parquet", [{"text": "one"}] * 8 + [{"text": None}])
    for truncation in ("error", "right"):
        cut = f"data.truncation={truncation}"
        assert_refused(attempt, "row 0: messages is 'one', expected a list", tmp_path, cut, data__train_files=odd)
        assert_refused(attempt, "row 8: text is None, expected a text", tmp_path, cut, data__train_files=holes)
    short = ("data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=64")
    assert_refused(attempt, "data.max_token_len_per_gpu=64: must hold a whole row", tmp_path, *short)


@pytest.mark.parametrize(
    ("row", "command"),
    [
        (
            {"prompt": "one", "response": "two"},
            "`verl-speculator prepare {file} --out {stem}` makes {stem}/train.parquet",
        ),
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, "prepare {file}"),
        (
            {"prompt": [{"role": "user", "content": "one"}], "reward_model": {"ground_truth": "4"}},
            "`verl-speculator regenerate --base {base} --data {file} --out {stem}.answers.parquet` answers its prompts",
        ),
        ({"other": "one"}, "set data.messages_key or data.text_key"),
    ],
    ids=["pairs", "sharegpt", "rl", "unknown"],
)
def test_data_in_another_format_names_the_command_that_converts_it(attempt, base, tmp_path, row, command):
    file = write_parquet(tmp_path / "other.parquet", [row] * 9)
    words = command.format(file=file, stem=file.with_suffix(""), base=base)
    assert_refused(attempt, words, tmp_path, data__train_files=file)


def test_data_that_is_no_parquet_names_the_command_that_converts_it(attempt, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    words = f"expected parquet; `verl-speculator prepare {file} --out {tmp_path / 'chats'}` makes"
    assert_refused(attempt, words, tmp_path, data__train_files=file)


def test_row_over_max_length_refused(attempt, tmp_path):
    rows = make_chat_rows(9)
    rows[7]["messages"][-1]["content"] = "one two " * 600
    file = write_parquet(tmp_path / "long.parquet", rows)
    assert_refused(attempt, "row 7 has", tmp_path, data__train_files=file)
    with pytest.raises(Started):
        attempt("data.truncation=right", data__train_files=file)


def test_chat_template_index_error_refused_in_one_line(attempt, base, tmp_path, tmp_path_factory):
    folder = copy_of(base, tmp_path_factory.mktemp("bases") / "base", "config.json", lambda config: None)
    (folder / "chat_template.jinja").write_text("{{ '{1}'.format(0) }}")
    words = "row 0: the chat template refuses it: tuple index out of range"
    assert_refused(attempt, words, tmp_path, model__partial_pretrain=folder)


@pytest.fixture
def run_folder(tmp_path, tokenizer):
    """A run with a checkpoint at step 3, of the shape of SMALL."""
    folder = tmp_path / "out" / "global_step_3"
    speculator = build_speculator(SpeculatorConfig(**SMALL), hidden_size=32, vocab_size=len(tokenizer))
    save_speculator(speculator, folder)
    (folder / "training_state").mkdir()
    for name in STATE_FILES:
        torch.save({}, folder / "training_state" / name)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def test_checkpoints_refused(attempt, run_folder, tmp_path):
    with pytest.raises(Started):
        attempt()
    with pytest.raises(Started):
        attempt(f"model.speculator.path={run_folder.parent}", save_path=tmp_path / "elsewhere")
    differing = ("model.speculator.n_predict=4", "model.speculator.inner_dim=24")
    words = "n_predict (3, 4), inner_dim (16, 24)"
    assert_refused(attempt, words, tmp_path, *differing)
    start = f"model.speculator.path={run_folder}"
    assert_refused(attempt, words, tmp_path, *differing, start, "trainer.resume_mode=disable")

    for file in (run_folder / "training_state" / "optimizer.pt", run_folder / "pytorch_model.bin"):
        whole = file.read_bytes()
        file.unlink()
        assert_refused(attempt, f"{file}: no such file", tmp_path)
        file.write_bytes(whole[: len(whole) // 2])
        assert_refused(attempt, f"{file}: truncated", tmp_path)
        file.write_bytes(whole)

    config = json.loads((run_folder / "config.json").read_text())
    recorded = {
        "base": {"trained_jointly": True, "weights_fingerprint": "other"},
        "data": {"train_rows": 41},
        "training": {
            "train_batch_size": 16,
            "lr": 5e-2,
            "seed": 2,
            "speculator_lr": 0.5,
            "loss": {"kl": 1.0},
            "depth_weights": [1, 0.5, 0.5],
        },
    }
    (run_folder / "config.json").write_text(json.dumps(config | {"verl_speculator": recorded}))
    with pytest.raises(UserError) as error:
        attempt()
    for words in (
        "model.freeze_base_model (false, true)",
        "the base's weights (other, ",
        "data.train_batch_size (16, 8)",
        "trainer.seed (2, 1)",
        "rows of data.train_files (41, 40)",
        "model.speculator.loss ({'kl': 1.0}, {'ce': 1.0})",
        "model.speculator.depth_weights ([1, 0.5, 0.5], equal)",
    ):
        assert words in str(error.value)
    assert "optim.lr" not in str(error.value)
    assert "model.speculator.lr" not in str(error.value), "a run may go on with another learning rate"
    (run_folder / "config.json").write_text(json.dumps(config))
    assert_refused(attempt, "the trained base is not there", tmp_path, "model.freeze_base_model=false")
    (run_folder / "config.json").write_text(json.dumps(config | {"input_hidden_dim": 64}))
    assert_refused(attempt, "trained for a base of width (hidden_size) 64, this base has 32", tmp_path)
    (run_folder.parent / "latest_checkpointed_iteration.txt").write_text("9")
    assert_refused(attempt, "names step 9", tmp_path)


def record(run_folder, **sections):
    """Put sections into what a checkpoint records of its run."""
    file = run_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"verl_speculator": sections}))


@pytest.mark.parametrize(
    ("training", "settings", "more", "words"),
    [
        ({"speculator_loss_coeff": 2.0}, {}, (), "model.speculator_loss_coeff (2.0, 1.0)"),
        (
            {},
            {"model.speculator.loss": {"lk": 1.0}, "model.speculator.lk_eta": 3.0},
            ("model.speculator.loss=lk", "model.speculator.lk_eta=5"),
            "model.speculator.lk_eta (3.0, 5)",
        ),
        ({}, {"the contents of data.train_files": ["other"]}, (), "the contents of data.train_files"),
        ({}, {"data.messages_key": "chat"}, (), "data.messages_key (chat, messages)"),
        ({}, {"optim.optimizer": "SGD"}, (), "optim.optimizer (SGD, AdamW)"),
    ],
)
def test_resume_another_objective_or_data_refused(attempt, run_folder, tmp_path, training, settings, more, words):
    record(run_folder, training=training, settings=settings)
    assert_refused(attempt, words, tmp_path, *more)


def copy_of(folder, to, file, edit):
    """A model's folder with one JSON file changed."""
    shutil.copytree(folder, to)
    content = json.loads((to / file).read_text())
    edit(content)
    (to / file).write_text(json.dumps(content))
    return to


@pytest.fixture
def recorded_run(run_folder, base, chat, tmp_path):
    """A run whose checkpoint has the record that training writes, and the custom class that read its data."""
    from verl_speculator.data.run_record import record_settings
    from verl_speculator.training.model_config import SpeculatorModelConfig

    code = tmp_path / "dataset.py"
    code.write_text("from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset as Rows\n")
    given = [f"data.custom_cls.path={code}", "data.custom_cls.name=Rows"]
    run = load_run_config([*overrides(base, chat), f"trainer.default_local_dir={run_folder.parent}", *given])
    tokenizer = SpeculatorModelConfig(path=str(base), speculator=SMALL).tokenizer
    record(run_folder, settings=record_settings(run.tree, run.speculator.training, tokenizer))
    return given, code


def test_resume_as_recorded_accepted(attempt, recorded_run, base, tmp_path, caplog):
    """Also from a copy of the base model's folder, written by another version of transformers."""
    same = copy_of(base, tmp_path / "same", "config.json", lambda c: c.update(transformers_version="0"))
    for folder in (base, same):
        with pytest.raises(Started):
            attempt(*recorded_run[0], model__partial_pretrain=folder)
    assert not [text for text in caplog.messages if "resume=" in text]


def test_resume_another_tokenizer_template_configuration_or_class_refused(attempt, recorded_run, base, tmp_path):
    given, code = recorded_run
    other = copy_of(base, tmp_path / "other", "config.json", lambda c: c.update(rms_norm_eps=1e-3))
    words = copy_of(base, tmp_path / "words", "tokenizer.json", lambda c: c["model"]["merges"].pop())
    says = copy_of(base, tmp_path / "says", "config.json", lambda c: None)
    (says / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer, configuration = "the tokenizer or its chat template", "the base model's configuration"
    for change, name in {
        f"model.tokenizer_path={words}": tokenizer,
        f"model.tokenizer_path={says}": tokenizer,
        f"model.hf_config_path={other}": configuration,
    }.items():
        assert_refused(attempt, f"the run differs (its own, this run's): {name};", tmp_path, *given, change)
    for folder, name in {words: tokenizer, says: tokenizer, other: configuration}.items():
        words = f"the run differs (its own, this run's): {name};"
        assert_refused(attempt, words, tmp_path, *given, model__partial_pretrain=folder)
    assert_refused(attempt, "the code of data.custom_cls;", tmp_path)
    code.write_text(code.read_text() + "Rows.seed = 1\n")
    assert_refused(attempt, "the code of data.custom_cls;", tmp_path, *given)


def test_resume_unread_settings_not_compared(attempt, run_folder):
    record(run_folder, training={"kl_temperature": 2.0}, settings={"model.speculator.lk_eta": 3.0})
    with pytest.raises(Started):  # the loss is ce, which reads neither
        attempt("model.speculator.lk_eta=5")


def test_resume_other_optimizer_values_named_in_one_line(attempt, run_folder, caplog):
    record(run_folder, training={"lr": 0.1}, settings={"optim.weight_decay": 0.3, "optim.min_lr_ratio": 0.5})
    with pytest.raises(Started):
        attempt("optim.weight_decay=0.2")
    (message,) = [text for text in caplog.messages if "goes on with this run's values" in text]
    for words in ("optim.lr (0.1, 0.05)", "optim.weight_decay (0.3, 0.2)", "optim.min_lr_ratio (0.5, 0.1)"):
        assert words in message
    assert message.startswith(f"note: resume={run_folder}: ")


def test_resume_checkpoint_without_record_accepted_with_a_note(attempt, run_folder, caplog):
    with pytest.raises(Started):
        attempt()
    (message,) = caplog.messages
    assert "not compared, the checkpoint does not record" in message
    assert "the contents of data.train_files" in message


def test_base_without_chat_template_accepted(attempt, bases, tmp_path):
    from helpers.tiny_models import make_base, make_tokenizer

    plain = make_base("llama", tmp_path / "plain", make_tokenizer(chat_template=None))
    with pytest.raises(Started):
        attempt(model__partial_pretrain=plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["2"], "usage: run_speculator_training.sh"),
        (["two", "OUT"], "nproc_per_node=two"),
        (["1", "OUT", "model.speculator.inner_dim=1024."], "inner_dim=1024. is no width"),
        (["1", "OUT", "model.partial_pretrain=/no/such"], "data.train_files"),
    ],
)
def test_script_user_error_exits_with_2(arguments, words, tmp_path):
    out = tmp_path / "out"
    result = script(*(out if argument == "OUT" else argument for argument in arguments), HOME=str(tmp_path))
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_script_shows_help_and_configuration(tmp_path):
    assert "usage:" in script("--help").stdout
    shown = script(1, tmp_path / "out", "--cfg", "job", "model.speculator.inner_dim=8.16")
    assert "inner_dim: '8.16'" in shown.stdout or "inner_dim: 8.16" in shown.stdout
    assert not (tmp_path / "out").exists()
    assert Path(SCRIPT).stat().st_mode & 0o111


def test_script_runs_by_sh_and_through_a_symlink(tmp_path):
    link = tmp_path / "train.sh"
    link.symlink_to(SCRIPT)
    for command in (["sh", str(SCRIPT)], [str(link)], ["bash", str(SCRIPT)]):
        shown = subprocess.run([*command, "--version"], env=environment(), capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stdout.startswith("verl_speculator "), shown.stderr


def test_script_without_an_environment_says_what_to_do(tmp_path):
    """A copy without a .venv, and a python3 that has no package."""
    script = tmp_path / "run.sh"
    script.write_text(SCRIPT.read_text())
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    shown = subprocess.run(
        ["sh", str(script), "--help"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith("error: python3 has no verl") and shown.stderr.count("\n") == 1


def test_train_command_is_the_launcher(tmp_path):
    command = [sys.executable, "-m", "verl_speculator", "train"]
    helped = subprocess.run([*command, "--help"], env=environment(), capture_output=True, text=True)
    assert helped.returncode == 0 and "--recipe NAME" in helped.stdout and "n_predict=null" in helped.stdout
    wrong = subprocess.run(
        [*command, "1", str(tmp_path / "out"), "lr=3"], env=environment(), capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "error: lr is not a setting (did you mean 'optim.lr'?)"
