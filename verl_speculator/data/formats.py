"""Formats of training data: which one a row is in, and the conversation or text that it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

Row = dict[str, Any]
Message = dict[str, Any]

TEXT = "text"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
# A turn of these is a call, written as JSON.
CALL_ROLES = ("function_call", "tool_call")
TOOLS, TOOL_CALLS = "tools", "tool_calls"
CONVERSATION_COLUMNS = ("conversations", "conversation")
QUESTION_COLUMNS = ("prompt", "question", "query", "input")
ANSWER_COLUMNS = ("response", "answer", "completion", "output")
ALPACA_ANSWER_COLUMNS = ("output", "response")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Alpaca's second part of the question, and how its data say that there is none.
CONTEXT_COLUMNS = ("input", "context")
NO_CONTEXT = "<noinput>"
TREE_COLUMNS = ("message_id", "parent_id", "role", "text")

END_OF_TEXT = "<|endoftext|>"
# ` = Title = ` opens an article of wikitext, ` = = Section = = ` does not.
TITLE = re.compile(r"\s*= [^=\s](.*[^=\s])? =\s*")
LINES_EXAMINED = 1000


class Dropped(Exception):
    """A row that cannot be used; the message is the reason that it is counted under."""


def to_text(row: Row, column: str = TEXT) -> str:
    """The document of a row.

    Raises:
        Dropped: if it has none.
    """
    text = _content(row.get(column))
    if not text.strip():
        raise Dropped("empty text")
    return text


def to_conversation(row: Row, format_name: str, *, keep_system: bool = True) -> tuple[list[Message], int]:
    """The conversation of a row: perhaps a system message, then user and assistant in turn, the assistant last.
    Between two of the assistant's messages, the first of which calls tools, stand their results.

    Contents stay as they are, to the space: a speculator learns to write what the base model would.

    Returns:
        Messages, and how many turns were cut from the end, where nobody answers them.

    Raises:
        Dropped: if it is no such conversation.
    """
    turns = CONVERSATION_FORMATS[format_name].turns(row)
    if turns is None:
        raise Dropped("not in this format")
    system = _first(row, SYSTEM_COLUMNS)
    messages = [_message(turn) for turn in turns]
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": _content(system)})
    if not keep_system:
        messages = [message for message in messages if message["role"] != "system"]
    elif messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
    if not any(message["role"] == "assistant" for message in messages):
        raise Dropped("no assistant turn")
    count = len(messages)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    dialogue = messages[messages[0]["role"] == "system" :]
    if dialogue[0]["role"] != "user":
        raise Dropped("does not start with user")
    if not all(_may_follow(after, before) for before, after in pairwise(dialogue)):
        raise Dropped("roles do not alternate")
    is_text = (message for message in dialogue if message["role"] != "tool" and TOOL_CALLS not in message)
    if blank := next((message for message in is_text if not message["content"].strip()), None):
        raise Dropped("empty answer" if blank["role"] == "assistant" else "empty user message")
    return messages, count - len(messages)


def _may_follow(message: Message, before: Message) -> bool:
    """Whether a message may stand behind another: after a call its results, after these a message of the assistant."""
    awaits_result = before["role"] == "tool" or TOOL_CALLS in before
    if message["role"] == "tool":
        return awaits_result
    if message["role"] == "user":
        return before["role"] == "assistant" and TOOL_CALLS not in before
    return message["role"] == "assistant" and before["role"] in ("user", "tool")


def tools_of(row: Row) -> str | None:
    """The tools that a row offers, as JSON in OpenAI's form; None if it offers none. Raises Dropped if they are no list
    of objects."""
    if row.get(TOOLS) in (None, "", [], "[]"):
        return None
    tools = _parsed(row[TOOLS])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Dropped("tools")
    return _json([tool if "function" in tool else {"type": "function", "function": tool} for tool in tools], "tools")


def _parsed(value: Any) -> Any:
    """What a text holds as JSON, None if it is none; any other value without its null keys, which parquet gives to
    every object."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError:
        return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(value: Any, reason: str) -> str:
    """A value as JSON. Raises Dropped for the reason if it holds what JSON or UTF-8 cannot."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, UnicodeEncodeError):
        raise Dropped(reason) from None
    return text


def _tool_call(value: Any) -> Row:
    """A call as OpenAI writes it, from one in that form or of a name and arguments alone."""
    value = _parsed(value)
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise Dropped("tool call")
    name, arguments = function.get("name"), _parsed(function.get("arguments") or {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Dropped("tool call")
    call_id = _content(value["id"]) if isinstance(value.get("id"), str) else None
    function = {"name": _content(name), "arguments": _json(arguments, "tool call")}
    return {"id": call_id, "type": "function", "function": function}


def _message(turn: Any) -> Message:
    """A turn under the names that chat templates use."""
    if not isinstance(turn, dict):
        raise Dropped("turn is not a message")
    role = _first(turn, ("role", "from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown role")
    content = _first(turn, ("content", "value"))
    calls = turn.get(TOOL_CALLS) or ([turn["function_call"]] if turn.get("function_call") else [])
    if role.lower() in CALL_ROLES:
        calls, content = [content], ""
    if not calls:
        message = {"role": ROLES[role.lower()], "content": _content(content)}
        if message["role"] == "tool":  # templates of some base models ask which call it answers
            message |= {key: _content(turn[key]) for key in ("tool_call_id", "name") if turn.get(key) is not None}
        return message
    if ROLES[role.lower()] != "assistant" or not isinstance(calls, list):
        raise Dropped("tool call")
    content = "" if content is None else _content(content)
    return {"role": "assistant", "content": content, TOOL_CALLS: [_tool_call(call) for call in calls]}


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
    """The first value that is not null: parquet gives every row the keys of all."""
    return next((row[name] for name in names if row.get(name) is not None), None)


# Formats. `turns` of a row in another format is None; what a turn holds is checked when it is read (`_message`).


def _list_of(item_type: type, *columns: str) -> Callable[[Row], list[Any] | None]:
    """Reads the first of these columns that is not null, if it is a list of that type."""

    def turns(row: Row) -> list[Any] | None:
        value = _first(row, columns)
        return value if isinstance(value, list) and all(isinstance(item, item_type) for item in value[:1]) else None

    return turns


def _in_turn(contents: Sequence[Any] | None) -> list[Row] | None:
    """The contents of user and assistant in turn, as messages."""
    if contents is None:
        return None
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _pair(row: Row, question_columns: Sequence[str], answer_columns: Sequence[str]) -> list[Row] | None:
    """The first text of each group of columns, as messages of user and assistant."""
    texts = [name for name in row if isinstance(row[name], str)]
    questions = [row[name] for name in question_columns if name in texts]
    answers = [row[name] for name in answer_columns if name in texts]
    return _in_turn((questions[0], answers[0])) if questions and answers else None


def _alpaca(row: Row) -> Iterator[Row] | None:
    turns = _pair(row, ("instruction",), ALPACA_ANSWER_COLUMNS)
    return None if turns is None else _with_context(turns, _first(row, CONTEXT_COLUMNS))


def _with_context(turns: list[Row], context: Any) -> Iterator[Row]:
    context = "" if context is None else _content(context)
    if context.strip().lower() not in ("", NO_CONTEXT):
        turns[0]["content"] += f"\n\n{context}"
    yield from turns


def is_tree_message(row: Row) -> bool:
    """Whether a row is one message of an OpenAssistant tree, to be joined by `gather_trees`."""
    known = isinstance(row.get("message_id"), (str, int)) and isinstance(row.get("parent_id"), (str, int, type(None)))
    return known and all(name in row for name in TREE_COLUMNS)


def gather_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """OpenAssistant's messages as trees. All are held in memory, since the messages of a tree may lie anywhere.

    A message whose parent is missing becomes a tree too, which `to_conversation` drops by name.
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


def _oasst(row: Row) -> Iterable[Row] | None:
    root = row.get("prompt")
    if isinstance(root, dict) and isinstance(root.get("replies"), list):
        return _best_path(root)
    return () if is_tree_message(row) else None


def _best_path(node: Row) -> Iterator[Row]:
    """From the root to a leaf by the best-ranked reply; of equals one that is answered, then the first."""
    if node.get("parent_id") is not None:
        raise Dropped("reply without its parent")
    if node.get("deleted"):
        raise Dropped("deleted")
    while node is not None:
        yield {"role": node.get("role"), "content": node.get("text")}
        replies = [r for r in node.get("replies") or () if isinstance(r, dict) and not r.get("deleted")]
        node = min(replies, key=_preference, default=None)


def _preference(reply: Row) -> tuple[float, bool]:
    rank = reply.get("rank")
    is_ranked = isinstance(rank, (int, float)) and rank == rank
    return (rank if is_ranked else float("inf")), not reply.get("replies")


class Format(NamedTuple):
    """One way to write a conversation in a row.

    Attributes:
        needs: what a row in it has, for error messages.
        columns: all columns that are read.
        turns: of a row, as they stand there; None if the row is in another format.
    """

    needs: str
    columns: tuple[str, ...]
    turns: Callable[[Row], Iterable[Any] | None]


# In the order in which a row is tried: the surest first, plain text after all of them.
CONVERSATION_FORMATS = {
    "oasst": Format(
        "message_id, parent_id, role and text, or prompt with its replies",
        (*TREE_COLUMNS, "rank", "deleted", "prompt"),
        _oasst,
    ),
    "messages": Format("messages, a list of role and content", ("messages",), _list_of(dict, "messages")),
    "sharegpt": Format(
        "conversations or conversation, a list of from and value",
        CONVERSATION_COLUMNS,
        _list_of(dict, *CONVERSATION_COLUMNS),
    ),
    "ultrachat": Format("data, a list of texts", ("data",), lambda row: _in_turn(_list_of(str, "data")(row))),
    "alpaca": Format("instruction and output", ("instruction", *ALPACA_ANSWER_COLUMNS, *CONTEXT_COLUMNS), _alpaca),
    "pairs": Format(
        f"one of {', '.join(QUESTION_COLUMNS)} and one of {', '.join(ANSWER_COLUMNS)}",
        (*QUESTION_COLUMNS, *ANSWER_COLUMNS),
        lambda row: _pair(row, QUESTION_COLUMNS, ANSWER_COLUMNS),
    ),
}


def recognise(row: Row, format_names: Iterable[str], text_column: str = TEXT) -> str | None:
    """The first of these formats that a row is in, None if it is in none."""
    for name in format_names:
        if isinstance(row.get(text_column), str) if name == TEXT else CONVERSATION_FORMATS[name].turns(row) is not None:
            return name
    return None


def columns_read(text_column: str = TEXT) -> set[str]:
    """Every column that any format reads."""
    columns = chain.from_iterable(each.columns for each in CONVERSATION_FORMATS.values())
    return {text_column, TOOLS, *SYSTEM_COLUMNS, *columns}


# Documents of plain text.


def is_title(line: str) -> bool:
    """Whether a line is the title of a wikitext article."""
    return bool(TITLE.fullmatch(line))


def documents(lines: Iterable[str]) -> Iterator[str]:
    """The documents of plain text, without those that are blank.

    What separates them is seen from the first lines: `<|endoftext|>` alone on a line; else, where the text begins
    with a title of wikitext, the titles; else blank lines; else, in a longer text without any, the end of each line.
    """
    lines = iter(lines)
    head = list(islice(lines, LINES_EXAMINED))
    lines = chain(head, lines)
    filled = [line for line in head if line.strip()]
    if any(line.strip() == END_OF_TEXT for line in filled):
        parts = _split(lines, lambda line, _: line.strip() == END_OF_TEXT)
    elif filled and is_title(filled[0]):
        # Within an article such a line may be a formula; a title stands behind a blank line.
        parts = _split(lines, lambda line, before: is_title(line) and not before.strip())
    elif len(filled) < LINES_EXAMINED:
        parts = _split(lines, lambda line, _: not line.strip())
    else:
        parts = ([line] for line in lines)
    texts = ("".join(part).strip().removeprefix(END_OF_TEXT).strip() for part in parts)
    yield from filter(None, texts)


def _split(lines: Iterable[str], begins: Callable[[str, str], bool]) -> Iterator[list[str]]:
    """Lines in parts, each from a line that begins a part (seen together with the line before it) up to the next."""
    part: list[str] = []
    before = ""
    for line in lines:
        if begins(line, before) and part:
            yield part
            part = []
        part.append(line)
        before = line
    yield part
