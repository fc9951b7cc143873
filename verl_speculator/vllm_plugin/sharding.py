"""Embeddings and heads of a speculator, divided among vLLM's tensor-parallel workers. Imported by those alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from verl_speculator.models import Speculator
from verl_speculator.models.layers import Table, tables_of


def rows_loader(start: int, stop: int | None) -> Callable[..., None]:
    """A `weight_loader` in vLLM's sense: copies some rows of a checkpoint's tensor to the first rows of a parameter, or
    of a part of it (`Slot.part`). While vLLM updates weights, it replaces the loader and collects what it is given."""

    def load(param: Tensor, loaded_weight: Tensor, part: tuple[int, int, int] | None = None) -> None:
        rows = loaded_weight[start:stop]
        target = param if part is None else param.narrow(*part)
        target[: len(rows)].copy_(rows)

    return load


class VocabularyShard(nn.Module):
    """This worker's rows of an embedding or a head, which every tensor-parallel worker has equally many of.

    Args:
        table: the whole one, on any device.
        rank: of this worker.
        size: number of workers.
    """

    def __init__(self, table: Table, rank: int, size: int) -> None:
        super().__init__()
        self.whole_shape = rows, width = tuple(table.weight.shape)
        length = -(-rows // size)
        self.start, self.stop = (min(rows, (rank + i) * length) for i in (0, 1))
        self.weight = nn.Parameter(table.weight.new_zeros(length, width), requires_grad=False)
        self.load = rows_loader(self.start, self.stop)
        self.projection = table.projection
        self.copy(table.weight.detach())

    def project(self, x: Tensor) -> Tensor:
        """As `Table.project`, without a reference to the whole table."""
        return x if self.projection is None else self.projection(x)

    @torch.no_grad()
    def copy(self, whole: Tensor) -> None:
        """Copy this worker's rows of a whole table."""
        self.load(self.weight, whole)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., width] of tokens [...]: each worker looks up its own, and the results are added."""
        inside = (tokens >= self.start) & (tokens < self.stop)
        rows = F.embedding(torch.where(inside, tokens - self.start, 0), self.weight)
        return self.project(tensor_model_parallel_all_reduce(torch.where(inside[..., None], rows, 0)))


def shard_tables(speculator: Speculator) -> dict[str, VocabularyShard]:
    """Leave this worker its rows of every embedding and head; logits are gathered.

    Returns:
        By the names of their weights; empty without tensor parallelism.
    """
    if (size := get_tensor_model_parallel_world_size()) == 1:
        return {}
    shards = {}
    for name, table in tables_of(speculator).items():
        shards[name] = VocabularyShard(table, get_tensor_model_parallel_rank(), size)
        speculator.set_submodule(name.removesuffix(".weight"), shards[name])
    speculator.gather_logits = lambda logits: tensor_model_parallel_all_gather(logits)[..., : speculator.head_size]
    return shards
