"""A file of tensors: torch's, or safetensors' in which a tied tensor stands once and its other names beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.errors import UserError

if TYPE_CHECKING:
    import torch

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
