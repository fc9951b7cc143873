"""vLLM's own update of a draft model's weights (`start_draft_weight_update`), with a file in the place of a trainer.

vLLM's engines of this kind receive over CUDA; this one runs wherever vLLM does. Imported in vLLM's own processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

NAME = "file"


@dataclass
class Chunk(WeightTransferUpdateInfo):
    """Every `count`-th tensor of a file, from the `index`-th on."""

    path: str
    index: int
    count: int


class FileWeightTransferEngine(WeightTransferEngine[WeightTransferInitInfo, Chunk]):
    """Starts and finishes as vLLM's engines for NCCL and CUDA IPC do."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Chunk

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Part of vLLM's interface."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Part of vLLM's interface."""
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """As vLLM's, which waits for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Chunk) -> None:
        """Load one chunk."""
        weights = torch.load(update_info.path, weights_only=True)
        self.model.load_weights(list(weights.items())[update_info.index :: update_info.count])

    def shutdown(self) -> None:
        """Nothing to release."""


WeightTransferEngineFactory.register_engine(NAME, FileWeightTransferEngine)
