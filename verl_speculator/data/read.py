"""Files and hub names, as rows."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

from verl_speculator.data.formats import TEXT, Row, documents
from verl_speculator.errors import UserError, nearest

JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")  # the last two are wikitext's own
SUFFIXES = (".parquet", *JSON_SUFFIXES, *TEXT_SUFFIXES)
COMPRESSED = ".gz"
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<first>[\w.-]*))?(:(?P<second>[\w.-]+))?")
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Source:
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


def find_source(name: str) -> Source:
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
        return Source(name, kind)
    if kind in SUFFIXES or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such file")
    return Source(name, "")


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
