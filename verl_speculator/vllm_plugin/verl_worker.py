"""verl's vLLM worker that can also take over a newer speculator. Imports verl and vLLM: for vLLM's workers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_speculator.vllm_plugin.proposer import StreamedUpdate
from verl_speculator.vllm_plugin.worker import SpeculatorWorkerExtension


class VerlSpeculatorWorkerExtension(SpeculatorWorkerExtension, vLLMColocateWorkerExtension):
    """Both extensions: vLLM mixes in one class, and verl's brings the synchronisation of the base's weights."""

    def update_speculator_from_ipc(
        self, shapes: Mapping[str, Sequence[int]], version: int | None = None, use_shm: bool = False
    ) -> int | None:
        """Draft with what the trainer's process of the same rank sends (`push.sync_speculator`) from the next step on.

        Each tensor is copied from the bucket that it arrives in: no second speculator lies on the device.

        Args:
            shapes: of every parameter that is sent, under the module's names.
            version: the trainer's step; None leaves the version as it is.
            use_shm: whether the buckets are in shared memory.

        Returns:
            The version; None in a worker that does not draft.

        Raises:
            UserError: for another speculator's; the one that is served stays as it is.
        """
        proposer = self._speculator_proposer()
        update = StreamedUpdate(None if proposer is None else proposer.speculator, shapes)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=lambda tensors, is_last: update.copy(tensors))
        update.finish()
        if proposer is None:
            return None
        if version is not None:
            proposer.account.version = version
        return proposer.account.version
