"""Prompts and held-out text, from parquet or JSON lines to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from verl_speculator.base_model.chat_template import tokenize_conversation, tokenize_prompt, tokenize_texts
from verl_speculator.utils.errors import UserError, nearest

PROMPT_COLUMNS = ("turns", "messages", "prompt", "text")
TEXT_COLUMNS = ("messages", "text")
CATEGORY_COLUMN = "category"
NO_CATEGORY = "all"
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Prompt:
    """One prompt as it stands in the file: a chat, or a plain text of which the model continues the first half.

    Attributes:
        index: row in the file, from 0.
        category: what results are grouped by.
        messages: of the chat, up to the first answer that is asked for; empty for plain text.
        further: what the user says after each answer.
        text: the whole plain text, None for a chat.
    """

    index: int
    category: str
    messages: tuple[dict[str, Any], ...] = ()
    further: tuple[str, ...] = ()
    text: str | None = None

    @property
    def num_turns(self) -> int:
        """How many answers are asked for."""
        return 1 + len(self.further)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a parquet file or a file of JSON lines.

    The first of these columns that is there is read: `turns` (what the user says, one text per answer), `messages` (a
    conversation, without the answer that closes it), `prompt` (messages, or one text of the user's), `text` (plain).

    Raises:
        UserError: naming the file and, where there is one, the row that cannot be used.
    """
    column, rows = _read_rows(Path(path), PROMPT_COLUMNS)
    prompts = []
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        category = row.get(CATEGORY_COLUMN)
        if category is not None and not isinstance(category, str):
            raise UserError(f"{where}: {CATEGORY_COLUMN} is {short(category)}, expected a text")
        prompts.append(Prompt(i, category or NO_CATEGORY, **_parse(row.get(column), column, where)))
    return prompts


def prompt_ids(prompt: Prompt, tokenizer: Any, replies: Sequence[str] = ()) -> list[int]:
    """Token ids that the model continues at turn `len(replies)`.

    Args:
        prompt: a chat is written by the chat template; of a plain text, the first half of its tokens is kept (of an
            odd number, the larger half).
        tokenizer: of the base.
        replies: the model's answers to the turns before, fewer than `prompt.num_turns`.

    Raises:
        UserError: if the chat template refuses the chat, or the text has no token.
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
    """Held-out text: token ids and loss mask of each row, uncut.

    Read from `messages` (conversations, 1 where the assistant speaks) or else from `text` (plain, closed with the end
    token, 1 everywhere).

    Raises:
        UserError: as `read_prompts`; also if the chat template cannot be used, or no row holds an assistant's token.
    """
    column, rows = _read_rows(Path(path), TEXT_COLUMNS)
    found = []
    for i, row in enumerate(rows):
        value, where = row.get(column), f"{path}, row {i}"
        if column == "text":
            (ids,) = tokenize_texts(tokenizer, [_text(value, column, where)], plain=True)
            found.append((ids, [1] * len(ids)))
            continue
        messages = _messages(value, column, where)
        try:
            found.append(tokenize_conversation(tokenizer, messages))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not any(any(mask) for _, mask in found):
        raise UserError(f"{path}: no token of an assistant's in column {column!r}, expected answers to measure on")
    return found


def _read_rows(path: Path, accepted: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """(column that is used, rows with at least that column and the category where the file has them)."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: a directory, expected one file ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        hint = nearest(path.suffix, SUFFIXES)
        raise UserError(f"{path}: unknown suffix {path.suffix!r}{hint}, expected one of {', '.join(SUFFIXES)}")
    return (_read_parquet if path.suffix == ".parquet" else _read_json_lines)(path, accepted)


def _read_parquet(path: Path, accepted: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        names = parquet.schema_arrow.names
        column = _choose(path, parquet.metadata.num_rows, names, accepted)
        return column, parquet.read([name for name in (column, CATEGORY_COLUMN) if name in names]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated, or not a parquet file ({reason[:200]})") from None


def _read_json_lines(path: Path, accepted: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    names: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: {short(row)}, expected a JSON object")
                names |= dict.fromkeys(row)
                rows.append({name: row[name] for name in (*accepted, CATEGORY_COLUMN) if name in row})
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}: truncated, or not JSON ({error.msg}); expected one object on each line"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    return _choose(path, len(rows), names, accepted), rows


def _choose(path: Path, count: int, names: Sequence[str] | dict[str, None], accepted: Sequence[str]) -> str:
    """The first of the accepted columns that a file of `count` rows has."""
    if not count:
        raise UserError(f"{path}: holds no rows")
    for column in accepted:
        if column in names:
            return column
    has = ", ".join(f"{name}{nearest(name, accepted)}" for name in names) or "none"
    raise UserError(f"{path}: no column that can be used; it has {has}; expected one of {', '.join(accepted)}")


def _parse(value: Any, column: str, where: str) -> dict[str, Any]:
    """A row's value as fields of a `Prompt`."""
    if column == "text":
        return {"text": _text(value, column, where)}
    if column == "turns":
        if not isinstance(value, list) or not value or not all(isinstance(turn, str) and turn for turn in value):
            raise UserError(f"{where}: {column} is {short(value)}, expected a list of texts, none of them empty")
        return {"messages": ({"role": "user", "content": value[0]},), "further": tuple(value[1:])}
    if column == "prompt" and value is None:
        raise UserError(f"{where}: {column} is None, expected a text, or a list of messages")
    if column == "prompt" and isinstance(value, str):
        return {"messages": ({"role": "user", "content": _text(value, column, where)},)}
    messages = _messages(value, column, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: {column} has no message of a user's to answer")
    if not messages[-1].get("content"):
        raise UserError(f"{where}: {column} ends in an empty message, expected one to answer")
    return {"messages": tuple(messages)}


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {column} is {short(value)}, expected a text that is not empty")
    return value


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column} is {short(value)}, expected a list of messages")
    for i, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not (isinstance(message.get("content"), (str, list)) or message.get("tool_calls"))
        ):
            raise UserError(f"{where}: {column}[{i}] is {short(message)}, expected a role and a content")
    # Parquet gives every message all keys of any; chat templates ask whether a key is there.
    return [{key: item for key, item in message.items() if item is not None} for message in value]
