"""The target model: reads tokens into a KV cache that can be rolled back, one after another or as a draft tree.

Shapes: N tokens read at once, D base width, V vocabulary, L tokens in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from verl_speculator.base_model.cpu import GROUPED
from verl_speculator.base_model.hidden_states import POST_NORM, HiddenStateHook
from verl_speculator.base_model.loading import check_rollback
from verl_speculator.utils.settings import UserError

CHUNK = 256
# These attention implementations take any mask. The flash kernels know causal attention only.
IMPLEMENTATIONS = ("eager", "sdpa", GROUPED)
FULL, SLIDING = "full_attention", "sliding_attention"


class RollbackLayer(DynamicLayer):
    """Keys and values of one layer in preallocated buffers.

    transformers' own layer copies the whole cache at every call; this one copies the new tokens only, and rolling back
    copies nothing. A layer with a sliding window keeps all tokens too: the mask hides those outside of the window, and
    a rollback may need what a buffer of the window's size has already dropped.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.length = 0
        self.buffers = tuple(x.new_empty(*x.shape[:-2], 0, x.shape[-1]) for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            self.buffers = tuple(self._grow(buffer, end) for buffer in self.buffers)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., self.length : end, :] = new
        self._set_length(end)
        return self.keys, self.values

    def _grow(self, buffer: Tensor, least: int) -> Tensor:
        """A copy with more capacity; doubling makes the amortised cost per token constant."""
        capacity = -(-max(least, 2 * buffer.shape[-2]) // CHUNK) * CHUNK
        larger = buffer.new_empty(*buffer.shape[:-2], capacity, buffer.shape[-1])
        larger[..., : self.length, :] = buffer[..., : self.length, :]
        return larger

    def _set_length(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else 0

    def crop(self, max_length: int) -> None:
        """Drop all tokens from `max_length` on."""
        if max_length < self.get_seq_length():
            self._set_length(max_length)

    def keep(self, length: int, rows: Tensor) -> None:
        """Keep the first `length` tokens and, moved up behind them, those at `length + rows` ([N], ascending)."""
        for buffer in self.buffers:
            # Indexing copies before anything is overwritten.
            buffer[..., length : length + len(rows), :] = buffer[..., length + rows.to(buffer.device), :]
        self._set_length(length + len(rows))


def position_limit(base: nn.Module) -> int | None:
    """The longest sequence that a Hugging Face model supports; None if its configuration names no limit."""
    # Through getattr: architectures that use another name in config.json have this one as an attribute alias.
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


class Target:
    """A base model with a KV cache, used as a context manager.

    Args:
        base: a Hugging Face causal language model whose layers all cache keys and values.
        hidden_state_source: which hidden states `read` returns, as `Speculator.hidden_state_source`.

    Raises:
        UserError: for a base model with recurrent layers, whose state cannot be rolled back.
    """

    def __init__(self, base: nn.Module, hidden_state_source: str = POST_NORM) -> None:
        check_rollback(base.name_or_path, type(base), base.config)
        self.base = base
        self.cache = Cache(layer_class_to_replicate=RollbackLayer)
        self._limits_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        # A hook, because `output_hidden_states` would keep the states of every layer.
        self._hook = HiddenStateHook(base, hidden_state_source)

    def __enter__(self) -> Target:
        self._hook.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.__exit__(*error)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self.cache.get_seq_length()

    def read(
        self, tokens: Tensor, *, last_only: bool = False, tree: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read tokens [N] after those in the cache.

        Args:
            tokens: [N] token ids.
            last_only: return the logits of the last token only.
            tree: mask and positions of tokens that form a draft tree (`TreeAttention.arguments`).

        Returns:
            The hidden states [N, D] and the logits [N, V] of the tokens that follow.
        """
        logits = self._forward(self.base, self.cache, tokens, last_only, tree)
        return self._hook.take()[0], logits

    def _forward(
        self, model: nn.Module, cache: Cache, tokens: Tensor, last_only: bool, tree: Mapping[str, Any] | None
    ) -> Tensor:
        """[N, V] logits of a model with an LM head, [1, V] with `last_only`."""
        settings = {"logits_to_keep": 1} if last_only and self._limits_logits else {}
        output = model(input_ids=tokens[None], past_key_values=cache, use_cache=True, **settings, **(tree or {}))
        return output.logits[0, -1:] if last_only else output.logits[0]

    def check_cache(self, count: int) -> None:
        """Check that the cache holds all `count` tokens that were read: without it a model would give another text.

        Raises:
            UserError: with both numbers.
        """
        lengths = {layer.get_seq_length() for layer in self.cache.layers} - {0}  # some layers use another's cache
        if lengths != {count}:
            raise UserError(
                f"base={self.base.name_or_path} ({type(self.base).__name__}): read {count} tokens and keeps "
                f"{max(lengths, default=0)} in its KV cache; expected a base that caches keys and values of all tokens"
            )

    def roll_back(self, length: int) -> None:
        """Keep the first `length` tokens."""
        for layer in self.cache.layers:
            layer.crop(length)

    def keep(self, length: int, rows: Sequence[int]) -> None:
        """Keep the first `length` tokens and, moved up behind them, those that were read as rows `length + rows`."""
        if list(rows) == list(range(len(rows))):
            return self.roll_back(length + len(rows))
        for layer in self.cache.layers:
            layer.keep(length, torch.tensor(rows))


def windows(base: nn.Module) -> dict[str, int | None]:
    """Window of each kind of a base model's attention layers, None for full attention.

    Raises:
        UserError: for a base model that cannot read a draft tree.
    """
    config, name = base.config.get_text_config(), f"base={base.name_or_path} ({type(base).__name__})"
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"draft_tree: {name} attends by {config._attn_implementation}, which takes no mask of a tree's; "
            "expected attn_implementation=eager or sdpa"
        )
    # Older architectures add a causal mask or a bias themselves, by the place in the cache.
    if not base._supports_attention_backend or "position_ids" not in inspect.signature(base.forward).parameters:
        raise UserError(f"draft_tree: {name} takes no mask and positions from outside; expected a base that does")
    window = getattr(config, "sliding_window", None)
    # Without a list of kinds, all layers have the window that the configuration names (transformers' own rule).
    kinds = set(getattr(config, "layer_types", None) or [SLIDING if window else FULL])
    if unknown := sorted(kinds - {FULL, SLIDING}):
        raise UserError(f"draft_tree: {name} has layers of {unknown[0]}; expected {FULL} or {SLIDING} alone")
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


class TreeAttention:
    """Mask and positions with which a base model reads all nodes of a draft tree in one forward pass.

    Args:
        base: the base model.
        parents: of the nodes 1 … N, as `DraftTree.parents`.

    Raises:
        UserError: for a base model that cannot read a draft tree.
    """

    def __init__(self, base: nn.Module, parents: Sequence[int]) -> None:
        self.windows = windows(base)
        self.boolean_mask = base.config.get_text_config()._attn_implementation != "eager"
        self.dtype = base.dtype
        ancestors = torch.eye(len(parents) + 1, dtype=torch.bool)
        for node, parent in enumerate(parents, 1):
            ancestors[node] |= ancestors[parent]
        self.ancestors = ancestors.to(base.device)
        self.depths = self.ancestors.sum(-1) - 1

    def arguments(self, length: int, nodes: int | None = None) -> dict[str, Any]:
        """`attention_mask` and `position_ids` for the root and N nodes after `length` = L tokens in the cache.

        N is `nodes`, by default all. The mask is [1, 1, N+1, L+N+1]; one per kind of layer if the base has several.
        """
        end = None if nodes is None else nodes + 1
        ancestors, positions = self.ancestors[:end, :end], length + self.depths[:end]
        visible = torch.cat([ancestors.new_ones(len(positions), length), ancestors], dim=1)
        keys = torch.cat([torch.arange(length, device=positions.device), positions])
        masks = {}
        for kind, window in self.windows.items():
            mask = visible if window is None else visible & (keys > positions[:, None] - window)
            if not self.boolean_mask:  # eager attention adds the mask to its scores
                zero = torch.zeros((), dtype=self.dtype, device=mask.device)
                mask = torch.where(mask, zero, torch.finfo(self.dtype).min)
            masks[kind] = mask[None, None]
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"attention_mask": mask, "position_ids": positions[None]}
