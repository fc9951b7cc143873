"""verl's vLLM worker that can also take over a newer speculator. Imports verl and vLLM: for vLLM's workers alone."""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_speculator.rollout.worker import SpeculatorWorkerExtension


class VerlSpeculatorWorkerExtension(SpeculatorWorkerExtension, vLLMColocateWorkerExtension):
    """Both extensions: vLLM mixes in one class, and verl's brings the synchronisation of the base's weights."""

    def update_speculator_from_ipc(self, version: int | None = None, use_shm: bool = False) -> int | None:
        """`update_speculator` with what the trainer's process of the same rank sends (`push.push_speculator`)."""
        tensors = {}
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        # The buffer is used again for the next bucket.
        receiver.receive_weights(
            on_bucket_received=lambda weights, is_last: tensors.update((n, t.clone()) for n, t in weights)
        )
        return self.update_speculator(tensors, version)
