"""The rows that are kept: without duplicates into one temporary file, and from there to training and validation."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.data.formats import TEXT, Dropped, Message, Row
from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MESSAGES = "messages"
GROUP_ROWS, GROUP_CHARS = 1000, 1 << 24


class DedupWriter:
    """The rows that are kept so far, as a context that completes their file.

    Args:
        path: of the file.
        seed: of the order in which groups are held out.
        max_rows: how many rows are wanted, None for all.
        dedup: drop rows that equal an earlier one.

    Attributes:
        column: of the file, set before the first row.
        groups: of each row a number that it shares with the rows that open alike. In memory with them is, for
            de-duplication, a hash of each row.
    """

    def __init__(self, path: Path, *, seed: int, max_rows: int | None, dedup: bool) -> None:
        self._path, self._seed, self._max_rows, self._dedup = path, seed, max_rows, dedup
        self.column: str | None = None
        self.groups = array("Q")
        self._seen: set[bytes] = set()
        self._rows: list[Row] = []
        self._chars = 0
        self._writer: _Writer | None = None

    def __enter__(self) -> DedupWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    @property
    def is_full(self) -> bool:
        """Whether no further row is wanted."""
        return self._max_rows is not None and len(self.groups) >= self._max_rows

    def set_column(self, column: str, name: str) -> None:
        """Name the column of the results: the same for every input."""
        if self.column not in (None, column):
            kinds = {MESSAGES: "conversations", TEXT: "plain text"}
            before = kinds[self.column]
            raise UserError(f"{name}: holds {kinds[column]}, the inputs before it {before}; expected one kind")
        self.column = column

    def add(self, content: list[Message] | str) -> None:
        """Keep a row.

        Raises:
            Dropped: if there has been an equal one.
        """
        if isinstance(content, str):
            parts, opening, chars = [content], content, len(content)
        else:
            parts = [part for message in content for part in (message["role"], message["content"])]
            opening = next(message["content"] for message in content if message["role"] == "user")
            chars = sum(map(len, parts))
        if self._dedup:
            identity = _hash(parts)
            if identity in self._seen:
                raise Dropped("duplicate")
            self._seen.add(identity)
        # Seeded, so that the order of these numbers is the draw of who is held out.
        self.groups.append(int.from_bytes(_hash([opening.casefold()], size=8, seed=self._seed)))
        self._rows.append({self.column: content})
        self._chars += chars
        if len(self._rows) >= GROUP_ROWS or self._chars >= GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow as pa

        schema = _schema(self.column)
        if self._writer is None:
            self._writer = _Writer(self._path, schema)
        self._writer.add(pa.RecordBatch.from_pylist(self._rows, schema=schema))
        self._rows, self._chars = [], 0


def _hash(parts: Iterable[str], *, size: int = 16, seed: int = 0) -> bytes:
    """Of texts up to white space and the way that accents are written."""
    # No part holds the separator: it counts as white space.
    text = "\x1f".join(" ".join(unicodedata.normalize("NFC", part).split()) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=size, key=str(seed).encode()[:64]).digest()


def _schema(column: str) -> pa.Schema:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema([(column, pa.list_(message) if column == MESSAGES else pa.string())])


def choose_held_out(groups: Iterable[int], *, share: float, num_rows: int | None = None) -> np.ndarray:
    """Which rows are held out, as booleans: whole groups in the order of their number, as long as they fit.

    Args:
        groups: of each row the number that rows with the same opening share.
        share: of the rows that is held out, rounded, but at least one row unless it is 0.
        num_rows: how many instead.

    Raises:
        UserError: if no row can be held out, or none would be left.
    """
    import numpy as np

    rows = np.asarray(groups, dtype=np.uint64)
    asked = num_rows
    if asked is None:
        asked = max(1, round(share * len(rows))) if share else 0
    named = f"val_share={share}" if num_rows is None else f"val_rows={num_rows}"
    if asked == 0:
        return np.zeros(len(rows), dtype=bool)
    numbers, sizes = np.unique(rows, return_counts=True)
    if asked >= len(rows) or len(numbers) < 2:
        have = f"rows: {len(rows)}, different beginnings among them: {len(numbers)}"
        raise UserError(f"{named}: so many cannot be held out ({have}); expected fewer, or val_share=0")
    chosen, left = [], asked
    for number, size in zip(numbers, sizes, strict=True):
        if size <= left:
            chosen.append(number)
            left -= size
            if not left:
                break
    if not chosen:
        chosen.append(numbers[sizes.argmin()])
    return np.isin(rows, np.array(chosen, dtype=np.uint64))


def split(spool: Path, held_out: np.ndarray, train: Path, val: Path | None) -> None:
    """Rows that are held out to `val`, the others to `train`, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    with (
        pq.ParquetFile(spool) as parquet,
        _Writer(train, parquet.schema_arrow) as train_writer,
        _Writer(val, parquet.schema_arrow) if val else nullcontext() as val_writer,
    ):
        for batch in parquet.iter_batches(GROUP_ROWS):
            mask = held_out[first : first + len(batch)]
            first += len(batch)
            train_writer.add(batch.filter(pa.array(~mask)))
            if val_writer is not None:
                val_writer.add(batch.filter(pa.array(mask)))


class _Writer:
    """A parquet file that grows by batches, in row groups of a size that is good to read."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._batches: list[pa.RecordBatch] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Write a batch, now or later."""
        if not len(batch):
            return
        self._batches.append(batch)
        rows, size = sum(map(len, self._batches)), sum(batch.nbytes for batch in self._batches)
        if rows >= GROUP_ROWS or size >= GROUP_CHARS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches, schema=self._schema))
        self._batches = []
