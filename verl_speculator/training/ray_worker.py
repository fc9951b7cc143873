"""SFT on a Ray cluster: the worker process, and the workers as the trainer calls them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ray
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

import verl_speculator.training.plugin  # noqa: F401  (fails loudly in a worker, where verl's own loading fails silently)
from verl_speculator.data.hidden_state_cache import StateCache
from verl_speculator.training.checkpointing import RunCheckpoints
from verl_speculator.training.platform_cpu import start_process_group
from verl_speculator.training.trainer import SpeculatorTrainer


class SpeculatorWorker(TrainingWorker):
    """verl's training worker with the checkpoints and cached hidden states of a run."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        start_process_group()
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def open_run(self, settings: Any, state_cache: str | None) -> int:
        """Start or resume a run; its step, as `RunCheckpoints.load_checkpoint`."""
        if state_cache is not None:
            self.engine.state_cache = StateCache(Path(state_cache))
        self.checkpoints = RunCheckpoints(self.engine, settings)
        return self.checkpoints.load_checkpoint()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_run(self, step: int, provenance: dict[str, Any]) -> None:
        """As `RunCheckpoints.save_checkpoint`."""
        self.checkpoints.save_checkpoint(step, provenance)


class RayWorkers:
    """All workers, with what the trainer calls of a training client, an engine and `RunCheckpoints` in its own process.

    The trainer is a single rank: it passes on global batches, and verl cuts them.

    Args:
        config: of each worker.
        settings: `trainer.*`: machines, workers on each, the device, and the run.
        state_cache: directory of cached hidden states, or None.
    """

    def __init__(self, config: TrainingWorkerConfig, settings: Any, state_cache: str | None) -> None:
        self.config, self.settings, self.state_cache = config, settings, state_cache

    def reset(self) -> None:
        """Start the workers and build their engines, whose configuration has the number of steps by now."""
        settings = self.settings
        self.group = RayWorkerGroup(
            resource_pool=RayResourcePool(process_on_nodes=[settings.n_gpus_per_node] * settings.nnodes),
            ray_cls_with_init=RayClassWithInitArgs(ray.remote(SpeculatorWorker), config=self.config),
            device_name=settings.device,
        )
        self.group.set_loss_fn(loss_fn=partial(sft_loss, config=None))
        self.group.reset()
        self.start_profile, self.stop_profile = self.group.start_profile, self.group.stop_profile
        self.save_checkpoint = self.group.save_run

    def train_batch(self, data: TensorDict) -> TensorDict:
        return self.group.train_batch(data).get()

    def infer_batch(self, data: TensorDict) -> TensorDict:
        return self.group.infer_batch(data).get()

    def step_profile(self) -> None:
        """Nothing: the workers count their own steps."""

    def get_data_parallel_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def load_checkpoint(self) -> int:
        """`RunCheckpoints.load_checkpoint` of the workers."""
        return self.group.open_run(self.settings, self.state_cache)[0]


class RaySpeculatorTrainer(SpeculatorTrainer):
    """`SpeculatorTrainer` on the workers of a Ray cluster. It runs in a process group of one process.

    The global batch of a step has the same rows as under torchrun: both follow one permutation.
    """

    def _build_engine(self) -> None:
        settings = self.config.trainer
        self.engine = RayWorkers(self._worker_config(), settings, self.config.data.cache_hidden_states)
        self.training_client = self.ckpt_handler = self.engine
        self.processes = settings.nnodes * settings.n_gpus_per_node

    def _build_ckpt_handler(self) -> None:
        """Nothing: the workers have their own."""

    def _get_batch_seqlens(self, data: TensorDict) -> list[int]:
        return data["input_ids"].offsets().diff().tolist()
