"""A run's checkpoints for every architecture, frozen and joint: what is saved comes back to the bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import verl_speculator.preflight.launch as launch
from helpers.engine_harness import build_engine, gradients, make_batch, run_batch, weights, whole
from helpers.tiny_models import ARCHITECTURES
from helpers.training_runs import overrides
from verl_speculator.checkpoint.format import find_resume_path, load_speculator
from verl_speculator.utils.settings import UserError

pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.filterwarnings("ignore")]


def settings(**more):
    default = {"resume_mode": "auto", "resume_from_path": None, "max_ckpt_to_keep": None, "default_hdfs_dir": None}
    return SimpleNamespace(**(default | more))


def checkpoints(engine, folder, *, contents=("model", "optimizer", "extra"), **more):
    """Of a run in `folder`."""
    from verl.trainer.config import CheckpointConfig

    from verl_speculator.training.checkpointing import RunCheckpoints

    engine.checkpoint_config = CheckpointConfig(save_contents=list(contents))
    return RunCheckpoints(engine, settings(default_local_dir=str(folder), **more))


def step(engine, rows):
    run_batch(engine, make_batch(rows[:8]))
    engine.optimizer_step()
    engine.lr_scheduler_step()


EARLY_EXIT = {"method": "early_exit", "exit_layer": 1, "trainable": "head_and_block"}
MEDUSA = {"method": "medusa", "hidden_state": "pre_norm", "head": "frozen_shared"}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("name", "speculator"),
    [
        *((name, {"method": "sum_lstm"}) for name in ARCHITECTURES),
        *((name, MEDUSA) for name in ("gemma2", "qwen2_untied")),
        *((name, EARLY_EXIT) for name in ("gemma2", "qwen2_untied")),
        *((name, {"method": "eagle3"}) for name in ("gemma2", "qwen2_untied")),
    ],
    ids=[
        *ARCHITECTURES,
        *(f"{name}-{method}" for method in ("medusa", "early_exit", "eagle3") for name in ("gemma2", "untied")),
    ],
)
def test_what_is_saved_comes_back(bases, rows, tmp_path, name, joint, speculator):
    options = {"freeze_base_model": not joint, "speculator": speculator}
    engine = build_engine(bases[name], **options)
    step(engine, rows)
    checkpoints(engine, tmp_path).save_checkpoint(1, {})
    files = {entry.name for entry in (tmp_path / "global_step_1").iterdir()}
    assert files == {"config.json", "pytorch_model.bin", "training_state"} | ({"huggingface"} if joint else set())
    architectures = json.loads((bases[name] / "config.json").read_text())["architectures"]
    assert json.loads((tmp_path / "global_step_1" / "config.json").read_text())["base_model_archs"] == architectures

    again = build_engine(bases[name], **options)
    assert checkpoints(again, tmp_path).load_checkpoint() == 1
    for one, other in ((weights(engine), weights(again)),):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.lr_scheduler.state_dict() == engine.lr_scheduler.state_dict()
    for each in (engine, again):
        step(each, rows)
    one, other = gradients(engine), gradients(again)
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = weights(engine), weights(again)
    for key in one:  # the optimizer's state came back too
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-7)


class OnTheCPU(FullyShardedDataParallel):
    """FSDP1 as verl asks for it, but for the sending of rank 0's weights, which needs an accelerator."""

    def __init__(self, module, *, sync_module_states, **options):
        super().__init__(module, **options)


@pytest.fixture
def fsdp1(monkeypatch):
    """Options of an engine under FSDP1 on the CPU. It names devices by number, and so needs a number of the CPU."""
    monkeypatch.setattr("verl.workers.engine.fsdp.transformer_impl.FSDP", OnTheCPU)
    monkeypatch.setattr("verl.workers.engine.fsdp.transformer_impl.get_device_id", lambda: torch.device("cpu"))
    monkeypatch.setattr("verl.utils.fsdp_utils.get_device_id", lambda: 0)
    return {"strategy": "fsdp", "use_remove_padding": False}


@pytest.mark.parametrize("joint", [False, True])
def test_fsdp1_resumes_before_its_first_forward_pass(bases, rows, tmp_path, fsdp1, joint):
    """Without the packing probe nothing has made the whole model the root of its units before the weights are loaded;
    the speculator's unit, asked alone, would become one."""
    options = fsdp1 | {"freeze_base_model": not joint}
    engine = build_engine(bases["qwen2_untied"], **options)
    step(engine, rows)
    checkpoints(engine, tmp_path).save_checkpoint(1, {})
    again = build_engine(bases["qwen2_untied"], **options)
    assert checkpoints(again, tmp_path).load_checkpoint() == 1
    for each in (engine, again):
        step(each, rows)
    one, other = weights(engine), weights(again)
    assert any("draft" in key for key in one)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-7)


def test_without_state_there_is_nothing_to_resume_from(base, rows, tmp_path):
    engine = build_engine(base)
    checkpoints(engine, tmp_path, contents=["model"]).save_checkpoint(1, {})
    assert {entry.name for entry in (tmp_path / "global_step_1").iterdir()} == {"config.json", "pytorch_model.bin"}
    with pytest.raises(UserError, match="has no training_state to resume from"):
        checkpoints(engine, tmp_path).load_checkpoint()


@pytest.mark.parametrize("before", [None, 1e-2])
def test_resume_group_of_the_speculator_added_or_dropped(base, rows, tmp_path, before):
    """In joint training a learning rate of its own makes the speculator a group of its own."""

    def build(lr):
        return build_engine(base, freeze_base_model=False, speculator={"lr": lr})

    engine = build(before)
    step(engine, rows)
    checkpoints(engine, tmp_path).save_checkpoint(1, {})
    after = 1e-2 if before is None else None
    again = build(after)
    checkpoints(again, tmp_path).load_checkpoint()
    rates = [group["initial_lr"] for group in again.optimizer.param_groups]
    assert rates == again.lr_scheduler.base_lrs == ([1e-3] if after is None else [1e-3, 1e-2])
    moments, saved = again.optimizer.state, engine.optimizer.state
    for one, other in zip(again.module.parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(whole(moments[one]["exp_avg"]), whole(saved[other]["exp_avg"]))


def test_modes(base, tmp_path):
    engine = build_engine(base)
    assert checkpoints(engine, tmp_path / "empty").load_checkpoint() == 0
    run = tmp_path / "run"
    for number in (1, 2):
        checkpoints(engine, run).save_checkpoint(number, {})
    assert checkpoints(engine, run, resume_mode="disable").load_checkpoint() == 0
    assert checkpoints(engine, run).load_checkpoint() == 2
    named = {"resume_mode": "resume_path", "resume_from_path": str(run / "global_step_1")}
    assert checkpoints(engine, run, **named).load_checkpoint() == 1
    with pytest.raises(UserError, match="expected an existing global_step_N folder"):
        find_resume_path(run, settings(resume_from_path=str(run)))


def test_old_checkpoints_go_and_leftovers_too(base, tmp_path):
    engine = build_engine(base)
    (tmp_path / ".tmp.1.global_step_9").mkdir()
    for number in (1, 2, 3):
        checkpoints(engine, tmp_path, max_ckpt_to_keep=2).save_checkpoint(number, {})
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "global_step_2",
        "global_step_3",
        "latest_checkpointed_iteration.txt",
    }


@pytest.mark.parametrize("method", ["medusa", "early_exit"])
def test_soft_cap_of_the_base_is_saved_and_compared(bases, chat, tmp_path, method):
    """Gemma 2 caps its logits, and so does a draft with heads like its own; one without a cap is another objective."""
    speculator = {"method": method, "exit_layer": 1}
    engine = build_engine(bases["gemma2"], speculator=speculator)
    checkpoints(engine, tmp_path).save_checkpoint(1, {})
    folder = tmp_path / "global_step_1"
    content = json.loads((folder / "config.json").read_text())
    assert content["logit_cap"] == 5.0 and load_speculator(folder).logit_cap == 5.0
    del content["logit_cap"]
    (folder / "config.json").write_text(json.dumps(content))  # as written before caps were known
    with pytest.raises(UserError, match=r"cannot resume from .*: logit_cap \(None, 5\.0\)"):
        checkpoints(engine, tmp_path).load_checkpoint()
    arguments = ["1", str(tmp_path), *overrides(bases["gemma2"], chat, model__speculator__method=method)]
    with pytest.raises(UserError, match=r"the run differs .*: logit_cap \(None, 5\.0\)"):
        launch.launch([*arguments, "model.speculator.exit_layer=1"])
    again = build_engine(bases["gemma2"], speculator=speculator | {"path": str(folder)})
    assert again.speculator.logit_cap is None
    assert build_engine(bases["gemma2"]).speculator.logit_cap is None  # sum_rnn has heads of its own


def test_another_speculator_is_not_resumed(base, tmp_path):
    checkpoints(build_engine(base), tmp_path).save_checkpoint(1, {})
    other = build_engine(base, speculator={"n_predict": 2})
    with pytest.raises(UserError, match=r"cannot resume from .*: n_predict \(3, 2\)"):
        checkpoints(other, tmp_path).load_checkpoint()
