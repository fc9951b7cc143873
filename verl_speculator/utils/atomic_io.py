"""Files that are either complete or absent: write to a temporary name, fsync, rename. Files of tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from verl_speculator.utils.settings import UserError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp."


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(setting: str, directory: Path) -> None:
    """Check that files can be written to `directory`, which need not exist yet. Leaves nothing behind.

    Makes a directory of the same name within a temporary one in the nearest parent that exists: permissions alone do
    not show a read-only disk, a name that is too long, or what the superuser may do.

    Raises:
        UserError: beginning with `setting`, if a file is in the way or nothing can be written there.
    """
    directory = directory.absolute()
    try:
        existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if not existing.is_dir():
            kind = "is a link to nothing" if existing.is_symlink() else "is a file"
            raise UserError(f"{setting}: {existing} {kind}, expected a directory")
        with TemporaryDirectory(prefix=TEMPORARY, dir=existing) as temporary:
            Path(temporary, directory.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: {directory} cannot be written to ({error.strerror})") from None


def check_metrics_file(setting: str, project: str, experiment: str) -> None:
    """Check that verl's file logger can open its file: $VERL_FILE_LOGGER_PATH in an existing directory, or
    $VERL_FILE_LOGGER_ROOT/<project>/<experiment>.jsonl, whose directory verl makes; project and experiment are
    `trainer.project_name` and `trainer.experiment_name`.

    Raises:
        UserError: beginning with `setting`, if it cannot.
    """
    if named := os.environ.get("VERL_FILE_LOGGER_PATH"):
        setting, path = f"{setting}: VERL_FILE_LOGGER_PATH={named}", Path(named)
        if not path.absolute().parent.is_dir():
            raise UserError(f"{setting}: {path.absolute().parent} is no directory; make it first")
    else:
        root = Path(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")).expanduser()
        path = root / project / f"{experiment}.jsonl"
    if path.is_dir():
        raise UserError(f"{setting}: {path} is a directory, expected a file")
    check_writable(setting, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{setting}: {path} cannot be written to")


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`; the file replaces `path` if the block raises nothing."""
    temporary = _temporary_path(path)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `path`; it replaces `path` as a whole if the block raises nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    replaced = temporary.with_name(f"{TEMPORARY}{os.getpid()}.old.{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            fsync(entry)
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        fsync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory; an interruption leaves no part of it under its name."""
    temporary = _temporary_path(path)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def remove_temporaries(directory: Path) -> None:
    """Remove what interrupted writers left in `directory`."""
    for entry in directory.glob(f"{TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or one of torch.save without running code: each tensor by each of its names,
    memory-mapped.

    Raises:
        UserError: if the file is missing, truncated, or holds anything but tensors.
    """
    from safetensors import SafetensorError

    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError):
        raise UserError(f"{path}: truncated, or not a file of tensors") from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise ValueError
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ties = {name: first for name, first in (file.metadata() or {}).items() if first in tensors}
    return tensors | {name: tensors[first] for name, first in ties.items()}


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors; tensors that share their memory are written once, under the first of their names.

    The file's metadata maps the other names to the first, as Hugging Face's `save_model` does.
    """
    from safetensors.torch import save_file

    first_names: dict[tuple, str] = {}
    firsts = {n: first_names.setdefault((tensor.data_ptr(), tensor.shape), n) for n, tensor in tensors.items()}
    ties = {name: first for name, first in firsts.items() if first != name}
    untied = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in ties}
    save_file(untied, path, metadata={"format": "pt"} | ties)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner reads; a server may be another user
