"""A KV cache that is written in place and rolled back by moving its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

CHUNK = 256


class RollbackLayer(DynamicLayer):
    """One layer's keys and values in buffers with room to spare.

    transformers' own layer copies the whole cache at every call. This one copies the new tokens alone, and rolling back
    copies nothing. Layers with a sliding window keep everything too: what lies outside the window is masked, and a
    rollback may need what a window of the exact size has already dropped.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.length = 0
        self.stores = tuple(x.new_empty(*x.shape[:-2], 0, x.shape[-1]) for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind the current end; all keys and values up to the new one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.stores[0].shape[-2]:
            self.stores = tuple(self._grow(store, end) for store in self.stores)
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[..., self.length : end, :] = new
        self._end_at(end)
        return self.keys, self.values

    def _grow(self, store: Tensor, least: int) -> Tensor:
        """A larger buffer with the same beginning; doubling keeps the cost of growing at a constant for each token."""
        room = -(-max(least, 2 * store.shape[-2]) // CHUNK) * CHUNK
        grown = store.new_empty(*store.shape[:-2], room, store.shape[-1])
        grown[..., : self.length, :] = store[..., : self.length, :]
        return grown

    def _end_at(self, end: int) -> None:
        self.length = end
        self.keys, self.values = (store[..., :end, :] for store in self.stores)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length if self.is_initialized else 0

    def crop(self, max_length: int) -> None:
        """Forget all tokens from `max_length` on; what stays is not touched."""
        if max_length < self.get_seq_length():
            self._end_at(max_length)

    def keep(self, length: int, rows: Tensor) -> None:
        """Forget all tokens from `length` on but those at `length + rows`, which move together behind it.

        Args:
            length: tokens that stay where they are.
            rows: [N] ascending.
        """
        for store in self.stores:
            # What is picked is a copy before anything is written.
            store[..., length : length + len(rows), :] = store[..., length + rows.to(store.device), :]
        self._end_at(length + len(rows))


def rollback_cache() -> Cache:
    """An empty cache of `RollbackLayer`s for any base whose layers attend to keys and values."""
    return Cache(layer_class_to_replicate=RollbackLayer)


def roll_back(cache: Cache, length: int) -> None:
    """Keep the first `length` tokens of a cache."""
    for layer in cache.layers:
        layer.crop(length)


def keep_rows(cache: Cache, length: int, rows: Tensor) -> None:
    """Keep the first `length` tokens of a cache and, next to them, those that lie `rows` [N] behind."""
    for layer in cache.layers:
        layer.keep(length, rows)
