"""Styles of training data: which one a row is in, and the conversation or text that it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

TEXT = "text"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model"), "assistant"),
    "system": "system",
}
CONVERSATION_COLUMNS = ("conversations", "conversation")
QUESTION_COLUMNS = ("prompt", "question", "query", "input")
ANSWER_COLUMNS = ("response", "answer", "completion", "output")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Alpaca's second part of the question, and how its data say that there is none.
CONTEXT_COLUMNS = ("input", "context")
NO_CONTEXT = "<noinput>"

END_OF_TEXT = "<|endoftext|>"
# ` = Title = ` opens an article of wikitext, ` = = Section = = ` does not.
TITLE = re.compile(r"\s*= [^=\s](.*[^=\s])? =\s*")
LINES_LOOKED_AT = 1000


class Dropped(Exception):
    """A row that cannot be used; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Style:
    """One way to write a conversation in a row.

    Attributes:
        needs: what a row of it has, for error messages.
        columns: all that are read.
        recognises: whether a row is in this style.
        messages: its turns, roles and contents as they stand there.
    """

    needs: str
    columns: tuple[str, ...]
    recognises: Callable[[Row], bool]
    messages: Callable[[Row], list[Row]]


def recognise(row: Row, styles: Iterable[str], text_column: str = TEXT) -> str | None:
    """The first of `styles` that a row is in, None if there is none."""
    for name in styles:
        if isinstance(row.get(text_column), str) if name == TEXT else STYLES[name].recognises(row):
            return name
    return None


def columns_read(text_column: str = TEXT) -> set[str]:
    """Every column that any style reads."""
    return {text_column, *SYSTEM_COLUMNS, *chain.from_iterable(style.columns for style in STYLES.values())}


def to_text(row: Row, column: str = TEXT) -> str:
    """The document of a row.

    Raises:
        Dropped: if it is none.
    """
    text = _content(row.get(column))
    if not text.strip():
        raise Dropped("empty text")
    return text


def to_conversation(row: Row, style: str, *, keep_system: bool = True) -> tuple[list[Message], int]:
    """The conversation of a row: perhaps a system message, then user and assistant in turn, the assistant last.

    Contents stay as they are, to the space: a speculator learns to write what the base would.

    Returns:
        Messages, and how many of the user's turns were cut from the end, where nobody answers them.

    Raises:
        Dropped: if it is no such conversation.
    """
    if not STYLES[style].recognises(row):
        raise Dropped("not in this format")
    system, turns = _system(row), []
    for turn in STYLES[style].messages(row):
        turns.append(_message(turn))
    if system and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": system})
    if not keep_system:
        turns = [turn for turn in turns if turn["role"] != "system"]
    elif turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del turns[0]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Dropped("no assistant turn")
    said = len(turns)
    while turns[-1]["role"] == "user":
        turns.pop()
    _check_turns(turns[1:] if turns[0]["role"] == "system" else turns)
    return turns, said - len(turns)


def _check_turns(turns: Sequence[Message]) -> None:
    if not turns or turns[0]["role"] != "user":
        raise Dropped("does not start with user")
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise Dropped("roles do not alternate")
    for turn in turns:
        if not turn["content"].strip():
            raise Dropped("empty answer" if turn["role"] == "assistant" else "empty user message")


def _message(turn: Any) -> Message:
    """A turn under the names that chat templates use."""
    if not isinstance(turn, dict):
        raise Dropped("turn is not a message")
    role = _first(turn, ("role", "from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown role")
    if turn.get("tool_calls"):
        raise Dropped("tool call")
    return {"role": ROLES[role.lower()], "content": _content(_first(turn, ("content", "value")))}


def _content(value: Any) -> str:
    """A text, or the text parts of OpenAI's list of parts."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(part["text"] for part in value if isinstance(part.get("text"), str))
    if not isinstance(value, str):
        raise Dropped("not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        raise Dropped("not text") from None
    return value


def _first(row: Row, names: Iterable[str]) -> Any:
    """The first of some values that is there: parquet gives every row all keys of any."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _system(row: Row) -> str:
    value = _first(row, SYSTEM_COLUMNS)
    return _content(value) if isinstance(value, str) and value.strip() else ""


def _list_of(kind: type, *names: str) -> Callable[[Row], bool]:
    """Whether the first of these columns that is there holds a list of that kind."""

    def recognises(row: Row) -> bool:
        value = _first(row, names)
        return isinstance(value, list) and all(isinstance(item, kind) for item in value[:1])

    return recognises


def _has_texts(*choices: Sequence[str]) -> Callable[[Row], bool]:
    """Whether a row has a text under one name of each choice."""
    return lambda row: all(any(isinstance(row.get(name), str) for name in names) for names in choices)


def _texts(row: Row, names: Sequence[str]) -> str:
    return next(row[name] for name in names if isinstance(row.get(name), str))


def _pair(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _ultrachat(row: Row) -> list[Row]:
    return [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(row["data"])]


def _alpaca(row: Row) -> list[Row]:
    context = _first(row, CONTEXT_COLUMNS)
    context = "" if context is None else _content(context)
    if context.strip().lower() in ("", NO_CONTEXT):
        return _pair(row["instruction"], _texts(row, ("output", "response")))
    return _pair(f"{row['instruction']}\n\n{context}", _texts(row, ("output", "response")))


def _is_tree(row: Row) -> bool:
    root = row.get("prompt")
    return isinstance(root, dict) and isinstance(root.get("replies"), list)


def is_tree_message(row: Row) -> bool:
    """Whether a row is one message of an OpenAssistant tree, to be joined by `gather_trees`."""
    known = isinstance(row.get("message_id"), (str, int)) and isinstance(row.get("parent_id"), (str, int, type(None)))
    return known and "parent_id" in row and "role" in row and "text" in row


def gather_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """OpenAssistant's messages as trees. All are held, since the messages of a tree may lie anywhere.

    A message whose parent is nowhere becomes a tree too, which `to_conversation` drops by name.
    """
    nodes: dict[str | int, Row] = {}
    for row in rows:
        if is_tree_message(row):
            nodes[row["message_id"]] = row | {"replies": []}
        else:
            yield row
    roots = []
    for node in nodes.values():
        parent = nodes.get(node["parent_id"])
        (roots if parent is None else parent["replies"]).append(node)
    yield from ({"prompt": root} for root in roots)


def _best_path(row: Row) -> list[Row]:
    """From the root to a leaf by the best-ranked reply; of equals one that is answered, then the first."""
    node, path = row["prompt"], []
    if node.get("parent_id") is not None:
        raise Dropped("reply without its parent")
    if node.get("deleted"):
        raise Dropped("deleted")
    while node is not None:
        path.append({"role": node.get("role"), "content": node.get("text")})
        replies = [r for r in node.get("replies") or () if isinstance(r, dict) and not r.get("deleted")]
        node = min(replies, key=_preference, default=None)
    return path


def _preference(reply: Row) -> tuple[float, bool]:
    rank = reply.get("rank")
    ranked = isinstance(rank, (int, float)) and rank == rank
    return (rank if ranked else float("inf")), not reply.get("replies")


# In the order in which a row is tried: what is surest first, plain text last.
STYLES = {
    "oasst": Style(
        needs="message_id, parent_id, role and text, or prompt with its replies",
        columns=("message_id", "parent_id", "role", "text", "rank", "deleted", "prompt"),
        recognises=lambda row: _is_tree(row) or is_tree_message(row),
        messages=_best_path,
    ),
    "messages": Style(
        needs="messages, a list of role and content",
        columns=("messages",),
        recognises=_list_of(dict, "messages"),
        messages=lambda row: row["messages"],
    ),
    "sharegpt": Style(
        needs="conversations or conversation, a list of from and value",
        columns=CONVERSATION_COLUMNS,
        recognises=_list_of(dict, *CONVERSATION_COLUMNS),
        messages=lambda row: _first(row, CONVERSATION_COLUMNS),
    ),
    "ultrachat": Style(
        needs="data, a list of texts",
        columns=("data",),
        recognises=_list_of(str, "data"),
        messages=_ultrachat,
    ),
    "alpaca": Style(
        needs="instruction and output",
        columns=("instruction", "output", "response", *CONTEXT_COLUMNS),
        recognises=_has_texts(("instruction",), ("output", "response")),
        messages=_alpaca,
    ),
    "pairs": Style(
        needs=f"one of {', '.join(QUESTION_COLUMNS)} and one of {', '.join(ANSWER_COLUMNS)}",
        columns=(*QUESTION_COLUMNS, *ANSWER_COLUMNS),
        recognises=_has_texts(QUESTION_COLUMNS, ANSWER_COLUMNS),
        messages=lambda row: _pair(_texts(row, QUESTION_COLUMNS), _texts(row, ANSWER_COLUMNS)),
    ),
}


def is_title(line: str) -> bool:
    """Whether a line is the title of a wikitext article."""
    return bool(TITLE.fullmatch(line))


def documents(lines: Iterable[str]) -> Iterator[str]:
    """The documents of plain text, without those that are blank.

    What separates them is seen from the first lines: `<|endoftext|>` alone on a line; else, where the text begins
    with a title of wikitext, the titles; else blank lines; else, in a longer text without any, every line's end.
    """
    lines = iter(lines)
    head = list(islice(lines, LINES_LOOKED_AT))
    lines = chain(head, lines)
    said = [line for line in head if line.strip()]
    if any(line.strip() == END_OF_TEXT for line in said):
        parts = _split(lines, lambda line, _: line.strip() == END_OF_TEXT)
    elif said and is_title(said[0]):
        # Within an article such a line may be a formula; a title stands behind a blank line.
        parts = _split(lines, lambda line, before: is_title(line) and not before.strip())
    elif len(said) < LINES_LOOKED_AT:
        parts = _split(lines, lambda line, _: not line.strip())
    else:
        parts = ([line] for line in lines)
    for part in parts:
        text = "".join(part).strip().removeprefix(END_OF_TEXT).strip()
        if text:
            yield text


def _split(lines: Iterable[str], begins: Callable[[str, str], bool]) -> Iterator[list[str]]:
    """Lines in parts, each from one that begins a part (judged with the line before it) to the next."""
    part: list[str] = []
    before = ""
    for line in lines:
        if begins(line, before) and part:
            yield part
            part = []
        part.append(line)
        before = line
    yield part
