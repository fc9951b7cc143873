"""`UserError`: an error that the user can fix. Commands print it as one line, without a traceback, and exit with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting or a file that cannot be used.

    The message is one line that names the setting, the value received and the values accepted.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of a library's exception as a single line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
