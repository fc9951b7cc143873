"""Where a checkpoint comes from: versions, commit, and a fingerprint of the base model's weights."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = ("verl_speculator", "verl", "torch", "transformers")
SAMPLE_BYTES = 4096


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a training run does."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout this package runs from, `-dirty` behind it if edited; None outside a checkout."""
    options = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "check": True, "timeout": 10}
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **options)
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.decode().strip()


def hardware(device: str = "cpu") -> str:
    """What a measurement ran on: the accelerator, if it is one, the processor's name, and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device == "cpu":
        return f"{processor}, {cores} cores"
    import torch

    return f"{torch.get_device_module(device).get_device_name()}, {processor}, {cores} cores"


def file_fingerprint(path: Path) -> str:
    """A hash of a file's size and of 64 samples spread over it: any training step moves it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_fingerprint(path: Path) -> str:
    """A hash of what a data file holds, whatever its name: its size, 64 samples, and a parquet file's whole footer.

    The footer gives rows, sizes and statistics of every column chunk, so that a file written anew differs in practice.
    """
    digest = hashlib.sha256(file_fingerprint(path).encode())
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        length = file.read(8)
        if length[4:] == b"PAR1":
            file.seek(max(0, size - 8 - int.from_bytes(length[:4], "little")))
            digest.update(file.read())
    return digest.hexdigest()[:32]


def weights_directory(model: str) -> Path | None:
    """The directory that holds a model's files: itself, or the hub's local snapshot; None if there is neither."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def weights_fingerprint(model: str, gguf_file: str | None = None) -> str | None:
    """A hash of a Hugging Face model's weights, which a change of any tensor changes in practice.

    Reads each tensor's name, type, shape and 4 KiB from its middle, so that a 70B model takes no longer than a small
    one. None where the weights are not on this machine as safetensors.

    Args:
        model: a directory, or a hub name.
        gguf_file: the model's GGUF file, whose `file_fingerprint` is returned instead.
    """
    directory = weights_directory(model)
    if gguf_file is not None:
        is_file = directory is not None and (directory / gguf_file).is_file()
        return file_fingerprint(directory / gguf_file) if is_file else None
    entries = {}
    for path in sorted(directory.glob("*.safetensors")) if directory else []:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                middle = max(begin, (begin + end - SAMPLE_BYTES) // 2)
                file.seek(8 + header_size + middle)
                sample = file.read(min(SAMPLE_BYTES, end - middle))
                entries[name] = [entry["dtype"], entry["shape"], hashlib.sha256(sample).hexdigest()]
    if not entries:
        return None
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:32]
