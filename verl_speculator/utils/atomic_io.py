"""Writing so that nobody ever finds half a file: temporary name, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    import torch


TEMPORARY = ".tmp."


def fsync(path: Path) -> None:
    """Flush a file or the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(setting: str, directory: Path) -> None:
    """Whether `directory` can be written to, or made where it does not exist yet.

    Makes a directory of the same name within a temporary one in the nearest that exists, and leaves nothing behind:
    permissions alone do not tell of a disk that is read-only, of a name that is too long, or of what a superuser may.

    Args:
        setting: name and value as the user gave them, for the message.
        directory: may not exist.

    Raises:
        UserError: if a file is in the way, or nothing can be made there.
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
    """Whether verl's file logger can open its file: one that is named, in a folder that exists, or one in a folder that
    it makes. A file that is there stays as it is.

    Args:
        setting: name and value as the user gave them, for the message.
        project: verl's `trainer.project_name`.
        experiment: verl's `trainer.experiment_name`.

    Raises:
        UserError: if it cannot.
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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an exception."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends without an exception.

    A directory already at `path` is replaced as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            fsync(entry)
        if path.exists():
            old = path.with_name(f"{TEMPORARY}{os.getpid()}.old.{path.name}")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that no half of it is ever found under its name."""
    doomed = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_temporaries(directory: Path) -> None:
    """Clear away what a killed writer left in `directory`."""
    for entry in directory.glob(f"{TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


TORCH_FILE, SAFETENSORS_FILE = "pytorch_model.bin", "model.safetensors"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file under every one of its names, memory-mapped, without running code.

    Raises:
        UserError: if the file is missing, truncated, or none of tensors.
    """
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError):
        found = None
    named = isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{path}: truncated, or not a file of tensors")
    return dict(found)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ties = {name: kept for name, kept in (file.metadata() or {}).items() if kept in found}
    except SafetensorError:
        raise UserError(f"{path}: truncated, or not a file of tensors") from None
    return found | {name: found[kept] for name, kept in ties.items()}


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors; those that share their memory once, under the first of their names.

    The other names stand in the file's metadata, as Hugging Face's `save_model` has it.
    """
    from safetensors.torch import save_file

    first: dict[tuple, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        kept = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if kept != name:
            ties[name] = kept
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in ties}
    save_file(kept, path, metadata={"format": "pt"} | ties)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors leaves it to its owner alone; a server may be somebody else
