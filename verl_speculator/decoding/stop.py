"""When a text is finished: an end token, a stop string, or the last token that fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl_speculator.errors import UserError

# Tokens that a stop string may begin before: enough for byte-level tokens that only together make one character.
MARGIN = 8


class StopRule:
    """Cuts new tokens where the text ends.

    Args:
        eos_token_ids: tokens that end the text; they are its last token.
        strings: texts that end it; the token that completes one is its last.
        tokenizer: needed for strings.
        limit: number of tokens at which it ends anyway.

    Raises:
        UserError: for strings without a tokenizer, or an empty string.
    """

    def __init__(self, eos_token_ids: Sequence[int], strings: Sequence[str], tokenizer: Any, limit: int) -> None:
        if strings and tokenizer is None:
            raise UserError("stop: stop strings need a tokenizer")
        if not all(strings):
            raise UserError("stop='': expected a text of at least one character")
        self.ends = frozenset(eos_token_ids)
        self.strings, self.tokenizer, self.limit = tuple(strings), tokenizer, limit
        self.window = max((len(s.encode()) for s in strings), default=0) + MARGIN

    def cut(self, before: Sequence[int], new: Sequence[int]) -> tuple[list[int], str | None]:
        """Those of the `new` tokens that belong to the text after the `before` ones, and why it ends there: "stop",
        "length", or None if it goes on."""
        for i, token in enumerate(new):
            if token in self.ends or (self.strings and self._completes(before, new[: i + 1])):
                return list(new[: i + 1]), "stop"
            if len(before) + i + 1 >= self.limit:
                return list(new[: i + 1]), "length"
        return list(new), None

    def _completes(self, before: Sequence[int], new: Sequence[int]) -> bool:
        text = self.tokenizer.decode([*before[-self.window :], *new])
        return any(string in text for string in self.strings)
