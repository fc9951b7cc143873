"""A parquet file that grows shard by shard beside its place: a kill loses one shard at most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.utils.atomic_io import TEMPORARY, atomic_file, remove_directory
from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"verl_speculator"
SETTINGS_FILE = "settings.json"


def described(schema: pa.Schema, description: Mapping[str, Any]) -> pa.Schema:
    """A schema with a description under KEY, beside what its metadata already holds."""
    return schema.with_metadata({**(schema.metadata or {}), KEY: json.dumps(description)})


class Shards:
    """The shards of `out`, in the folder `<out>.shards`.

    Args:
        out: the file that is to be.
        count: how many shards it has.
    """

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.folder = out.with_name(f"{out.name}.shards")

    def check(self, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Whether there are shards of these settings to go on from. Nothing is changed.

        Raises:
            UserError: if there are shards of other settings, and `overwrite` does not give them up.
        """
        if not self.folder.exists():
            return False
        try:
            found = json.loads((self.folder / SETTINGS_FILE).read_text())
        except FileNotFoundError:
            # A run that was killed before it began leaves at most half a file of settings.
            if self.folder.is_dir() and all(path.name.startswith(TEMPORARY) for path in self.folder.iterdir()):
                return False
            raise UserError(f"{self.folder}: expected shards of {self.out.name}, and this is none of them") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: no shards of {self.out.name} ({error})") from None
        names = sorted({*found, *settings}, key=str)
        differing = [f"{k} ({found.get(k)}, {settings.get(k)})" for k in names if found.get(k) != settings.get(k)]
        if differing and not overwrite:
            raise UserError(
                f"{self.folder}: begun with other settings (its own, this command's): {', '.join(differing)}; expected "
                "the same to go on, or --overwrite to begin anew"
            )
        return not differing

    def begin(self, settings: Mapping[str, Any], *, go_on: bool) -> None:
        """Make the folder, without what lies there unless the run goes on."""
        if self.folder.exists() and not go_on:
            remove_directory(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / SETTINGS_FILE) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n")

    def path(self, index: int) -> Path:
        """Where a shard lies once it is done."""
        return self.folder / f"shard-{index:05d}.parquet"

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [i for i in range(self.count) if not self.path(i).exists()]

    def write(self, index: int, table: pa.Table, account: Mapping[str, Any]) -> None:
        """Keep a finished shard and the account of it."""
        import pyarrow.parquet as pq

        with atomic_file(self.path(index)) as path:
            pq.write_table(table.replace_schema_metadata(described(table.schema, account).metadata), path)

    def accounts(self) -> Iterator[dict[str, Any]]:
        """Of every shard, in order."""
        import pyarrow.parquet as pq

        for i in range(self.count):
            yield json.loads(pq.read_schema(self.path(i)).metadata[KEY])

    def merge(self, schema: pa.Schema, description: Mapping[str, Any]) -> None:
        """Write `out` from all shards and remove them."""
        import pyarrow.parquet as pq

        schema = described(schema, description)
        with atomic_file(self.out) as path, pq.ParquetWriter(path, schema) as writer:
            for i in range(self.count):
                table = pq.ParquetFile(self.path(i)).read()
                if table.num_rows:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
        self.remove()

    def remove(self) -> None:
        """Remove the shards, and what killed runs left half written."""
        remove_directory(self.folder)
        for pattern in (f"{TEMPORARY}*.{self.out.name}", f"{TEMPORARY}*.{self.folder.name}"):
            for path in self.out.parent.glob(pattern):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
