"""From public data sets to train.parquet and val.parquet: read, drop, de-duplicate, split, write."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from verl_speculator.data.conversations import DataFile, find_source
from verl_speculator.data.dedup import MESSAGES, DedupWriter, choose_held_out, split
from verl_speculator.data.formats import (
    STYLES,
    TEXT,
    Dropped,
    Row,
    columns_read,
    documents,
    gather_trees,
    is_title,
    is_tree_message,
    recognise,
    to_conversation,
    to_text,
)
from verl_speculator.utils.atomic_io import TEMPORARY, atomic_file, check_writable
from verl_speculator.utils.errors import UserError, nearest
from verl_speculator.utils.options import Option, check_minimums

if TYPE_CHECKING:
    import numpy as np

TRAIN, VAL, REPORT, SPOOL = "train.parquet", "val.parquet", "prepare.json", "rows.parquet"
AUTO = "auto"
FORMATS = (AUTO, "sharegpt", "ultrachat", "oasst", "alpaca", "messages", "pairs", TEXT)
DEFAULT_VAL_SHARE = 0.02
CUT = "unanswered user turns cut from the end"
ROWS_LOOKED_AT = 100


@dataclass(frozen=True)
class PrepareSettings:
    """What is read, kept and held out."""

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
    def column(self) -> str:
        """Where plain text is read."""
        return self.text_column or TEXT

    @property
    def styles(self) -> tuple[str, ...]:
        """Those that a row may be in, in the order of trying."""
        if self.format != AUTO:
            return (self.format,)
        return (TEXT,) if self.text_column else (*STYLES, TEXT)

    def check_output(self, sources: Iterable[DataFile]) -> None:
        """Refuse an output directory that cannot be written to or holds what would be lost, without making it."""
        check_writable(f"out={self.out}", self.out)
        results = [path for path in (self.out / TRAIN, self.out / VAL) if path.exists()]
        if results and not self.overwrite:
            name = results[0].name
            raise UserError(f"out={self.out}: holds {name} already; expected another directory, or --overwrite")
        for source in sources:
            if any(os.path.exists(source.name) and path.samefile(source.name) for path in results):
                raise UserError(f"out={self.out}: {source.name} is read, and would be replaced")


@dataclass
class Counts:
    """What became of the rows of an input; read = kept + dropped.

    Attributes:
        read: conversations or documents; a tree of messages is one.
        dropped: by reason.
        changed: what was left out of rows that were kept, counted in turns.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.read + other.read,
            self.kept + other.kept,
            self.dropped + other.dropped,
            self.changed + other.changed,
        )

    def to_dict(self) -> dict[str, Any]:
        """As they are written down, the most frequent reason first."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "changed": dict(self.changed.most_common()),
        }


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Write train.parquet, val.parquet (unless nothing is held out) and prepare.json.

    Rows go to a temporary file first: which of them are held out is known when all are. In memory stays what
    de-duplication and the split need, some 150 bytes a row.

    Returns:
        What prepare.json holds.

    Raises:
        UserError: if an input cannot be read, no row is left, or the results cannot be written.
    """
    sources = [find_source(name) for name in settings.inputs]
    settings.check_output(sources)
    try:
        made = not settings.out.exists()
        settings.out.mkdir(parents=True, exist_ok=True)
        try:
            return _prepare(settings, sources)
        finally:
            if made and not any(settings.out.iterdir()):
                settings.out.rmdir()
    except OSError as error:
        raise UserError(f"out={settings.out}: cannot be written ({error})") from None


def _prepare(settings: PrepareSettings, sources: list[DataFile]) -> dict[str, Any]:
    _remove_leftovers(settings.out)
    with _temporary(settings.out / SPOOL) as spool:
        with DedupWriter(spool, seed=settings.seed, max_rows=settings.max_rows, dedup=settings.dedup) as kept:
            found = [_read(source, settings, kept) for source in sources]
        total = sum((counts for _, counts in found), Counts())
        if not total.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in total.dropped.most_common())
            raise UserError(f"no row is left: {total.read} read, dropped: {reasons}")
        held_out = choose_held_out(kept.groups, share=settings.share, num_rows=settings.val_rows)
        report = _report(settings, sources, found, total, int(held_out.sum()))
        _write(settings.out, spool, held_out, report)
    return report


def _read(source: DataFile, settings: PrepareSettings, kept: DedupWriter) -> tuple[str | None, Counts]:
    """The style of an input, None if it was not needed, and what became of its rows."""
    counts = Counts()
    if kept.is_full:
        return None, counts
    names, rows = source.rows(columns_read(settings.column))
    head = list(islice(rows, ROWS_LOOKED_AT))
    style = _recognise(source, settings, names, head)
    kept.set_column(TEXT if style == TEXT else MESSAGES, source.name)
    from tqdm import tqdm

    column = TEXT if source.is_text else settings.column
    records = _records(chain(head, rows), head, style, column, joined=source.is_text)
    for record in tqdm(records, desc=source.name, unit=" rows", disable=None):
        counts.read += 1
        try:
            content, cut = _content(record, style, column, settings)
            kept.add(content)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
            continue
        counts.kept += 1
        counts.changed += Counter({CUT: cut})
        if kept.is_full:
            break
    return style, counts


def _recognise(source: DataFile, settings: PrepareSettings, names: list[str], head: list[Row]) -> str:
    """The style of an input: that of its first row that is in any."""
    if not head:
        raise UserError(f"{source.name}: holds no rows")
    if source.is_text and TEXT in settings.styles:
        return TEXT
    for row in head:
        style = recognise(row, settings.styles, settings.column)
        if style is not None:
            return style
    has = ", ".join(names or dict.fromkeys(name for row in head for name in row)) or "no column"
    needs = [settings.column if style == TEXT else STYLES[style].needs for style in settings.styles]
    where = f"{source.name}: format={settings.format}: its rows hold {has}"
    raise UserError(f"{where}; expected {'; or '.join(needs)}")


def _records(rows: Iterator[Row], head: list[Row], style: str, column: str, *, joined: bool) -> Iterator[Row]:
    """Rows that hold one conversation or document each."""
    if style == "oasst" and any(is_tree_message(row) for row in head):
        return gather_trees(rows)
    texts = (row[column] for row in head if style == TEXT and isinstance(row.get(column), str))
    # Wikitext as a table has a row for every line of the text.
    if not joined and is_title(next((text for text in texts if text.strip()), "")):
        lines = (row[column] if isinstance(row.get(column), str) else "" for row in rows)
        return ({column: text} for text in documents(line if line.endswith("\n") else line + "\n" for line in lines))
    return rows


def _content(record: Row, style: str, column: str, settings: PrepareSettings) -> tuple[Any, int]:
    """What is written of a record, and how many turns were cut from it."""
    cut = 0
    if style == TEXT:
        content = to_text(record, column)
        chars = len(content)
    else:
        content, cut = to_conversation(record, style, keep_system=settings.keep_system)
        chars = sum(len(message["content"]) for message in content)
        if sum(message["role"] == "assistant" for message in content) < settings.min_turns:
            raise Dropped("too few turns")
    if settings.max_chars is not None and chars > settings.max_chars:
        raise Dropped("too long")
    return content, cut


def _report(
    settings: PrepareSettings,
    sources: list[DataFile],
    found: list[tuple[str | None, Counts]],
    total: Counts,
    num_val: int,
) -> dict[str, Any]:
    import pyarrow as pa

    from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, versions

    inputs = []
    for source, (style, counts) in zip(sources, found, strict=True):
        path = Path(source.name)
        file = {"bytes": path.stat().st_size, "fingerprint": file_fingerprint(path)} if path.is_file() else {}
        inputs.append({"name": source.name, "format": style, **file, **counts.to_dict()})
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


def _write(out: Path, spool: Path, held_out: np.ndarray, report: dict[str, Any]) -> None:
    """The results, complete before the first gets its name; train.parquet gets it last."""
    names = (TRAIN, REPORT, VAL)
    val_file = atomic_file(out / VAL) if held_out.any() else nullcontext()
    with atomic_file(out / TRAIN) as train, atomic_file(out / REPORT) as told, val_file as val:
        split(spool, held_out, train, val)
        told.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        # Should the process die among the renames, no file of an earlier run lies beside one of this run.
        for name in names:
            (out / name).unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, gone when the block ends."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    """Clear away what killed runs left; nothing else, since the directory may be anyone's."""
    for name in (TRAIN, VAL, REPORT, SPOOL):
        for path in out.glob(f"{TEMPORARY}*.{name}"):
            path.unlink(missing_ok=True)
