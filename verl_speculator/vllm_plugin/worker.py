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
from typing import Any, Protocol

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import DRAFT_TOKENS, read_checkpoint_info, read_weights
from verl_speculator.interop.engine_formats import DRAFT_MODEL, PROPOSER, first_few, shape_faults
from verl_speculator.models import Speculator
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.acceptance import AcceptanceStats
from verl_speculator.vllm_plugin.proposer import SpeculatorProposer


class ServedSpeculator(Protocol):
    """What a weight update needs of a drafter: `SpeculatorProposer` (V1 runner), `SpeculatorDraftModel` (V2 runner).

    Attributes:
        speculator: the module; under tensor parallelism its tables are this worker's rows.
        shards: the tables of which this worker holds some rows, by the names of their weights.
        stats: with the version of the weights.
    """

    speculator: Speculator
    shards: Mapping[str, Any]
    stats: AcceptanceStats


class StreamedUpdate:
    """New values of a served speculator, copied into its parameters as they arrive. Parameters keep their addresses, so
    that compiled and captured code stays valid.

    The sender waits until every bucket is received, so an error is raised only by `finish`: tensors of another
    speculator are received without a copy.

    Args:
        served: the drafter; None in a worker that does not draft, which ignores all tensors.
        shapes: of every whole parameter that will be sent, by the module's names.
    """

    def __init__(self, served: ServedSpeculator | None, shapes: Mapping[str, Sequence[int]]) -> None:
        self._pending: dict[str, Tensor] = {}
        self._shards: Mapping[str, Any] = {}
        self._shapes: dict[str, Sequence[int]] = {}
        self._error: UserError | None = None
        if served is None:
            return
        parameters, self._shards = dict(served.speculator.named_parameters()), served.shards
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._shapes |= {name: shard.whole_shape for name, shard in self._shards.items()}
        if faults := shape_faults(shapes, self._shapes):
            self._error = UserError(f"update_speculator: the tensors are another speculator's: {first_few(faults)}")
        else:
            self._pending = parameters

    @torch.no_grad()
    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a bucket of tensors; no reference to them is kept."""
        for name, tensor in tensors:
            if name not in self._pending or tuple(tensor.shape) != self._shapes[name]:
                continue
            parameter, shard = self._pending.pop(name), self._shards.get(name)
            if shard is None:
                parameter.copy_(tensor)
            else:
                shard.copy(tensor)

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

    def _served_speculator(self) -> ServedSpeculator | None:
        drafter = getattr(self.model_runner, "drafter", None)
        if isinstance(drafter, SpeculatorProposer):
            return drafter
        draft_model = self._draft_model()
        return draft_model if type(draft_model).__name__ == DRAFT_MODEL else None

    def _draft_model(self) -> Any:
        """The runner's draft model, None without one. The V1 runner of 0.24 has no method for it."""
        if hasattr(self.model_runner, "get_draft_model"):
            return self.model_runner.get_draft_model()
        return getattr(getattr(self.model_runner, "drafter", None), "model", None)

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
            UserError: for another speculator's parameters, and if a draft model of vLLM's own drafts (eagle3); the
                served one is unchanged.
        """
        served = self._served_speculator()
        if served is None:
            if (draft_model := self._draft_model()) is not None:
                raise UserError(
                    f"update_speculator: vLLM's own {type(draft_model).__name__} drafts; expected a drafter of this "
                    f"package, {PROPOSER} or {DRAFT_MODEL}, or vLLM's start_draft_weight_update"
                )
            return None
        if isinstance(source, (str, Path)):
            info, speculator = read_checkpoint_info(source), served.speculator
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
        update = StreamedUpdate(served, {name: tensor.shape for name, tensor in tensors.items()})
        update.copy(tensors.items())
        update.finish()
        served.stats.version = served.stats.version + 1 if version is None else version
        return served.stats.version

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

        served = self._served_speculator()
        update = StreamedUpdate(served, shapes)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=lambda tensors, is_last: update.copy(tensors))
        update.finish()
        if served is None:
            return None
        served.stats.version = served.stats.version if version is None else version
        return served.stats.version

    def acceptance_stats(self) -> dict[str, Any] | None:
        """`AcceptanceStats` since the last call. The V2 runner's draft model knows its version alone: there the engine
        counts, from its start on (`vllm:spec_decode_num_accepted_tokens` and others)."""
        served = self._served_speculator()
        return None if served is None else served.stats.take()

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
