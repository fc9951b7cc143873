"""The base as the target of verification: reads tokens, gives hidden states and logits, forgets what was rejected."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.decoding.cache import keep_rows, roll_back, rollback_cache
from verl_speculator.errors import UserError
from verl_speculator.models.hidden_state import POST_NORM, StateTap

# Kinds of layers, as configurations list them, that keep keys and values or nothing at all. All others keep a state.
ROLLED_BACK = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense", "moe"}
)


def position_limit(base: nn.Module) -> int | None:
    """The longest sequence that a Hugging Face model was made for, None where its configuration names none."""
    # As an attribute: older architectures call it otherwise, and have it under this name as an alias.
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def check_rollback(base: str, model_class: type, config: Any) -> None:
    """Whether a base keeps nothing of what it has read but keys and values. Reads no weight.

    Args:
        base: its name in the error.
        model_class: of transformers.
        config: its Hugging Face configuration.

    Raises:
        UserError: for a base with recurrent layers, whose state cannot be rolled back.
    """
    settings = config.get_text_config()
    # Not every architecture with recurrent layers is marked as stateful.
    kinds = getattr(settings, "layer_types", None) or getattr(settings, "layers_block_type", None) or ()
    recurrent = sorted(set(kinds) - ROLLED_BACK)
    if getattr(model_class, "_is_stateful", False) or recurrent:
        layers = f" (layers of {recurrent[0]})" if recurrent else ""
        raise UserError(
            f"base={base} ({model_class.__name__}): its recurrent state cannot be rolled back after a rejected "
            f"draft{layers}; expected a base with attention layers only"
        )


class Target:
    """A base with a KV cache of its own, used as a context manager.

    Shapes: N tokens read at once, D base width, V vocabulary.

    Args:
        base: any Hugging Face causal language model whose cache holds keys and values of every layer.
        reads: which hidden states are asked for, `Speculator.reads`.

    Raises:
        UserError: for a base with recurrent layers, whose state cannot be rolled back.
    """

    def __init__(self, base: nn.Module, reads: str = POST_NORM) -> None:
        check_rollback(base.name_or_path, type(base), base.config)
        self.base = base
        self.cache = rollback_cache()
        self._last_only = "logits_to_keep" in inspect.signature(base.forward).parameters
        # To ask the base for its hidden states would keep every layer's.
        self._tap = StateTap(base, reads)

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
