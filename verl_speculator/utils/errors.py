"""The one exception that means "the user can mend this": one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting or file of the user's that cannot be used.

    The message is one line that names the setting, the value received and what is accepted.
    Command line entry points print it and exit with code 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
