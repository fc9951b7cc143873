"""The trainer of `engine.trainer` as Ray's driver: the same loop, data, metrics and checkpoints, workers elsewhere."""

from __future__ import annotations

from functools import partial

from tensordict import TensorDict
from verl.workers.utils.losses import sft_loss

from verl_speculator.engine.ray_worker import RayCheckpoints, RayWorkers
from verl_speculator.engine.trainer import SpeculatorTrainer


class RaySpeculatorTrainer(SpeculatorTrainer):
    """Trains as `SpeculatorTrainer` does, on the workers of a Ray cluster; runs in a process group of its own, alone.

    A step's global batch has the rows that it has under torchrun: both follow one permutation.
    """

    @property
    def processes(self) -> int:
        return self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node

    def _build_engine(self) -> None:
        settings = self.config.trainer
        self.training_client = self.engine = RayWorkers(
            self._worker_config(),
            partial(sft_loss, config=None),
            settings.nnodes,
            settings.n_gpus_per_node,
            settings.device,
        )

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = RayCheckpoints(self)

    def _get_batch_seqlens(self, data: TensorDict) -> list[int]:
        return data["input_ids"].offsets().diff().tolist()
