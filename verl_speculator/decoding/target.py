"""The base as the target of verification: reads tokens, gives hidden states and logits, forgets what was rejected."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import POST_NORM, HiddenStateHook
from verl_speculator.base_model.loading import check_rollback
from verl_speculator.decoding.cache import keep_rows, roll_back, rollback_cache
from verl_speculator.utils.errors import UserError


def position_limit(base: nn.Module) -> int | None:
    """The longest sequence that a Hugging Face model was made for, None where its configuration names none."""
    # As an attribute: older architectures call it otherwise, and have it under this name as an alias.
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


class Target:
    """A base with a KV cache of its own, used as a context manager.

    Shapes: N tokens read at once, D base width, V vocabulary.

    Args:
        base: any Hugging Face causal language model whose cache holds keys and values of every layer.
        reads: which hidden states are asked for, `Speculator.hidden_state_source`.

    Raises:
        UserError: for a base with recurrent layers, whose state cannot be rolled back.
    """

    def __init__(self, base: nn.Module, hidden_state_source: str = POST_NORM) -> None:
        check_rollback(base.name_or_path, type(base), base.config)
        self.base = base
        self.cache = rollback_cache()
        self._last_only = "logits_to_keep" in inspect.signature(base.forward).parameters
        # To ask the base for its hidden states would keep every layer's.
        self._tap = HiddenStateHook(base, hidden_state_source)

    def __enter__(self) -> Target:
        self._tap.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tap.__exit__(kind, error, trace)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    def read(
        self, tokens: Tensor, *, last_only: bool = False, arrangement: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read [N] tokens behind those in the cache.

        Args:
            tokens: [N] token ids.
            last_only: give the last token's state and logits alone; N is then 1 in the result.
            arrangement: mask and positions of tokens that do not stand in a row (`TreeAttention.arguments`).

        Returns:
            The hidden states [N, D] and the logits [N, V] for the tokens that follow each.
        """
        keep = {"logits_to_keep": 1} if last_only and self._last_only else {}
        settings = {"past_key_values": self.cache, "use_cache": True, **keep, **(arrangement or {})}
        logits = self.base(input_ids=tokens.unsqueeze(0), **settings).logits[0]
        hidden = self._tap.take()[0]
        return (hidden[-1:], logits[-1:]) if last_only else (hidden, logits)

    def check_cache(self, count: int) -> None:
        """Whether the cache holds all of `count` tokens that were read: a base that ignores it would go on without
        them, and say something else.

        Raises:
            UserError: with both numbers.
        """
        kept = {layer.get_seq_length() for layer in self.cache.layers} - {0}  # some layers use those of another
        if kept != {count}:
            raise UserError(
                f"base={self.base.name_or_path} ({type(self.base).__name__}): read {count} tokens and keeps "
                f"{max(kept, default=0)} in its KV cache; expected a base that caches keys and values of all tokens"
            )

    def roll_back(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        roll_back(self.cache, length)

    def keep(self, length: int, rows: Sequence[int]) -> None:
        """Forget all tokens from position `length` on but those read at `length + rows`, which close up behind it."""
        if list(rows) == list(range(len(rows))):
            self.roll_back(length + len(rows))
        else:
            keep_rows(self.cache, length, torch.tensor(rows))
