"""A checkpoint from elsewhere on disk: its file of tensors, and what its config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from verl_speculator.errors import UserError, nearest
from verl_speculator.tensors import read_tensors

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pt", ".bin", ".pth")
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", WEIGHTS_FILE)


@dataclass(frozen=True)
class Source:
    """A file of tensors, and the config.json beside it.

    Attributes:
        file: of tensors.
        config: what config.json holds; empty where there is none.
    """

    file: Path
    config: Mapping[str, Any]

    @property
    def config_file(self) -> Path:
        """Where `config` was read."""
        return self.file.parent / CONFIG_FILE

    def number(self, key: str) -> int | None:
        """A count of config.json, None where it does not say.

        Raises:
            UserError: for anything else than a number of at least 1.
        """
        value = self.config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{self.config_file}: {key}={value}: expected an integer of at least 1")
        return value

    def flag(self, key: str) -> bool | None:
        """A switch of config.json, None where it does not say.

        Raises:
            UserError: for anything else than true or false.
        """
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.config_file}: {key}={value}: expected true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...]) -> str | None:
        """A word of config.json, None where it does not say.

        Raises:
            UserError: for a word that is not known.
        """
        value = self.config.get(key)
        if value is not None and value not in known:
            raise UserError(
                f"{self.config_file}: {key}={value}: expected one of {', '.join(known)}{nearest(str(value), known)}"
            )
        return value


def find_source(path: Path) -> Source:
    """A directory's file of tensors, or the file itself, and the configuration.

    Raises:
        UserError: if there is none, or its config.json is no JSON object.
    """
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"source={path}: holds none of {', '.join(FILES)}; expected one of them, or a file")
    elif not path.is_file():
        raise UserError(f"source={path}: no such file or directory")
    elif path.suffix not in SUFFIXES:
        raise UserError(f"source={path}: expected a directory, or a file that ends in {', '.join(SUFFIXES)}")
    else:
        file = path
    beside = file.parent / CONFIG_FILE
    try:
        config = json.loads(beside.read_text())
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise UserError(f"{beside}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{beside}: expected a JSON object, got {type(config).__name__}")
    return Source(file, config)


def read_source(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file by its key.

    Raises:
        UserError: for a file that is torn, or holds something else.
    """
    return read_tensors(file)
