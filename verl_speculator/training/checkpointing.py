"""A training run on disk: one directory a step, complete or absent, for any number of processes.

    <save_path>/global_step_N/pytorch_model.bin, config.json    the speculator (verl_speculator.checkpoint.format)
    <save_path>/global_step_N/training_state/                   what resuming needs: optimizer, schedule, random states
    <save_path>/global_step_N/huggingface/                      the base model, only if it was trained
    <save_path>/latest_checkpointed_iteration.txt               N, written last

Rank 0 gathers and writes, reads and sends, so the number of processes may change in between.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from verl.utils.device import get_device_name, get_torch_device

from verl_speculator.base_model.loading import load_base
from verl_speculator.checkpoint.format import (
    BASE_DIRECTORY,
    STATE_DIRECTORY,
    STATE_FILES,
    STEP_DIRECTORY,
    TRACKER_FILE,
    find_resume_path,
    read_checkpoint_info,
    read_weights,
    write_checkpoint,
)
from verl_speculator.training.base_model import from_rank_0
from verl_speculator.training.engine import SpeculatorEngine
from verl_speculator.training.joint_model import BASE_PREFIX, DRAFT_PREFIX
from verl_speculator.utils.atomic_io import atomic_directory, atomic_file, remove_directory, remove_temporaries
from verl_speculator.utils.settings import UserError

logger = logging.getLogger(__name__)

SPECULATOR_PREFIX = "speculator."
GATHER = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
SEND = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

State = dict[str, torch.Tensor]


def gather_speculator(engine: SpeculatorEngine) -> State:
    """The speculator's whole state under its own names, on rank 0 only. Every rank calls it."""
    return _strip_prefix(dcp.get_model_state_dict(engine.draft, options=GATHER), SPECULATOR_PREFIX)


def write_speculator(engine: SpeculatorEngine, folder: Path, parameters: State, provenance: dict[str, Any]) -> None:
    """Write a checkpoint of an engine's speculator from its gathered parameters."""
    write_checkpoint(
        folder,
        engine.model_config.speculator_config,
        parameters,
        hidden_size=engine.speculator.hidden_size,
        vocab_size=engine.speculator.vocab_size,
        logit_cap=engine.speculator.logit_cap,
        base_architectures=engine.model_config.architectures,
        provenance=provenance,
    )


def read_speculator(engine: SpeculatorEngine, folder: Path) -> State:
    """The parameters of a checkpoint under their names in the engine's `draft`.

    Raises:
        UserError: if the checkpoint is of another speculator.
    """
    info = read_checkpoint_info(folder)
    if differing := info.differences(engine.speculator.config, engine.speculator.logit_cap):
        raise UserError(f"cannot resume from {folder}: {', '.join(differing)}")
    return _add_prefix(read_weights(info), SPECULATOR_PREFIX)


def _strip_prefix(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _add_prefix(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@dataclass
class RunCheckpoints:
    """Saves and resumes a run.

    Args:
        engine: initialised before anything is saved or loaded. Its `checkpoint_config.save_contents` says whether to
            write what resuming needs.
        settings: verl's `trainer` settings: default_local_dir, resume_mode, resume_from_path, max_ckpt_to_keep,
            default_hdfs_dir.
    """

    engine: SpeculatorEngine
    settings: Any

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.settings.default_local_dir)

    # Saving

    def save_checkpoint(self, step: int, provenance: dict[str, Any]) -> None:
        """Write `global_step_<step>`, update the tracker file, and remove checkpoints beyond `max_ckpt_to_keep`.

        `provenance` is what rank 0 records in config.json.
        """
        engine = self.engine
        with _on_device(engine):
            speculator, base = self._gather_weights()
            optimizer = dcp.get_optimizer_state_dict(engine.module, engine.optimizer, options=GATHER)
        random_states = [None] * dist.get_world_size()
        dist.all_gather_object(random_states, _random_state())
        if dist.get_rank() == 0:
            target = self.directory / f"global_step_{step}"
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.directory)
            with atomic_directory(target) as folder:
                write_speculator(engine, folder, speculator, provenance)
                if "optimizer" in engine.checkpoint_config.save_contents:
                    (folder / STATE_DIRECTORY).mkdir()
                    contents = (optimizer, engine.lr_scheduler.state_dict(), random_states)
                    for name, content in zip(STATE_FILES, contents, strict=True):
                        torch.save(content, folder / STATE_DIRECTORY / name)
                if base:
                    self._save_base(folder / BASE_DIRECTORY, base)
            with atomic_file(self.directory / TRACKER_FILE) as path:
                path.write_text(str(step))
            logger.info("saved %s", target)
            self._prune(step)
            if self.settings.default_hdfs_dir:
                from verl.utils import hdfs_io

                hdfs_io.makedirs(self.settings.default_hdfs_dir, exist_ok=True)
                hdfs_io.copy(src=str(target), dst=self.settings.default_hdfs_dir, dirs_exist_ok=True)
        dist.barrier()

    def _gather_weights(self) -> tuple[State, State]:
        """Whole weights of the speculator, and of the base model if it is trained, on rank 0 only."""
        if self.engine.model_config.freeze_base_model:  # a base model that does not change is never gathered
            return gather_speculator(self.engine), {}
        state = dcp.get_model_state_dict(self.engine.module, options=GATHER)
        return _strip_prefix(state, DRAFT_PREFIX + SPECULATOR_PREFIX), _strip_prefix(state, BASE_PREFIX)

    def _save_base(self, folder: Path, state: State) -> None:
        """The base model as a Hugging Face folder with its tokenizer, in the dtype in which it is trained."""
        from verl.utils.transformers_compat import drop_tied_target_keys

        base = self.engine.base
        with torch.device("meta"):
            model = type(base)(base.config)
        drop_tied_target_keys(state, model, base.config)
        model.generation_config = self.engine.model_config.generation_config or model.generation_config
        model.save_pretrained(folder, state_dict=state)
        self.engine.model_config.get_processor().save_pretrained(folder)

    def _prune(self, step: int) -> None:
        keep = max(self.settings.max_ckpt_to_keep or 0, 0)  # 0 keeps all: [:-0] is empty
        steps = sorted(int(m[1]) for entry in self.directory.iterdir() if (m := STEP_DIRECTORY.match(entry.name)))
        for old in [s for s in steps if s <= step][:-keep]:
            remove_directory(self.directory / f"global_step_{old}")

    # Resuming

    def load_checkpoint(self) -> int:
        """Load the checkpoint that the settings name; its step, or 0 for a fresh start."""
        rank, engine = dist.get_rank(), self.engine
        folder = from_rank_0(find_resume_path(self.directory, self.settings) if rank == 0 else None)
        if folder is None:
            return 0
        weights, optimizer, *states = self._read(folder) if rank == 0 else ({}, {})
        with _on_device(engine):
            module = engine.draft if engine.model_config.freeze_base_model else engine.module
            dcp.set_model_state_dict(module, weights, options=SEND)
            _load_optimizer(engine, optimizer)
        schedule, random_states = from_rank_0(states)
        # The position on the schedule is the checkpoint's; the schedule itself is this run's.
        current = {name: engine.lr_scheduler.state_dict()[name] for name in ("base_lrs", "lr_lambdas")}
        engine.lr_scheduler.load_state_dict(schedule | current)
        engine.lr_scheduler.last_epoch -= 1
        engine.lr_scheduler._update_lr()  # one step on: sets the rates by this run's schedule
        if len(random_states) == dist.get_world_size():
            _set_random_state(random_states[rank])
        logger.info("resumed from %s", folder)
        return int(STEP_DIRECTORY.match(folder.name)[1])

    def _read(self, folder: Path) -> tuple[State, dict, dict, list]:
        weights = read_speculator(self.engine, folder)
        if not self.engine.model_config.freeze_base_model:
            base = load_base(folder / BASE_DIRECTORY, device="cpu", dtype=torch.float32).state_dict()
            weights = _add_prefix(weights, DRAFT_PREFIX) | _add_prefix(base, BASE_PREFIX)
        state = folder / STATE_DIRECTORY
        return weights, *(torch.load(state / name, map_location="cpu", weights_only=True) for name in STATE_FILES)


def _load_optimizer(engine: SpeculatorEngine, saved: dict[str, Any]) -> None:
    """Load the moments of each parameter from rank 0's state dict, empty on the other ranks. Learning rates, weight
    decay and betas stay those of this run."""
    groups = engine.optimizer.param_groups
    options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    if saved:
        saved = saved | {"param_groups": _regroup(saved["param_groups"], len(groups))}
    dcp.set_optimizer_state_dict(engine.module, engine.optimizer, saved, options=SEND)
    for group, option in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(option)


def _regroup(saved: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Saved groups in this run's number: one group, or the base model's and the speculator's."""
    if len(saved) == count:
        return saved
    names = [name for group in saved for name in group["params"]]
    halves = [[name for name in names if name.startswith(DRAFT_PREFIX) is is_draft] for is_draft in (False, True)]
    return [saved[0] | {"params": params} for params in ([names] if count == 1 else halves)]


@contextmanager
def _on_device(engine: SpeculatorEngine) -> Iterator[None]:
    """Loads shards that verl offloads to the host onto the device, as verl does for its own checkpoints.

    Under FSDP1 this also makes the whole model the root of its units, before the state of a single unit is read.
    """
    if not engine._uses_fsdp2_cpu_offload_policy:
        engine.to(get_device_name())
    yield
    engine.to("cpu", model=engine.is_param_offload_enabled, optimizer=engine.is_optimizer_offload_enabled, grad=False)


def _random_state() -> dict[str, Any]:
    """The random states of this process, in types that `torch.load(weights_only=True)` accepts."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if get_device_name() != "cpu":
        state["device"] = get_torch_device().get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "device" in state and get_device_name() != "cpu":
        get_torch_device().set_rng_state(state["device"])
