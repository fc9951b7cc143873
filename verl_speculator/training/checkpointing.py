"""A training run on disk: one directory a step, whole or not there at all, for any number of processes.

    <save_path>/global_step_N/pytorch_model.bin, config.json    the speculator (verl_speculator.checkpoint.format)
    <save_path>/global_step_N/training_state/                   optimizer, schedule, random states: what resuming needs
    <save_path>/global_step_N/huggingface/                      the base, only if it was trained
    <save_path>/latest_checkpointed_iteration.txt               N, written last

Rank 0 gathers and writes, reads and sends: the number of processes may change in between.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.fsdp_utils import (
    load_fsdp_model_to_gpu,
    load_fsdp_optimizer,
    offload_fsdp_model_to_cpu,
    offload_fsdp_optimizer,
)

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
from verl_speculator.training.engine import SpeculatorEngine
from verl_speculator.training.joint_model import BASE_PREFIX, DRAFT_PREFIX
from verl_speculator.utils.atomic_io import atomic_directory, atomic_file, remove_directory, remove_temporaries
from verl_speculator.utils.errors import UserError

logger = logging.getLogger(__name__)

SPECULATOR_PREFIX = "speculator."
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
SEND = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class RunCheckpoints:
    """Saves and resumes a run; the interface is that of verl's CheckpointHandler.

    Args:
        engine: initialised by the time anything is saved or loaded.
        directory: the run's folder.
        settings: verl's `trainer` settings: resume_mode, resume_from_path, max_ckpt_to_keep, default_hdfs_dir.
        save_state: whether to write what resuming needs.
        provenance: gives what config.json records of a step.
    """

    def __init__(
        self,
        engine: SpeculatorEngine,
        directory: str,
        settings: Any,
        *,
        save_state: bool,
        provenance: Callable[[int], dict[str, Any]],
    ) -> None:
        self.engine = engine
        self.directory = Path(directory)
        self.settings = settings
        self.save_state = save_state
        self.provenance = provenance
        self.rank = dist.get_rank()

    # Saving

    def save_checkpoint(self, step: int) -> None:
        """Write `global_step_<step>`, point the tracker to it, and remove what `max_ckpt_to_keep` no longer keeps."""
        engine = self.engine
        with _on_device(engine):
            speculator, base = self._gather_weights()
            optimizer = get_optimizer_state_dict(engine.module, engine.optimizer, options=GATHER)
        random_states = [None] * dist.get_world_size()
        dist.all_gather_object(random_states, _random_state())
        if self.rank == 0:
            target = self.directory / f"global_step_{step}"
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.directory)
            with atomic_directory(target) as folder:
                config = engine.model_config.speculator_config
                write_checkpoint(
                    folder,
                    config,
                    speculator,
                    hidden_size=engine.speculator.hidden_size,
                    vocab_size=engine.speculator.vocab_size,
                    logit_cap=engine.speculator.logit_cap,
                    base_architectures=engine.model_config.architectures,
                    provenance=self.provenance(step),
                )
                if self.save_state:
                    state = folder / STATE_DIRECTORY
                    state.mkdir()
                    for name, content in zip(
                        STATE_FILES, (optimizer, engine.lr_scheduler.state_dict(), random_states), strict=True
                    ):
                        torch.save(content, state / name)
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

    def _gather_weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Whole weights of the speculator, and of the base if it is trained; filled on rank 0 only."""
        engine = self.engine
        if engine.model_config.freeze_base_model:  # never gather a base that does not change
            draft, base = get_model_state_dict(engine.draft, options=GATHER), {}
        else:
            state = get_model_state_dict(engine.module, options=GATHER)
            draft = {k.removeprefix(DRAFT_PREFIX): v for k, v in state.items() if k.startswith(DRAFT_PREFIX)}
            base = {k.removeprefix(BASE_PREFIX): v for k, v in state.items() if k.startswith(BASE_PREFIX)}
        return {k.removeprefix(SPECULATOR_PREFIX): v for k, v in draft.items()}, base

    def _save_base(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """The base as a Hugging Face folder, in the type it is trained in, with its tokenizer."""
        from verl.utils.transformers_compat import drop_tied_target_keys

        base = self.engine.base
        with torch.device("meta"):
            model = type(base)(base.config)
        drop_tied_target_keys(state, model, base.config)
        model.generation_config = self.engine.model_config.generation_config or model.generation_config
        model.save_pretrained(folder, state_dict=state)
        self.engine.model_config.get_processor().save_pretrained(folder)

    def _prune(self, step: int) -> None:
        keep = self.settings.max_ckpt_to_keep
        if not keep or keep < 1:
            return
        steps = sorted(int(m[1]) for entry in self.directory.iterdir() if (m := STEP_DIRECTORY.match(entry.name)))
        for old in [s for s in steps if s <= step][:-keep]:
            remove_directory(self.directory / f"global_step_{old}")

    # Resuming

    def load_checkpoint(self) -> int:
        """Continue where the settings say; the step reached so far, 0 for a fresh start."""
        found = [find_resume_path(self.directory, self.settings) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return 0
        folder, engine = found[0], self.engine
        weights, optimizer, schedule, random_states = self._read(folder) if self.rank == 0 else ({}, {}, None, None)
        with _on_device(engine):
            if engine.model_config.freeze_base_model:
                set_model_state_dict(engine.draft, weights, options=SEND)
            else:
                set_model_state_dict(engine.module, weights, options=SEND)
            _load_optimizer(engine, optimizer)
        small = [schedule, random_states]
        dist.broadcast_object_list(small, src=0)
        # Where on the schedule the run is; the schedule's own peaks are this run's.
        own = {name: engine.lr_scheduler.state_dict()[name] for name in ("base_lrs", "lr_lambdas")}
        engine.lr_scheduler.load_state_dict(small[0] | own)
        _apply_schedule(engine.lr_scheduler)
        if len(small[1]) == dist.get_world_size():
            _set_random_state(small[1][self.rank])
        logger.info("resumed from %s", folder)
        return int(STEP_DIRECTORY.match(folder.name)[1])

    def _read(self, folder: Path) -> tuple[dict, dict, dict, list]:
        info = read_checkpoint_info(folder)
        speculator = self.engine.speculator
        if differing := info.differences(speculator.config, speculator.logit_cap):
            raise UserError(f"cannot resume from {folder}: {', '.join(differing)}")
        weights = {SPECULATOR_PREFIX + name: tensor for name, tensor in read_weights(info).items()}
        if not self.engine.model_config.freeze_base_model:
            weights = {DRAFT_PREFIX + name: tensor for name, tensor in weights.items()} | _read_base(folder)
        state = [
            torch.load(folder / STATE_DIRECTORY / name, map_location="cpu", weights_only=True) for name in STATE_FILES
        ]
        return weights, *state


def _read_base(folder: Path) -> dict[str, torch.Tensor]:
    state = load_base(folder / BASE_DIRECTORY, device="cpu", dtype=torch.float32).state_dict()
    return {BASE_PREFIX + name: tensor for name, tensor in state.items()}


def _load_optimizer(engine: SpeculatorEngine, saved: dict[str, Any]) -> None:
    """The moments of each parameter as they were saved; learning rates, weight decay, betas as this run sets them.

    Args:
        engine: of this run.
        saved: an optimizer's whole state dict on the first process, nothing on the others.
    """
    groups = engine.optimizer.param_groups
    options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    if saved:
        saved = saved | {"param_groups": _regroup(saved["param_groups"], len(groups))}
    set_optimizer_state_dict(engine.module, engine.optimizer, saved, options=SEND)
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)


def _regroup(saved: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Saved groups in the number that this run has: one, or the base model's and the speculator's."""
    if len(saved) == count:
        return saved
    names = [name for group in saved for name in group["params"]]
    drafts = [name for name in names if name.startswith(DRAFT_PREFIX)]
    parts = [names] if count == 1 else [[name for name in names if name not in set(drafts)], drafts]
    return [saved[0] | {"params": part} for part in parts]


def _apply_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Learning rates of the step reached, on the schedule as it is now: a run may have been given more steps."""
    factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


@contextmanager
def _on_device(engine: SpeculatorEngine) -> Iterator[None]:
    """With shards that verl offloads to the host on the device, as verl has them for its own checkpoints.

    Under FSDP1 this is also where the whole model becomes the root of its units, before one of them is asked alone.
    """
    if not engine._uses_fsdp2_cpu_offload_policy:
        load_fsdp_model_to_gpu(engine.module)
        load_fsdp_optimizer(engine.optimizer, get_device_id())
    yield
    if engine.is_param_offload_enabled:
        offload_fsdp_model_to_cpu(engine.module)
    if engine.is_optimizer_offload_enabled:
        offload_fsdp_optimizer(engine.optimizer)


def _random_state() -> dict[str, Any]:
    """The random states of this process, in types that a weights-only load accepts."""
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
