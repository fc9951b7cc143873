"""Prompts and held-out text, from parquet or JSON lines to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from verl_speculator.base_model.chat_template import tokenize_conversation, tokenize_prompt, tokenize_texts
from verl_speculator.data.conversations import check_messages, check_prompt, check_text, check_turns, read_rows
from verl_speculator.utils.settings import UserError

PROMPT_COLUMNS = ("turns", "messages", "prompt", "text")
TEXT_COLUMNS = ("messages", "text")
CATEGORY_COLUMN = "category"
NO_CATEGORY = "all"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file: a chat, or a plain text whose first half the model continues.

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
    """The prompts of a parquet or JSON file. Raises UserError naming the file and the row that cannot be used.

    The first of these columns that is there is read: `turns` (what the user says, one text per answer), `messages` (a
    conversation, without the answer that closes it), `prompt` (messages, or one text of the user's), `text` (plain).
    """
    column, rows = read_rows(path, PROMPT_COLUMNS, (CATEGORY_COLUMN,))
    prompts = []
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        category = row.get(CATEGORY_COLUMN)
        if category is not None and not isinstance(category, str):
            raise UserError(f"{where}: {CATEGORY_COLUMN} is {short(category)}, expected a text")
        prompts.append(Prompt(i, category or NO_CATEGORY, **_parse(row.get(column), column, f"{where}: {column}")))
    return prompts


def prompt_ids(prompt: Prompt, tokenizer: Any, replies: Sequence[str] = ()) -> list[int]:
    """Token ids that the model continues at turn `len(replies)`, after its replies to the turns before: a chat as the
    chat template renders it, or the first half of a plain text's tokens (of an odd number, the larger half). Raises
    UserError if the chat template refuses the chat, or the text has no token."""
    if len(replies) >= prompt.num_turns:
        raise ValueError(f"{len(replies)} replies to a prompt of {prompt.num_turns} turns")
    try:
        if prompt.text is None:
            messages = list(prompt.messages)
            for reply, question in zip(replies, prompt.further, strict=False):
                messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
            return tokenize_prompt(tokenizer, messages)
        (ids,) = tokenize_texts(tokenizer, [prompt.text], plain=True)
        count = len(ids) - (ids[-1:] == [tokenizer.eos_token_id])
        if not count:
            raise UserError("text has no tokens")
        return ids[: (count + 1) // 2]
    except UserError as error:
        raise UserError(f"prompt {prompt.index}: {error}") from None


def read_texts(path: str | Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Held-out text: token ids and loss mask of each row, uncut.

    Read from `messages` (conversations, 1 where the assistant speaks) or else from `text` (plain, closed with the end
    token, 1 everywhere). Raises UserError as `read_prompts`, if the chat template cannot be used, or if no row holds an
    assistant's token.
    """
    column, rows = read_rows(path, TEXT_COLUMNS)
    texts = []
    for i, row in enumerate(rows):
        value, where = row.get(column), f"{path}, row {i}"
        if column == "text":
            (ids,) = tokenize_texts(tokenizer, [check_text(value, f"{where}: {column}")], plain=True)
            texts.append((ids, [1] * len(ids)))
            continue
        messages = check_messages(value, f"{where}: {column}")
        try:
            texts.append(tokenize_conversation(tokenizer, messages))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not any(any(mask) for _, mask in texts):
        raise UserError(f"{path}: no token of an assistant's in column {column!r}, expected answers to measure on")
    return texts


def _parse(value: Any, column: str, where: str) -> dict[str, Any]:
    """A row's value as fields of a `Prompt`."""
    if column == "text":
        return {"text": check_text(value, where)}
    if column == "turns":
        first, *further = check_turns(value, where)
        return {"messages": ({"role": "user", "content": first},), "further": tuple(further)}
    messages = (check_prompt if column == "prompt" else check_messages)(value, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where} has no message of a user's to answer")
    if not messages[-1].get("content"):
        raise UserError(f"{where} ends in an empty message, expected one to answer")
    return {"messages": tuple(messages)}
