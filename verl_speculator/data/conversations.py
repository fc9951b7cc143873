"""The one reader of data files: rows of parquet, JSON, text and hub data sets, and the conversations in these rows.

`prepare`, `regenerate`, `evaluate` and the checks before training read through this module, so that a file which one of
them accepts means the same to the others.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from verl_speculator.data.formats import TEXT, TOOL_CALLS, TOOLS, Message, Row, documents
from verl_speculator.utils.settings import UserError, nearest, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")  # the last two are those of wikitext
TABLE_SUFFIXES = (".parquet", *JSON_SUFFIXES)
SUFFIXES = (*TABLE_SUFFIXES, *TEXT_SUFFIXES)
GZIP = ".gz"
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<first>[\w.-]*))?(:(?P<second>[\w.-]+))?")
ROWS_AT_A_TIME = 256


# Files to rows.


def find_suffix(name: str, suffixes: Sequence[str] = SUFFIXES, *, hub: bool = True) -> str:
    """The suffix of a file, without a `.gz`; with `hub`, "" where there is no such file but `name` may be a data set's.

    Raises:
        UserError: if it is neither.
    """
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix == GZIP else path.suffix
    if path.is_dir():
        raise UserError(f"{name}: a directory, expected one file ({', '.join(suffixes)}), as in {path}/*.parquet")
    if path.exists():
        if suffix not in suffixes or (path.suffix == GZIP and suffix == ".parquet"):
            hint = nearest(suffix, suffixes) if suffix not in suffixes else ""
            accepted = f"{', '.join(suffixes)} (all but .parquet also with {GZIP})"
            raise UserError(f"{name}: unknown suffix {path.suffix!r}{hint}, expected one of {accepted}")
        return suffix
    if not hub or suffix in suffixes or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such file")
    return ""


def open_rows(name: str, columns: Collection[str], suffix: str) -> tuple[list[str], Iterator[Row]]:
    """The names of a file's columns, as far as they are known before reading, and its rows with at least `columns`.

    Args:
        name: a file, or `owner/name[:config][:split]` on the hub.
        columns: to be read.
        suffix: of `find_suffix`. The rows of a text file are documents.

    Raises:
        UserError: here or while the rows are read, naming the file, the line and what is wrong with it.
    """
    path = Path(name)
    if not suffix:
        return [], _read_hub(name)
    if suffix in TEXT_SUFFIXES:
        return [TEXT], ({TEXT: text} for text in documents(_read_lines(path)))
    if suffix != ".parquet":
        return [], _read_json(path)
    with open_parquet(path, name) as parquet:
        names = parquet.schema_arrow.names
    # A file without any of the columns still has rows; one of its own columns shows them, to be refused later.
    read = columns if set(names) & set(columns) else names[:1]
    return names, chain.from_iterable(read_parquet(path, read, name))


def open_parquet(path: str | Path, setting: str) -> pq.ParquetFile:
    """A parquet file with at least one row, its footer read. `setting` with its value begins each error message.

    Raises:
        UserError: if there is no such file, it is truncated or no parquet file, or it holds no rows.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.exists():
        raise UserError(f"{setting}: no such file")
    if path.is_dir():
        raise UserError(f"{setting}: a directory, expected one parquet file")
    with _parquet_errors(setting):
        parquet = pq.ParquetFile(path)
    if not parquet.metadata.num_rows:
        raise UserError(f"{setting}: holds no rows")
    return parquet


def read_parquet(path: str | Path, columns: Collection[str], setting: str) -> Iterator[list[Row]]:
    """Rows of those columns that the file has, a batch at a time. Raises as `open_parquet`."""
    with open_parquet(path, setting) as parquet, _parquet_errors(setting):
        names = [name for name in parquet.schema_arrow.names if name in columns]
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=names):
            yield batch.to_pylist()


@contextmanager
def _parquet_errors(setting: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = one_line(error, 200) or type(error).__name__
        raise UserError(f"{setting}: truncated, or not a parquet file ({reason})") from None


def _read_lines(path: Path) -> Iterator[str]:
    try:
        # Some exports begin with a byte order mark; "utf-8-sig" reads files with and without it.
        with (gzip.open if path.suffix == GZIP else open)(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def _read_json(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, or of one array, which is read whole."""
    lines = _read_lines(path)
    is_array = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if is_array is None and (is_array := line.lstrip().startswith("[")):
            text, where, expected = "".join([line, *lines]), str(path), "an array of objects"
        else:
            text, where, expected = line, f"{path}, line {number}", "one object a line, or one array"
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: truncated, or not JSON ({error.msg}); expected {expected}") from None
        for i, row in enumerate(value if is_array else [value]):
            if not isinstance(row, dict):
                raise UserError(f"{where}{f', item {i}' * is_array}: {short(row)}, expected a JSON object")
            yield row


def _read_hub(name: str) -> Iterator[Row]:
    """Rows of a data set on the hub, streamed."""
    match = HUB_NAME.fullmatch(name)
    repository, config, split = match["name"], match["first"], match["second"]
    try:
        import datasets
        from huggingface_hub.utils import logging

        # Failed attempts to reach the hub would be logged in some twenty lines; the error below says it in one.
        logging.set_verbosity_error()
        if config and not split and config not in datasets.get_dataset_config_names(repository):
            config, split = None, config
        yield from datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub, the network and the data set's own code can raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{name}: no such file, and as a data set on the hub it cannot be read ({reason})") from None


def read_rows(path: str | Path, accepted: Sequence[str], others: Sequence[str] = ()) -> tuple[str, list[Row]]:
    """All rows of a parquet or JSON file, with the columns `accepted` and `others` as far as it has them.

    Returns:
        The first of the `accepted` columns that the file has, and its rows.

    Raises:
        UserError: if the file cannot be read, holds no rows, or has none of the `accepted` columns.
    """
    columns = (*accepted, *others)
    names, rows = open_rows(str(path), columns, find_suffix(str(path), TABLE_SUFFIXES, hub=False))
    known, selected = dict.fromkeys(names), []
    for row in rows:
        known |= dict.fromkeys(row)
        selected.append({name: row[name] for name in columns if name in row})
    if not selected:
        raise UserError(f"{path}: holds no rows")
    return choose_column(str(path), known, accepted), selected


def choose_column(where: str, names: Collection[str], accepted: Sequence[str]) -> str:
    """The first of the `accepted` columns that is among `names`; a `UserError` if there is none."""
    for column in accepted:
        if column in names:
            return column
    has = ", ".join(f"{name}{nearest(name, accepted)}" for name in names) or "none"
    raise UserError(f"{where}: no column that can be used; it has {has}; expected one of {', '.join(accepted)}")


# Values of rows to conversations. `where` names file, row and column in an error.


def check_text(value: Any, where: str, *, empty: bool = False) -> str:
    """A value that must be a text, and not an empty one unless `empty`."""
    if not isinstance(value, str) or not (value or empty):
        raise UserError(f"{where} is {short(value)}, expected a text{'' if empty else ' that is not empty'}")
    return value


def check_turns(value: Any, where: str) -> list[str]:
    """A value that must be a list of what the user says, one text for each answer."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, str) and turn for turn in value):
        raise UserError(f"{where} is {short(value)}, expected a list of texts, none of them empty")
    return value


def check_messages(value: Any, where: str, *, answers: bool = True) -> list[Message]:
    """A value that must be a list of messages, without the keys of a message that are null.

    Args:
        value: each message needs a role, and a content (a text or a list of parts) unless it calls or answers a tool.
        where: names file, row and column in an error.
        answers: False if the assistant's messages will be replaced, so that they need no content; not the first
            message, which answers nothing.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {short(value)}, expected a list of messages")
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if not (isinstance(role, str) and role) or not (
            isinstance(message.get("content"), (str, list))
            or _uses_tools(message)
            or (not answers and i > 0 and role == "assistant")
        ):
            raise UserError(f"{where}[{i}] is {short(message)}, expected a role and a content")
    # Parquet gives every message the keys of all; chat templates ask whether a key is there.
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    # verl and chat templates look a content up; OpenAI's messages may have none beside a call.
    return [
        {"content": "", **each, TOOL_CALLS: _read_calls(each)} if each.get(TOOL_CALLS) else each for each in messages
    ]


def _read_calls(message: Message) -> list[Any]:
    """The calls of a message with their arguments as objects, which chat templates expect; OpenAI writes them as JSON,
    which is also what a parquet column can hold."""
    calls = []
    for call in message[TOOL_CALLS]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                call = call | {"function": function | {"arguments": json.loads(function["arguments"])}}
        calls.append(call)
    return calls


def read_tools(value: Any) -> Any:
    """The tools of a row, from JSON if they are written so; None for none."""
    if isinstance(value, str) and value:
        with suppress(ValueError):
            value = json.loads(value)
    return value or None


def check_prompt(value: Any, where: str, *, answers: bool = True) -> list[Message]:
    """A value that must be one text of the user's, or a list of messages (see `check_messages`)."""
    if value is None:
        raise UserError(f"{where} is None, expected a text, or a list of messages")
    if isinstance(value, str):
        return [{"role": "user", "content": check_text(value, where)}]
    return check_messages(value, where, answers=answers)


def _uses_tools(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call")) or message["role"] in ("tool", "function")


def messages_type(*, calls: bool = False) -> pa.DataType:
    """The type of a parquet column of conversations: lists of messages with a role and a content, and with `calls` the
    calls of tools, whose arguments are JSON."""
    import pyarrow as pa

    text = pa.string()
    function = pa.struct([("name", text), ("arguments", text)])
    call = pa.struct([("id", text), ("type", text), ("function", function)])
    more = [(TOOL_CALLS, pa.list_(call)), ("tool_call_id", text), ("name", text)] if calls else []
    return pa.list_(pa.struct([("role", text), ("content", text), *more]))


# Conversations to be answered.

PROMPT_COLUMNS = ("messages", "turns", "prompt")
THINKING = "enable_thinking"
# Stands where an answer will be. A template may refuse a message that is empty.
UNANSWERED = {"role": "assistant", "content": "…"}


@dataclass
class Conversation:
    """A conversation whose assistant messages are generated one after the other.

    Attributes:
        row: in the file, from 0.
        messages: all messages, with the keys that the file gives them; UNANSWERED where an answer will be generated.
        unanswered: indices of these messages, ascending.
        uses_tools: whether tools are offered or called. The results in the file belong to calls that the base model
            never made, so it cannot be answered.
    """

    row: int
    messages: list[Message]
    unanswered: list[int]
    uses_tools: bool = False

    def answer(self, text: str) -> None:
        """Give the first unanswered message its content."""
        self.messages[self.unanswered.pop(0)] = {"role": "assistant", "content": text}


@dataclass(frozen=True)
class PromptFile:
    """A parquet file whose conversations are answered, and written back with all of its other columns.

    Attributes:
        path: for error messages.
        table: all columns.
        column: the first of PROMPT_COLUMNS that the file has.
    """

    path: Path
    table: pa.Table
    column: str

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Read a file whole.

        Raises:
            UserError: if it has no prompts, or answers cannot be written in the type of its column.
        """
        import pyarrow as pa

        setting = f"data={path}"
        with open_parquet(path, setting) as parquet, _parquet_errors(setting):
            table = parquet.read()
        file = cls(path, table, choose_column(setting, table.schema.names, PROMPT_COLUMNS))
        if THINKING in table.schema.names and table[THINKING].null_count < table.num_rows:
            raise UserError(
                f"{setting}: column {THINKING!r} is set, by which training writes another prompt than this command; "
                "expected a file without it"
            )
        try:
            ((written,),) = pa.array([[UNANSWERED]], type=file.schema.field("messages").type).to_pylist()
            fits = UNANSWERED.items() <= written.items()
        except (pa.ArrowException, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"{setting}: column {file.column!r} is {table.schema.field(file.column).type}, expected lists of "
                "messages with a role and a content, both texts"
            )
        return file

    @property
    def schema(self) -> pa.Schema:
        """Of the result: that of the file, with a column `messages` at its end if it has none."""
        import pyarrow as pa

        schema = self.table.schema
        if "messages" in schema.names:
            return schema
        column_type = schema.field(self.column).type
        if self.column == "turns" or not pa.types.is_nested(column_type):
            column_type = messages_type()
        return schema.append(pa.field("messages", column_type))

    def conversations(self, rows: list[int]) -> Iterator[Conversation]:
        """The conversations of some rows.

        Raises:
            UserError: naming a row that holds no conversation to answer.
        """
        columns = [name for name in (self.column, TOOLS) if name in self.table.schema.names]
        for i, row in zip(rows, self._take(rows).select(columns).to_pylist(), strict=True):
            where = f"data={self.path}, row {i}: {self.column}"
            if self.column == "turns":
                texts = check_turns(row[self.column], where)
                messages = [message for text in texts for message in ({"role": "user", "content": text}, UNANSWERED)]
            else:
                messages = check_prompt(row[self.column], where, answers=False)
            uses_tools = any(map(_uses_tools, messages)) or row.get(TOOLS) not in (None, "", "[]", [])
            if messages[-1]["role"] != "assistant":
                messages.append(UNANSWERED)
            unanswered = [k for k, message in enumerate(messages) if k > 0 and message["role"] == "assistant"]
            if not unanswered:
                raise UserError(f"{where} has no message to answer")
            for k in unanswered:
                messages[k] = UNANSWERED
            yield Conversation(i, messages, unanswered, uses_tools)

    def answered(self, answers: Mapping[int, Sequence[str]]) -> pa.Table:
        """Some rows, ascending, with their answers; all other columns are unchanged, nested ones too."""
        import pyarrow as pa

        rows, schema = self._take(list(answers)), self.schema
        messages = []
        for conversation in self.conversations(list(answers)):
            for text in answers[conversation.row]:
                conversation.answer(text)
            messages.append(conversation.messages)
        index = schema.get_field_index("messages")
        column = pa.array(messages, type=schema.field(index).type)
        if index < rows.num_columns:
            return rows.set_column(index, schema.field(index), column)
        return rows.append_column(schema.field(index), column)

    def _take(self, rows: list[int]) -> pa.Table:
        """Some rows, ascending. `take` may join all chunks of its table: it gets a slice, not the whole table."""
        return self.table.slice(rows[0], rows[-1] - rows[0] + 1).take([row - rows[0] for row in rows])
