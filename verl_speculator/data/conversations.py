"""Conversations with the places that the base is to answer, from the rows of a parquet table."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TextIO

from verl_speculator.data.formats import TEXT, Row, documents
from verl_speculator.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa


COLUMNS = ("messages", "turns", "prompt")
TOOLS = "tools"
THINKING = "enable_thinking"
# Stands where an answer will be. A template may refuse a message that is empty.
UNANSWERED = {"role": "assistant", "content": "…"}


@dataclass
class Conversation:
    """One conversation, in which answers take their places one after the other.

    Attributes:
        row: in the file, from 0.
        messages: all of it, with the keys that the file gives them; an answer to be given is UNANSWERED.
        open: places of the answers that are to be given.
        calls_tools: whether tools are called or offered. The results of the calls in the file would answer calls that
            the base never made.
    """

    row: int
    messages: list[dict[str, Any]]
    open: list[int]
    calls_tools: bool = False

    def prompt(self, place: int | None = None) -> list[dict[str, Any]]:
        """The messages before a place, by default the first open one."""
        before = self.messages[: self.open[0] if place is None else place]
        # Parquet gives every message all keys of any; chat templates ask whether a key is there.
        return [{key: value for key, value in message.items() if value is not None} for message in before]

    def answer(self, text: str) -> None:
        """Put an answer at the first open place."""
        self.messages[self.open.pop(0)] = {"role": "assistant", "content": text}


def read_table(path: Path) -> pa.Table:
    """A parquet file with its schema as it stands.

    Raises:
        UserError: if it is none, or holds no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise UserError(f"data={path}: no such file")
    if path.is_dir():
        raise UserError(f"data={path}: a directory, expected one parquet file")
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data={path}: truncated, or not a parquet file ({reason[:200]})") from None
    if not table.num_rows:
        raise UserError(f"data={path}: holds no rows")
    return table


@dataclass(frozen=True)
class PromptFile:
    """A table and where its conversations are.

    Attributes:
        path: of the file, for messages.
        table: all columns.
        column: the one that is read: the first of COLUMNS that is there.
    """

    path: Path
    table: pa.Table
    column: str

    @classmethod
    def open(cls, path: Path) -> PromptFile:
        """Read a file.

        Raises:
            UserError: for a file without prompts, or of a shape that cannot be answered in.
        """
        table = read_table(path)
        names = table.schema.names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            has = ", ".join(f"{name}{nearest(name, COLUMNS)}" for name in names) or "none"
            raise UserError(f"data={path}: no column of prompts; it has {has}; expected one of {', '.join(COLUMNS)}")
        source = cls(path, table, column)
        source._check_type()
        if THINKING in names and table[THINKING].null_count < table.num_rows:
            raise UserError(
                f"data={path}: column {THINKING!r} is set, by which training writes another prompt than this command; "
                "expected a file without it"
            )
        return source

    def _check_type(self) -> None:
        """Whether an answer can be written in the column's own type."""
        import pyarrow as pa

        given = self.table.schema.field(self.column).type
        if self.column == "turns" or (self.column == "prompt" and not _holds_messages(given)):
            return
        try:
            (written,) = pa.array([[UNANSWERED]], type=given).to_pylist()
            fits = {key: written[0].get(key) for key in UNANSWERED} == UNANSWERED
        except (pa.ArrowException, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"data={self.path}: column {self.column!r} is {given}, expected lists of messages with a role and a "
                "content, both texts"
            )

    def talks(self, rows: list[int]) -> Iterator[Conversation]:
        """The conversations of some rows.

        Raises:
            UserError: naming a row that holds none.
        """
        columns = [name for name in (self.column, TOOLS) if name in self.table.schema.names]
        for i, row in zip(rows, self._take(rows).select(columns).to_pylist(), strict=True):
            where = f"data={self.path}, row {i}"
            messages = _messages(row[self.column], self.column, where)
            places = [k for k, message in enumerate(messages) if k > 0 and message["role"] == "assistant"]
            if messages[-1]["role"] != "assistant":
                places.append(len(messages))
                messages.append(UNANSWERED)
            if not places:
                raise UserError(f"{where}: {self.column} has no message to answer")
            calls = any(message.get("tool_calls") or message["role"] in ("tool", "function") for message in messages)
            for place in places:
                messages[place] = UNANSWERED
            for k, message in enumerate(messages):
                if not isinstance(message.get("content"), str) and not calls:
                    raise UserError(f"{where}: {self.column}[{k}] is {short(message)}, expected a content")
            yield Conversation(i, messages, places, calls or row.get(TOOLS) not in (None, "", "[]", []))

    def _take(self, rows: list[int]) -> pa.Table:
        """Some rows, in ascending order. Taking may join all chunks of what it is given: not of the whole table."""
        first = rows[0] if rows else 0
        span = self.table.slice(first, rows[-1] - first + 1 if rows else 0)
        return span.take([row - first for row in rows]) if rows else span

    def answered(self, talks: list[Conversation]) -> pa.Table:
        """The rows of some conversations with their answers: every other column as it was, nested ones too."""
        import pyarrow as pa

        rows, schema = self._take([talk.row for talk in talks]), self.schema
        place = schema.get_field_index("messages")
        column = pa.array([talk.messages for talk in talks], type=schema.field(place).type)
        if place < rows.num_columns:
            return rows.set_column(place, schema.field(place), column)
        return rows.append_column(schema.field(place), column)

    @property
    def schema(self) -> pa.Schema:
        """Of the result: the file's own, with a column `messages` at its end if it had none."""
        import pyarrow as pa

        schema = self.table.schema
        if "messages" in schema.names:
            return schema
        given = schema.field(self.column).type
        if self.column == "turns" or not _holds_messages(given):
            given = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        return schema.append(pa.field("messages", given))


def _holds_messages(kind: pa.DataType) -> bool:
    """Whether a prompt's type is anything but plain text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """A row's value as messages, each with a role."""
    if column == "turns":
        if not isinstance(value, list) or not value or not all(isinstance(turn, str) and turn for turn in value):
            raise UserError(f"{where}: {column} is {short(value)}, expected a list of texts, none of them empty")
        turns = ((said, UNANSWERED) for said in ({"role": "user", "content": turn} for turn in value))
        return [message for turn in turns for message in turn]
    if column == "prompt" and isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column} is {short(value)}, expected messages")
    for k, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: {column}[{k}] is {short(message)}, expected a role and a content")
    return value


JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")  # the last two are wikitext's own
SUFFIXES = (".parquet", *JSON_SUFFIXES, *TEXT_SUFFIXES)
COMPRESSED = ".gz"
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<first>[\w.-]*))?(:(?P<second>[\w.-]+))?")
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class DataFile:
    """Something to read rows from.

    Attributes:
        name: as the user gave it.
        suffix: what kind of file it is; empty for a name on the hub.
    """

    name: str
    suffix: str

    @property
    def is_text(self) -> bool:
        """Whether it is a file of plain text, whose rows are documents."""
        return self.suffix in TEXT_SUFFIXES

    def rows(self, columns: set[str]) -> tuple[list[str], Iterator[Row]]:
        """Names of its columns as far as they are known beforehand, and its rows with at least `columns`.

        Raises:
            UserError: here or while the rows are read, naming the source and what is wrong with it.
        """
        if not self.suffix:
            return [], _read_hub(self.name)
        path = Path(self.name)
        if self.is_text:
            return [TEXT], ({TEXT: text} for text in documents(_lines(path)))
        if self.suffix == ".parquet":
            return _read_parquet(path, columns)
        return [], _read_json(path)


def find_source(name: str) -> DataFile:
    """A file, or a data set on the hub where there is no such file.

    Raises:
        UserError: if it can be neither.
    """
    path = Path(name)
    kind = Path(path.stem).suffix if path.suffix == COMPRESSED else path.suffix
    compressible = kind in (*JSON_SUFFIXES, *TEXT_SUFFIXES)
    if path.is_dir():
        raise UserError(f"{name}: a directory, expected files ({', '.join(SUFFIXES)}), as in {path}/*.parquet")
    if path.exists():
        if kind not in SUFFIXES or (path.suffix == COMPRESSED and not compressible):
            hint = nearest(kind, SUFFIXES) if kind not in SUFFIXES else ""
            accepted = f"{', '.join(SUFFIXES)} ({COMPRESSED} behind all but the first)"
            raise UserError(f"{name}: unknown suffix {path.suffix!r}{hint}, expected one of {accepted}")
        return DataFile(name, kind)
    if kind in SUFFIXES or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such file")
    return DataFile(name, "")


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """A file of text, open; what keeps it from being read is a user's error."""
    try:
        # "utf-8-sig" also reads what has no mark, and some exports begin with one.
        with (gzip.open if path.suffix == COMPRESSED else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        yield from file


def _read_json(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, or of one array, which is read whole."""
    with _reading(path) as file:
        is_array = None
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if is_array is None and (is_array := line.lstrip().startswith("[")):
                rows = _parse(line + file.read(), str(path), "an array of objects")
                yield from (_object(row, f"{path}, item {i}") for i, row in enumerate(rows))
                return
            where = f"{path}, line {number}"
            yield _object(_parse(line, where, "one object a line, or one array"), where)


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: truncated, or not JSON ({error.msg}); expected {expected}") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {short(row)}, expected a JSON object")
    return row


def _read_parquet(path: Path, columns: set[str]) -> tuple[list[str], Iterator[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return UserError(f"{path}: truncated, or not a parquet file ({reason[:200]})")

    def rows(parquet: pq.ParquetFile, names: list[str]) -> Iterator[Row]:
        try:
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=names):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise refused(error) from None
        finally:
            parquet.close()

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise refused(error) from None
    names = parquet.schema_arrow.names
    # A file without any of the columns still has rows; one of its own shows them, so that they can be refused.
    return names, rows(parquet, [name for name in names if name in columns] or names[:1])


def _read_hub(name: str) -> Iterator[Row]:
    """Rows of a data set on the hub, downloaded as they are read: `owner/name[:config][:split]`."""
    found = HUB_NAME.fullmatch(name)
    repository, first, second = found["name"], found["first"], found["second"]
    try:
        import datasets
        from huggingface_hub.utils import logging

        # Its attempts to reach the hub would be some twenty lines; what came of them is one line below.
        logging.set_verbosity_error()
        config, split = first, second
        if first and not second and first not in datasets.get_dataset_config_names(repository):
            config, split = None, first
        yield from datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
    except Exception as error:  # whatever hub, network and data set may bring
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{name}: no such file, and as a data set on the hub it cannot be read ({type(error).__name__}: {reason})"
        ) from None
