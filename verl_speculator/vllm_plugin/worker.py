"""Weight update of a served speculator, and its acceptance statistics, inside a vLLM worker.

`worker_extension_cls="verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension"`. In verl it is
`VerlSpeculatorWorkerExtension` of this module, which also has verl's extension. Only that one imports verl and vLLM.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import DRAFT_TOKENS, read_checkpoint_info, read_weights
from verl_speculator.interop.engine_formats import first_few, shape_faults
from verl_speculator.models import Speculator
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.proposer import SpeculatorProposer


class StreamedUpdate:
    """New values of a served speculator, copied into its parameters as they arrive. Parameters keep their addresses, so
    that compiled and captured code stays valid.

    The sender waits until every bucket is received, so an error is raised only by `finish`: tensors of another
    speculator are received without a copy.

    Args:
        speculator: the served one; None in a worker that does not draft, which ignores all tensors.
        shapes: of every parameter that will be sent, by the module's names.
    """

    def __init__(self, speculator: Speculator | None, shapes: Mapping[str, Sequence[int]]) -> None:
        self._pending: dict[str, Tensor] = {}
        self._error: UserError | None = None
        if speculator is None:
            return
        parameters = dict(speculator.named_parameters())
        if faults := shape_faults(shapes, {name: parameter.shape for name, parameter in parameters.items()}):
            self._error = UserError(f"update_speculator: the tensors are another speculator's: {first_few(faults)}")
        else:
            self._pending = parameters

    @torch.no_grad()
    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a bucket of tensors; no reference to them is kept."""
        for name, tensor in tensors:
            parameter = self._pending.get(name)
            if parameter is not None and parameter.shape == tensor.shape:
                parameter.copy_(tensor)
                del self._pending[name]

    def finish(self) -> None:
        """After the last bucket.

        Raises:
            UserError: for parameters of another speculator; the served one is unchanged.
            RuntimeError: if an announced parameter was not sent; the served one is then partly new.
        """
        if self._error is not None:
            raise self._error
        if self._pending:
            raise RuntimeError(f"update_speculator: announced and not sent: {', '.join(self._pending)}")


class SpeculatorWorkerExtension:
    """Mixed into vLLM's worker class. Every method is called by `collective_rpc`, between two steps of the engine.

    Only the workers of the last pipeline stage draft; in all others the methods return None.
    """

    def _speculator_proposer(self) -> SpeculatorProposer | None:
        drafter = getattr(self.model_runner, "drafter", None)
        return drafter if isinstance(drafter, SpeculatorProposer) else None

    def update_speculator(
        self, source: str | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int | None = None
    ) -> int | None:
        """Draft with newer parameters from the next step on.

        Args:
            source: a checkpoint that this worker can read, or every parameter by the module's names.
            version: of these parameters in the statistics; by default the last one + 1.

        Returns:
            The version.

        Raises:
            UserError: for another speculator's parameters; the served one is unchanged.
        """
        proposer = self._speculator_proposer()
        if proposer is None:
            return None
        if isinstance(source, (str, Path)):
            info, speculator = read_checkpoint_info(source), proposer.speculator
            if differing := speculator.config.differences(info.config):
                raise UserError(
                    f"update_speculator: {info.directory} differs from what is served: {', '.join(differing)}"
                )
            info.check_base(speculator.hidden_size, speculator.vocab_size)
            source = read_weights(info)
            tokens = source.pop(DRAFT_TOKENS, None)
            if tokens is not None and not torch.equal(tokens, speculator.draft_tokens.cpu()):
                raise UserError(f"update_speculator: {info.directory} has another draft vocabulary than what is served")
        tensors = dict(source)
        update = StreamedUpdate(proposer.speculator, {name: tensor.shape for name, tensor in tensors.items()})
        update.copy(tensors.items())
        update.finish()
        proposer.stats.version = proposer.stats.version + 1 if version is None else version
        return proposer.stats.version

    def update_speculator_from_ipc(
        self, shapes: Mapping[str, Sequence[int]], version: int | None = None, use_shm: bool = False
    ) -> int | None:
        """As `update_speculator`, from the trainer's process of the same rank (`rl.trainer.sync_speculator`).

        For workers with verl's extension. Each tensor is copied from the bucket in which it arrives, so the device
        never holds a second speculator.

        Args:
            shapes: of every parameter that is sent, by the module's names.
            version: the trainer's step; None keeps the version.
            use_shm: whether the buckets are in shared memory.
        """
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        proposer = self._speculator_proposer()
        update = StreamedUpdate(None if proposer is None else proposer.speculator, shapes)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=lambda tensors, is_last: update.copy(tensors))
        update.finish()
        if proposer is None:
            return None
        proposer.stats.version = proposer.stats.version if version is None else version
        return proposer.stats.version

    def acceptance_stats(self) -> dict[str, Any] | None:
        """`AcceptanceStats` since the last call."""
        proposer = self._speculator_proposer()
        return None if proposer is None else proposer.stats.take()

    def write_acceptance_stats(self, directory: str) -> None:
        """Write `acceptance_stats` to a file of this worker's own: verl's `collective_rpc` returns no results."""
        stats = self.acceptance_stats()
        if stats is not None:
            with atomic_file(Path(directory) / f"{self.rank}.{os.getpid()}.json") as path:
                path.write_text(json.dumps(stats))


@functools.cache
def _verl_worker_extension() -> type:
    """Both extensions in one class, since vLLM mixes in one: verl's updates the weights of the target model."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    return type("VerlSpeculatorWorkerExtension", (SpeculatorWorkerExtension, vLLMColocateWorkerExtension), {})


def __getattr__(name: str) -> type:
    if name == "VerlSpeculatorWorkerExtension":
        return _verl_worker_extension()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
