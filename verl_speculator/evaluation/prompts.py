"""Prompts and held-out texts, from a parquet or JSON file to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from verl_speculator.base_model.chat_template import tokenize_conversation, tokenize_prompt, tokenize_texts
from verl_speculator.data.conversations import DataFile
from verl_speculator.utils.errors import UserError, nearest

PROMPT_COLUMNS = ("turns", "messages", "prompt", "text")
TEXT_COLUMNS = ("messages", "text")
CATEGORY_COLUMN = "category"
NO_CATEGORY = "all"
MESSAGE_KEYS = ("role", "content", "tool_calls")
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, or a plain text of which the model continues the first half.

    Attributes:
        index: row in the file, from 0.
        category: that results are grouped by.
        messages: of the conversation, up to the first answer; empty for plain text.
        further: the user's message after each answer.
        text: the whole plain text, None for a conversation.
    """

    index: int
    category: str
    messages: tuple[dict[str, Any], ...] = ()
    further: tuple[str, ...] = ()
    text: str | None = None

    @property
    def num_turns(self) -> int:
        """Number of answers."""
        return 1 + len(self.further)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, from the first of these columns that it has.

    `turns`: the user's messages, one text for each answer; `messages`: a conversation, whose last answers are left out;
    `prompt`: messages, or one text of the user's; `text`: plain.

    Raises:
        UserError: naming the file and, where there is one, the row that cannot be used.
    """
    column, rows = _read_rows(Path(path), PROMPT_COLUMNS)
    prompts = []
    for i, row in enumerate(rows):
        category = row.get(CATEGORY_COLUMN)
        if category is not None and not isinstance(category, str):
            raise UserError(f"{path}, row {i}: {CATEGORY_COLUMN} is {short(category)}, expected a text")
        fields = _parse(row.get(column), column, f"{path}, row {i}: {column}")
        prompts.append(Prompt(i, category or NO_CATEGORY, **fields))
    return prompts


def prompt_ids(prompt: Prompt, tokenizer: Any, replies: Sequence[str] = ()) -> list[int]:
    """Token ids that the model continues at turn `len(replies)`.

    Args:
        prompt: a conversation is rendered by the chat template; of a plain text, the first half of its tokens is kept
            (of an odd number, the larger half).
        tokenizer: of the base model.
        replies: the model's answers to the earlier turns, fewer than `prompt.num_turns`.

    Raises:
        UserError: if the chat template refuses the conversation, or the text has no token.
    """
    if len(replies) >= prompt.num_turns:
        raise ValueError(f"{len(replies)} replies to a prompt of {prompt.num_turns} turns")
    try:
        if prompt.text is None:
            messages = list(prompt.messages)
            for reply, question in zip(replies, prompt.further, strict=False):
                messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
            return tokenize_prompt(tokenizer, messages)
        (ids,) = tokenize_texts(tokenizer, [prompt.text], plain=True)
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise UserError("text has no tokens")
        return ids[: (len(ids) + 1) // 2]
    except UserError as error:
        raise UserError(f"prompt {prompt.index}: {error}") from None


def read_texts(path: str | Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and loss mask of each held-out text, at full length.

    From the column `messages` (conversations, mask 1 where the assistant speaks) or else `text` (plain, closed with the
    end token, mask 1 everywhere).

    Raises:
        UserError: as `read_prompts`; also if the chat template cannot be used, or no row has a token of an assistant's.
    """
    column, rows = _read_rows(Path(path), TEXT_COLUMNS)
    texts = []
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        if column == "text":
            (ids,) = tokenize_texts(tokenizer, [_check_text(row.get(column), f"{where}: {column}")], plain=True)
            texts.append((ids, [1] * len(ids)))
            continue
        messages = _check_messages(row.get(column), f"{where}: {column}")
        try:
            texts.append(tokenize_conversation(tokenizer, messages))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not any(any(mask) for _, mask in texts):
        raise UserError(f"{path}: no token of an assistant's in column {column!r}, expected answers to measure on")
    return texts


def _read_rows(path: Path, accepted: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The first of the `accepted` columns that a file has, and its rows with that column and the category."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: a directory, expected one file ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        hint = nearest(path.suffix, SUFFIXES)
        raise UserError(f"{path}: unknown suffix {path.suffix!r}{hint}, expected one of {', '.join(SUFFIXES)}")
    names, rows = DataFile(str(path), path.suffix).rows({*accepted, CATEGORY_COLUMN})
    rows = list(rows)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    names = names or list(dict.fromkeys(name for row in rows for name in row))
    column = next((name for name in accepted if name in names), None)
    if column is None:
        has = ", ".join(f"{name}{nearest(name, accepted)}" for name in names) or "none"
        raise UserError(f"{path}: no column that can be used; it has {has}; expected one of {', '.join(accepted)}")
    return column, rows


def _parse(value: Any, column: str, where: str) -> dict[str, Any]:
    """A value of a column as fields of a `Prompt`."""
    if column == "text":
        return {"text": _check_text(value, where)}
    if column == "turns":
        if not isinstance(value, list) or not value or not all(isinstance(turn, str) and turn for turn in value):
            raise UserError(f"{where} is {short(value)}, expected a list of texts, none of them empty")
        return {"messages": ({"role": "user", "content": value[0]},), "further": tuple(value[1:])}
    if column == "prompt" and value is None:
        raise UserError(f"{where} is None, expected a text, or a list of messages")
    if column == "prompt" and isinstance(value, str):
        return {"messages": ({"role": "user", "content": _check_text(value, where)},)}
    messages = _check_messages(value, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where} has no message of a user's to answer")
    if not messages[-1].get("content"):
        raise UserError(f"{where} ends in an empty message, expected one to answer")
    return {"messages": tuple(messages)}


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {short(value)}, expected a text that is not empty")
    return value


def _check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {short(value)}, expected a list of messages")
    for i, message in enumerate(value):
        role, content, calls = (message.get(k) if isinstance(message, dict) else None for k in MESSAGE_KEYS)
        if not isinstance(role, str) or not (isinstance(content, (str, list)) or calls):
            raise UserError(f"{where}[{i}] is {short(message)}, expected a role and a content")
    # Parquet gives every message the keys of all of them; chat templates ask whether a key is there.
    return [{key: item for key, item in message.items() if item is not None} for message in value]
