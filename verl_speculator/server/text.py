"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a text token by token.

    What `put` and `end` give, joined, is the text of all tokens without special ones, cut before the first stop
    string. The tail that may still become another character or a stop string is held back.

    Args:
        tokenizer: of the base.
        stops: texts that end it and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.stopped = False
        self._held = ""
        # Tokens from `_from` up to `_read` are in the text already; they are decoded again as the context of the next,
        # since a tokenizer may write a token otherwise at the beginning of a text.
        self._from = self._read = 0

    def put(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(token)
        return self._release(self._decoded(last=False), last=False)

    def end(self) -> str:
        """The rest."""
        return self._release(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        """New whole characters."""
        known = self._decode(self.tokens[self._from : self._read])
        text = self._decode(self.tokens[self._from :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._from, self._read = self._read, len(self.tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str, *, last: bool) -> str:
        """Of the held text and the new one, what no stop string can begin in."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
