"""Weight update of a served speculator, and its acceptance statistics, inside a vLLM worker. Imports no vLLM.

`worker_extension_cls="verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension"`; verl's workers also need verl's
extension and get `verl_worker.VerlSpeculatorWorkerExtension`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights
from verl_speculator.models import Speculator
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError
from verl_speculator.vllm_plugin.proposer import SpeculatorProposer


class StreamedUpdate:
    """New values of a served speculator, copied into its parameters as they arrive. Parameters keep their addresses, so
    that compiled and captured code stays valid.

    The sender waits until every bucket of tensors is received. So nothing is raised before the last one: tensors of
    another speculator are received without a copy, and `finish` raises.

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
        faults = [f"missing {name}" for name in parameters if name not in shapes]
        faults += [f"unexpected {name}" for name in shapes if name not in parameters]
        faults += [
            f"{name} is {list(shapes[name])}, served is {list(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in shapes and list(shapes[name]) != list(parameter.shape)
        ]
        if not faults:
            self._pending = parameters
            return
        listed = "; ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        self._error = UserError(f"update_speculator: the tensors are another speculator's: {listed}")

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
        tensors = dict(source)
        update = StreamedUpdate(proposer.speculator, {name: tensor.shape for name, tensor in tensors.items()})
        update.copy(tensors.items())
        update.finish()
        proposer.stats.version = proposer.stats.version + 1 if version is None else version
        return proposer.stats.version

    def speculator_account(self) -> dict[str, Any] | None:
        """`AcceptanceStats` since the last call."""
        proposer = self._speculator_proposer()
        return None if proposer is None else proposer.stats.take()

    def write_speculator_account(self, directory: str) -> None:
        """Write `speculator_account` to a file of this worker's own: verl's `collective_rpc` returns no results."""
        account = self.speculator_account()
        if account is not None:
            with atomic_file(Path(directory) / f"{self.rank}.{os.getpid()}.json") as path:
                path.write_text(json.dumps(account))
