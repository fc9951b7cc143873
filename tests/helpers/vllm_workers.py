"""Tensor-parallel workers of vLLM in one process, as far as our drafters meet them."""

from __future__ import annotations

import threading
from types import ModuleType

import torch


class Workers:
    """Tensor-parallel workers as threads, with the two collectives that the draft model calls."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.sent = size, threading.Barrier(size), [torch.empty(0)] * size
        self.rank = threading.local()

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.sent[self.rank.value] = tensor
        self.barrier.wait()
        received = list(self.sent)
        self.barrier.wait()
        return received

    def module(self) -> ModuleType:
        distributed = ModuleType("vllm.distributed")
        distributed.get_tensor_model_parallel_rank = lambda: self.rank.value
        distributed.get_tensor_model_parallel_world_size = lambda: self.size
        distributed.tensor_model_parallel_all_reduce = lambda tensor: sum(self.exchange(tensor))
        distributed.tensor_model_parallel_all_gather = lambda tensor: torch.cat(self.exchange(tensor), -1)
        return distributed

    def run(self, work) -> list:
        """The results of `work(rank)` on all workers."""
        results: list = [None] * self.size

        def on(rank: int) -> None:
            self.rank.value = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
