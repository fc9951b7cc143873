"""The draft vocabulary: the tokens that a speculator with `draft_vocab_size` can draft, and their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

VOCABULARY_FILE = "draft_vocabulary.json"
SIZE, FILE = "model.speculator.draft_vocab_size", "model.speculator.draft_vocab_file"


@dataclass(frozen=True)
class DraftVocabulary:
    """Tokens that can be drafted, and what they were chosen for.

    Attributes:
        tokens: their ids, ascending.
        vocab_size: V, the rows of the base model's LM head.
        tokenizer: `vocabulary_digest` of the base model's tokenizer.
        coverage: the share of the counted answer tokens that are among them.
    """

    tokens: tuple[int, ...]
    vocab_size: int
    tokenizer: str
    coverage: float

    @classmethod
    def read(cls, path: str | Path) -> DraftVocabulary:
        """Read a file that `write` wrote.

        Raises:
            UserError: naming the file, if it holds no draft vocabulary.
        """
        setting, expected = f"{FILE}={path}", f"expected the {VOCABULARY_FILE} of a run"
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            tokens = tuple(content["tokens"])
            read = cls(tokens, content["vocab_size"], content["tokenizer"], float(content["coverage"]))
        except OSError as error:
            raise UserError(f"{setting}: cannot be read ({error.strerror}); {expected}") from None
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{setting}: not a draft vocabulary; {expected}") from None
        is_ascending = all(type(token) is int for token in tokens) and list(tokens) == sorted(set(tokens))
        if not is_ascending or not tokens or type(read.vocab_size) is not int:
            raise UserError(f"{setting}: its tokens are no ascending ids; {expected}")
        if not 0 <= tokens[0] <= tokens[-1] < read.vocab_size:
            raise UserError(f"{setting}: token {tokens[-1]}, its vocabulary has {read.vocab_size}; {expected}")
        return read

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def check(self, path: str, vocab_size: int, tokenizer: str, end_tokens: Collection[int]) -> None:
        """Refuse a file of another tokenizer, or one that lacks an end token.

        Args:
            path: of the file, for the error message.
            vocab_size: V of this run's base model.
            tokenizer: `vocabulary_digest` of its tokenizer.
            end_tokens: that end a text.

        Raises:
            UserError: naming the file.
        """
        if self.vocab_size != vocab_size:
            raise UserError(f"{FILE}={path}: of a vocabulary of {self.vocab_size} tokens, the base has {vocab_size}")
        if self.tokenizer != tokenizer:
            raise UserError(f"{FILE}={path}: its ids are those of another tokenizer; expected a file of this base's")
        if missing := sorted(set(end_tokens) - set(self.tokens)):
            raise UserError(f"{FILE}={path}: lacks the end token {missing[0]}, so no draft could end a text")


def vocabulary_digest(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and their ids, without its rules and its chat template."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(tokens.encode()).hexdigest()[:32]


def check_size(size: int | None, vocab_size: int, end_tokens: Collection[int]) -> None:
    """Refuse a draft vocabulary that is no part of the vocabulary, or cannot hold the end tokens.

    Raises:
        UserError: naming the setting and both numbers.
    """
    if size is None:
        return
    if size >= vocab_size:
        raise UserError(f"{SIZE}={size}: the base has {vocab_size} tokens; expected fewer, or null for all of them")
    if size <= len(end_tokens):
        raise UserError(f"{SIZE}={size}: the end tokens alone are {len(end_tokens)}; expected more than that")


def most_used(counts: Sequence[int], size: int, always: Collection[int]) -> tuple[int, ...]:
    """The ids of the `size` most frequent tokens, ascending: those of `always`, then by count, of equals the lower id.

    Args:
        counts: [V] how often each token occurs.
        size: at least the number of `always`.
        always: ids that are taken whatever their count.
    """
    kept = {token for token in always if 0 <= token < len(counts)}
    by_count = sorted((token for token in range(len(counts)) if token not in kept), key=lambda t: (-counts[t], t))
    return tuple(sorted([*kept, *by_count[: size - len(kept)]]))


def tokens_digest(tokens: Sequence[int]) -> str:
    """A hash of the ids of a draft vocabulary."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:32]
