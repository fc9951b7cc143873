"""From public data sets to train.parquet and val.parquet: read, drop, de-duplicate, split, write."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, compress, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, versions
from verl_speculator.data.conversations import TEXT_SUFFIXES, find_suffix, messages_type, open_rows
from verl_speculator.data.formats import (
    CONVERSATION_FORMATS,
    TEXT,
    TOOL_CALLS,
    TOOLS,
    Dropped,
    Message,
    Row,
    columns_read,
    documents,
    gather_trees,
    is_title,
    is_tree_message,
    recognise,
    to_conversation,
    to_text,
    tools_of,
)
from verl_speculator.utils.atomic_io import TEMPORARY, atomic_file, check_writable
from verl_speculator.utils.settings import Option, UserError, check_minimums, nearest

if TYPE_CHECKING:
    import numpy as np

TRAIN, VAL, REPORT = "train.parquet", "val.parquet", "prepare.json"
AUTO, MESSAGES = "auto", "messages"
FORMATS = (AUTO, "sharegpt", "ultrachat", "oasst", "alpaca", "messages", "pairs", TEXT)
DEFAULT_VAL_SHARE = 0.02
CUT = "unanswered turns cut from the end"
ROWS_EXAMINED = 100
# Rows are held in memory and written to parquet in groups of at most so many rows, and about so many characters.
GROUP_ROWS, GROUP_CHARS = 1000, 1 << 24


@dataclass(frozen=True)
class PrepareSettings:
    """The options of `verl-speculator prepare`."""

    inputs: Annotated[
        tuple[str, ...],
        Option("json, jsonl, parquet or text files, or owner/name[:config][:split]", positional=True),
    ]
    out: Annotated[Path, Option("directory of train.parquet, val.parquet and prepare.json")]
    format: Annotated[str, Option(", ".join(FORMATS))] = AUTO
    text_column: Annotated[str | None, Option(f"column of plain text [{TEXT}]")] = None
    val_share: Annotated[float | None, Option(f"share that is held out [{DEFAULT_VAL_SHARE}]")] = None
    val_rows: Annotated[int | None, Option("number of rows that are held out instead", minimum=0)] = None
    seed: Annotated[int, Option("which rows are held out")] = 0
    max_rows: Annotated[int | None, Option("stop when so many are kept", minimum=1)] = None
    min_turns: Annotated[int, Option("answers that a conversation must have", minimum=1)] = 1
    max_chars: Annotated[int | None, Option("characters that a row may have", minimum=1)] = None
    keep_system: Annotated[bool, Option("keep system messages")] = True
    dedup: Annotated[bool, Option("drop rows that equal an earlier one")] = True
    overwrite: Annotated[bool, Option("replace results that are there")] = False

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("inputs: expected at least one file or hub name")
        if self.format not in FORMATS:
            raise UserError(f"format={self.format}{nearest(self.format, FORMATS)}: expected {', '.join(FORMATS)}")
        if self.text_column is not None and self.format not in (AUTO, TEXT):
            raise UserError(f"text_column={self.text_column}: format={self.format} has none, expected format={TEXT}")
        if self.val_share is not None and self.val_rows is not None:
            raise UserError(f"val_share={self.val_share}, val_rows={self.val_rows}: expected one of the two")
        if not 0 <= self.share < 1:
            raise UserError(f"val_share={self.val_share}: expected a number from 0 up to, but not, 1")
        check_minimums(self)

    @property
    def share(self) -> float:
        """`val_share`, or its default."""
        return DEFAULT_VAL_SHARE if self.val_share is None else self.val_share

    @property
    def text_key(self) -> str:
        """The column of plain text."""
        return self.text_column or TEXT

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that a row may be in, in the order of trying."""
        if self.format != AUTO:
            return (self.format,)
        return (TEXT,) if self.text_column else (*CONVERSATION_FORMATS, TEXT)

    def check_output(self) -> None:
        """Refuse an output directory that cannot be written to or holds what would be lost, without making it."""
        check_writable(f"out={self.out}", self.out)
        results = [path for path in (self.out / TRAIN, self.out / VAL) if path.exists()]
        if results and not self.overwrite:
            name = results[0].name
            raise UserError(f"out={self.out}: holds {name} already; expected another directory, or --overwrite")
        for name in self.inputs:
            if any(os.path.exists(name) and path.samefile(name) for path in results):
                raise UserError(f"out={self.out}: {name} is read, and would be replaced")


@dataclass
class RowCounts:
    """Rows that are kept, rows that are dropped by reason, and turns cut from rows that are kept; a tree is one row."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.kept + other.kept, self.dropped + other.dropped, self.changed + other.changed)

    def to_dict(self) -> dict[str, Any]:
        """For the report, the most frequent reason first."""
        return {
            "read": self.kept + self.dropped.total(),
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "changed": dict(self.changed.most_common()),
        }


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Write train.parquet, val.parquet (unless nothing is held out) and prepare.json.

    Which rows are held out is known when all are read, so they go to a file without a name first, which a kill removes.
    In memory stays what de-duplication and the split need, some 150 bytes a row.

    Returns the contents of prepare.json.

    Raises:
        UserError: if an input cannot be read, no row is left, or the results cannot be written.
    """
    suffixes = [find_suffix(name) for name in settings.inputs]
    settings.check_output()
    try:
        is_new = not settings.out.exists()
        settings.out.mkdir(parents=True, exist_ok=True)
        try:
            return _prepare(settings, suffixes)
        finally:
            if is_new and not any(settings.out.iterdir()):
                settings.out.rmdir()
    except OSError as error:
        raise UserError(f"out={settings.out}: cannot be written ({error})") from None


def _prepare(settings: PrepareSettings, suffixes: list[str]) -> dict[str, Any]:
    # What killed runs left under temporary names; nothing else, since the directory may hold anything.
    for name in (TRAIN, VAL, REPORT):
        for path in settings.out.glob(f"{TEMPORARY}*.{name}"):
            path.unlink(missing_ok=True)
    with TemporaryFile("w+", encoding="utf-8", dir=settings.out) as file:
        writer = DedupWriter(file, settings)
        results = [_read(name, suffix, writer) for name, suffix in zip(settings.inputs, suffixes, strict=True)]
        total = sum((counts for _, counts in results), RowCounts())
        if not total.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in total.dropped.most_common())
            raise UserError(f"no row is left: {total.dropped.total()} read, dropped: {reasons}")
        held_out = choose_held_out(writer.groups, share=settings.share, num_rows=settings.val_rows)
        report = _report(settings, results, total, int(held_out.sum()))
        _write(settings.out, writer, held_out, report)
        return report


@dataclass
class DedupWriter:
    """Writes rows that are kept to a file of JSON lines, and drops duplicates.

    Attributes:
        column: of the results, MESSAGES or TEXT; set before the first row.
        has_tools: whether a row offers or calls tools.
        groups: of each row a number that it shares with the rows that open alike.
    """

    file: TextIO
    settings: PrepareSettings
    column: str | None = None
    has_tools: bool = False
    groups: array[int] = field(default_factory=lambda: array("Q"))
    hashes: set[bytes] = field(default_factory=set)

    @property
    def is_full(self) -> bool:
        """Whether `max_rows` are kept."""
        return self.settings.max_rows is not None and len(self.groups) >= self.settings.max_rows

    def set_column(self, column: str, name: str) -> None:
        """Set the column of the results, which must be the same for every input."""
        if self.column not in (None, column):
            kinds = {MESSAGES: "conversations", TEXT: "plain text"}
            before = kinds[self.column]
            raise UserError(f"{name}: holds {kinds[column]}, the inputs before it {before}; expected one kind")
        self.column = column

    def add(self, content: list[Message] | str, tools: str | None = None) -> None:
        """Keep a row, with the tools that it offers as JSON.

        Raises:
            Dropped: if it equals an earlier row.
        """
        if isinstance(content, str):
            parts, opening = [content], content
        else:
            parts = [*chain.from_iterable(map(_texts, content)), *([tools] if tools else [])]
            self.has_tools = self.has_tools or bool(tools) or any(TOOL_CALLS in message for message in content)
            opening = next(message["content"] for message in content if message["role"] == "user")
        if self.settings.dedup:
            identity = _hash(parts)
            if identity in self.hashes:
                raise Dropped("duplicate")
            self.hashes.add(identity)
        # The hash is seeded: the order of these numbers decides which groups are held out.
        self.groups.append(int.from_bytes(_hash([opening.casefold()], size=8, seed=self.settings.seed)))
        self.file.write(json.dumps({self.column: content} | ({TOOLS: tools} if tools else {})) + "\n")


def _texts(message: Message) -> list[str]:
    """Everything that a message holds as texts, without the identifiers of calls, which may be random."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get(TOOL_CALLS, ())]
    return [message["role"], message["content"], *calls]


def _hash(parts: Iterable[str], *, size: int = 16, seed: int = 0) -> bytes:
    """A hash of texts that does not depend on white space and the encoding of accents."""
    # No part holds the separator: it counts as white space.
    text = "\x1f".join(" ".join(unicodedata.normalize("NFC", part).split()) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=size, key=str(seed).encode()[:64]).digest()


def _read(name: str, suffix: str, writer: DedupWriter) -> tuple[str | None, RowCounts]:
    """The format of an input (None if reading stopped before it), and what became of its rows."""
    counts, settings = RowCounts(), writer.settings
    if writer.is_full:
        return None, counts
    from tqdm import tqdm

    is_text = suffix in TEXT_SUFFIXES
    names, rows = open_rows(name, columns_read(settings.text_key), suffix)
    head = list(islice(rows, ROWS_EXAMINED))
    if not head:
        raise UserError(f"{name}: holds no rows")
    format_name = TEXT if is_text and TEXT in settings.formats else _recognise(name, settings, names, head)
    writer.set_column(TEXT if format_name == TEXT else MESSAGES, name)
    column = TEXT if is_text else settings.text_key
    rows = chain(head, rows)
    if format_name == "oasst" and any(map(is_tree_message, head)):
        rows = gather_trees(rows)
    elif format_name == TEXT and not is_text and is_title(next(filter(str.strip, _lines(head, column)), "")):
        # Wikitext with a row for each line: its first line that is not blank is a title.
        rows = ({column: text} for text in documents(_lines(rows, column)))
    for row in tqdm(rows, desc=name, unit=" rows", disable=None):
        try:
            content, tools, cut = _content(row, format_name, column, settings)
            writer.add(content, tools)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
            continue
        counts.kept += 1
        counts.changed += Counter({CUT: cut})
        if writer.is_full:
            break
    return format_name, counts


def _recognise(name: str, settings: PrepareSettings, names: list[str], head: list[Row]) -> str:
    """The format of an input: that of its first row that is in one."""
    formats = (recognise(row, settings.formats, settings.text_key) for row in head)
    if format_name := next(filter(None, formats), None):
        return format_name
    has = ", ".join(names or dict.fromkeys(column for row in head for column in row)) or "no column"
    needs = [settings.text_key if each == TEXT else CONVERSATION_FORMATS[each].needs for each in settings.formats]
    raise UserError(f"{name}: format={settings.format}: its rows hold {has}; expected {'; or '.join(needs)}")


def _lines(rows: Iterable[Row], column: str) -> Iterator[str]:
    """The texts of rows, an empty one for a row without, each with one line break at its end."""
    texts = (row[column] if isinstance(row.get(column), str) else "" for row in rows)
    return (text if text.endswith("\n") else text + "\n" for text in texts)


def _content(
    row: Row, format_name: str, column: str, settings: PrepareSettings
) -> tuple[list[Message] | str, str | None, int]:
    """What is written of a row, the tools that it offers as JSON, and how many turns were cut from it."""
    tools = None
    if format_name == TEXT:
        content, cut = to_text(row, column), 0
        texts = [content]
    else:
        content, cut = to_conversation(row, format_name, keep_system=settings.keep_system)
        tools = tools_of(row)
        texts = [*chain.from_iterable(_texts(message)[1:] for message in content), tools or ""]
        if sum(message["role"] == "assistant" for message in content) < settings.min_turns:
            raise Dropped("too few turns")
    if settings.max_chars is not None and sum(map(len, texts)) > settings.max_chars:
        raise Dropped("too long")
    return content, tools, cut


def choose_held_out(groups: Iterable[int], *, share: float, num_rows: int | None = None) -> np.ndarray:
    """Which rows are held out: whole groups in the order of their number, as long as they fit.

    Args:
        groups: [N] of each row the number that rows with the same opening share.
        share: of the rows that is held out, rounded, but at least one row unless it is 0.
        num_rows: how many rows instead.

    Returns:
        [N] bool.

    Raises:
        UserError: if no row can be held out, or none would be left.
    """
    import numpy as np

    rows = np.asarray(groups, dtype=np.uint64)
    if num_rows is None:
        setting, room = f"val_share={share}", max(1, round(share * len(rows))) if share else 0
    else:
        setting, room = f"val_rows={num_rows}", num_rows
    if room == 0:
        return np.zeros(len(rows), dtype=bool)
    numbers, sizes = np.unique(rows, return_counts=True)
    if room >= len(rows) or len(numbers) < 2:
        have = f"rows: {len(rows)}, different beginnings among them: {len(numbers)}"
        raise UserError(f"{setting}: so many cannot be held out ({have}); expected fewer, or val_share=0")
    chosen = np.zeros(len(numbers), dtype=bool)
    for i, size in enumerate(sizes):
        if size <= room:
            chosen[i] = True
            room -= size
    if not chosen.any():
        chosen[sizes.argmin()] = True
    return np.isin(rows, numbers[chosen])


def _report(
    settings: PrepareSettings, results: list[tuple[str | None, RowCounts]], total: RowCounts, num_val: int
) -> dict[str, Any]:
    import pyarrow as pa

    inputs = []
    for name, (format_name, counts) in zip(settings.inputs, results, strict=True):
        path = Path(name)
        file = {"bytes": path.stat().st_size, "fingerprint": file_fingerprint(path)} if path.is_file() else {}
        inputs.append({"name": name, "format": format_name, **file, **counts.to_dict()})
    options = asdict(settings)
    for name in ("inputs", "out", "seed", "overwrite"):
        del options[name]
    if settings.val_rows is None:
        options["val_share"] = settings.share
    return {
        "inputs": inputs,
        "counts": {**total.to_dict(), "train": total.kept - num_val, "val": num_val},
        "seed": settings.seed,
        "options": options,
        "versions": {**versions(), "pyarrow": pa.__version__},
        "commit": git_commit(),
    }


def _write(out: Path, rows: DedupWriter, held_out: np.ndarray, report: dict[str, Any]) -> None:
    """The results, complete before the first gets its name; train.parquet gets it last."""
    with (
        atomic_file(out / TRAIN) as train,
        atomic_file(out / REPORT) as report_file,
        atomic_file(out / VAL) if held_out.any() else nullcontext() as val,
    ):
        for path, selected in ((train, ~held_out), (val, held_out)):
            if path is not None:
                rows.file.seek(0)
                write_parquet(path, rows.column, compress(rows.file, selected), tools=rows.has_tools)
        report_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        # If the process dies between the renames, no file of an earlier run remains with one of this run.
        for name in (TRAIN, REPORT, VAL):
            (out / name).unlink(missing_ok=True)


def write_parquet(path: Path, column: str, lines: Iterator[str], *, tools: bool) -> None:
    """A parquet file of a column of texts or conversations, and one of tools if a row has any, from JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(column, messages_type(calls=tools) if column == MESSAGES else pa.string())])
    schema = schema.append(pa.field(TOOLS, pa.string())) if tools else schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := _next_group(lines):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _next_group(lines: Iterator[str]) -> list[Any]:
    group, chars = [], 0
    while len(group) < GROUP_ROWS and chars < GROUP_CHARS and (line := next(lines, None)):
        group.append(json.loads(line))
        chars += len(line)
    return group
