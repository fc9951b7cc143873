"""verl's vLLM worker with the weight update of a served speculator. Imports verl and vLLM: for vLLM's workers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_speculator.vllm_plugin.worker import SpeculatorWorkerExtension, StreamedUpdate


class VerlSpeculatorWorkerExtension(SpeculatorWorkerExtension, vLLMColocateWorkerExtension):
    """Both extensions, since vLLM mixes in one class: verl's updates the weights of the target model."""

    def update_speculator_from_ipc(
        self, shapes: Mapping[str, Sequence[int]], version: int | None = None, use_shm: bool = False
    ) -> int | None:
        """Draft with what the trainer's process of the same rank sends (`rl.trainer.sync_speculator`).

        Each tensor is copied from the bucket in which it arrives, so the device never holds a second speculator.

        Args:
            shapes: of every parameter that is sent, by the module's names.
            version: the trainer's step; None keeps the version.
            use_shm: whether the buckets are in shared memory.

        Returns:
            The version; None in a worker that does not draft.

        Raises:
            UserError: for another speculator's parameters; the served one is unchanged.
        """
        proposer = self._speculator_proposer()
        update = StreamedUpdate(None if proposer is None else proposer.speculator, shapes)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=lambda tensors, is_last: update.copy(tensors))
        update.finish()
        if proposer is None:
            return None
        if version is not None:
            proposer.stats.version = version
        return proposer.stats.version
