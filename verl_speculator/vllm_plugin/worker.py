"""What a vLLM worker learns: to take over a newer speculator, and to say which one drafts and how well. No vLLM here.

`worker_extension_cls="verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension"`; verl's workers need verl's
extension too, and get `verl_worker.VerlSpeculatorWorkerExtension`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.vllm_plugin.proposer import read_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from verl_speculator.vllm_plugin.proposer import SpeculatorProposer


class SpeculatorWorkerExtension:
    """Mixed into vLLM's worker class; every method is called by `collective_rpc`, between two steps of the engine.

    Only the workers of the last pipeline stage draft: elsewhere all methods do nothing and return None.
    """

    def _speculator_proposer(self) -> SpeculatorProposer | None:
        # Imported here, so that naming the class does not load torch into the process that only names it.
        from verl_speculator.vllm_plugin.proposer import SpeculatorProposer

        drafter = getattr(self.model_runner, "drafter", None)
        return drafter if isinstance(drafter, SpeculatorProposer) else None

    def update_speculator(
        self, source: str | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int | None = None
    ) -> int | None:
        """Draft with newer parameters from the next step on.

        Args:
            source: a checkpoint that this worker can read, or every parameter under the module's names.
            version: how the account calls them; one more than before by default.

        Returns:
            The version.

        Raises:
            UserError: for another speculator's; the one that is served stays as it is.
        """
        proposer = self._speculator_proposer()
        if proposer is None:
            return None
        tensors = read_parameters(source, proposer.speculator) if isinstance(source, (str, Path)) else dict(source)
        return proposer.update(tensors, version)

    def speculator_account(self) -> dict[str, Any] | None:
        """What was drafted and accepted since the last call, and by which version (`account.AcceptanceStats`)."""
        proposer = self._speculator_proposer()
        return None if proposer is None else proposer.account.take()

    def write_speculator_account(self, directory: str) -> None:
        """`speculator_account` as a file of this worker's own, for callers that get no results back, as verl's."""
        account = self.speculator_account()
        if account is not None:
            with atomic_file(Path(directory) / f"{self.rank}.{os.getpid()}.json") as path:
                path.write_text(json.dumps(account))
