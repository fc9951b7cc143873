"""`UserError`, an error that the user can fix, and the options of commands, declared with the field they describe.

Commands print a `UserError` as one line, without a traceback, and exit with 2. Imports no command-line library.

A field of a settings dataclass, or a parameter of a command, is the only declaration of its option::

    num_trials: Annotated[int, Option("runs of each prompt", minimum=1)] = 1

`verl_speculator.cli.options.command` makes `--num-trials INTEGER  runs of each prompt [default: 1]` of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, get_type_hints


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


@dataclass(frozen=True)
class Option:
    """How a setting appears on the command line."""

    help: str  # text of `--help`
    flag: str | None = None  # by default the field's name with dashes and, for a boolean, its `--no-` form
    positional: bool = False  # an argument instead of an option
    parse: Callable[[str], Any] | None = None  # from text to the field's type, if that is no scalar or list of scalars
    minimum: int | None = None  # smallest value that `check` accepts

    def check(self, name: str, value: Any) -> None:
        """Refuse a number below the minimum by a UserError; None and texts pass."""
        if self.minimum is not None and isinstance(value, int) and value < self.minimum:
            raise UserError(f"{name}={value}: expected a number ≥ {self.minimum}")


def settings_options(settings: type) -> Iterator[tuple[Field, Any, Option]]:
    """Each field of a settings dataclass with its type and its option, in order."""
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        yield field, hints[field.name].__origin__, hints[field.name].__metadata__[0]


def check_minimums(settings: Any) -> None:
    """`Option.check` of every field."""
    for field, _, option in settings_options(type(settings)):
        option.check(field.name, getattr(settings, field.name))


# Options that several commands have.
BaseModel = Annotated[str, Option("base model: a directory or a hub name")]
MaxNewTokens = Annotated[int, Option("the most tokens of an answer", minimum=1)]
Temperature = Annotated[float, Option("0 is greedy")]
TopP = Annotated[float, Option("share of the probability that is kept")]
TopK = Annotated[int, Option("number of tokens kept, 0 for all")]
Dtype = Annotated[str, Option("auto (bf16, or fp32 on a CPU without bf16), fp32, bf16, fp16")]
Device = Annotated[str, Option("auto, cpu, cuda, …")]
Quantization = Annotated[str | None, Option("bnb4 holds the base in 4 bits")]
GgufFile = Annotated[str | None, Option("read the base from this file in --base")]
AllowOtherBase = Annotated[bool, Option("a base with other weights than at training")]
