"""A checkpoint of another program: its file of tensors, its config.json, and what every conversion does with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.loading import DTYPES
from verl_speculator.checkpoint.format import CONFIG_FILE, WEIGHTS_FILE
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.utils.atomic_io import read_tensors
from verl_speculator.utils.settings import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", WEIGHTS_FILE)
# A setting's values, or a check and what it accepts. Null is no statement.
Accepted = tuple[Any, ...] | tuple[Callable[[Any], bool], str]


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


COUNT: Accepted = (is_count, "an integer of at least 1")
POSITIVE: Accepted = (is_positive, "a number above 0")
TRUTH: Accepted = (lambda value: isinstance(value, bool), "true or false")


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors, and the `config.json` in its directory.

    Attributes:
        file: of tensors.
        config: the settings of config.json that are not null; empty if there is no such file.
    """

    file: Path
    config: Mapping[str, Any]

    @property
    def config_file(self) -> Path:
        """Where `config` was read."""
        return self.file.parent / CONFIG_FILE

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its key, as `read_tensors`."""
        return read_tensors(self.file)

    def choose_dtype(self, keys: Iterable[str], asked: str | None) -> torch.dtype:
        """The type to write: the one that the options ask for, or that of these tensors. Raises UserError for quantised
        tensors, and for several types or an unknown one without that option."""
        import torch

        types: dict[torch.dtype, str] = {}
        for key in keys:
            types.setdefault(self.tensors[key].dtype, key)
        for dtype, key in types.items():
            if not dtype.is_floating_point:
                raise UserError(f"{self.file}: {key} is {dtype_name(dtype)}; expected heads that are not quantised")
        if asked is not None:
            return getattr(torch, DTYPES[asked])
        first, *others = types
        if others or dtype_name(first) not in DTYPES.values():
            present = ", ".join(f"{key} is {dtype_name(dtype)}" for dtype, key in types.items())
            raise UserError(f"{self.file}: {present}; expected one type of {', '.join(DTYPES)}, or --dtype")
        return first

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in the type to write; the file's may be views of one storage."""
        copy = tensor.to(dtype, copy=True)
        if not copy.isfinite().all():
            raise UserError(
                f"{self.file}: {name} has values that are not finite in {dtype_name(dtype)}; expected finite "
                "ones, or another --dtype"
            )
        return copy

    def check_settings(self, settings: Mapping[str, Accepted], config: Mapping[str, Any] | None = None) -> None:
        """Check the values of settings, each by itself.

        Args:
            settings: those that are known.
            config: part of config.json; all of it by default.

        Raises:
            UserError: naming the setting and the values that it may have.
        """
        config = self.config if config is None else config
        for key in config.keys() & settings.keys():
            value, accepted = config[key], settings[key]
            if callable(accepted[0]):
                is_valid, expected = accepted[0](value), accepted[1]
            else:
                words = list(map(str, accepted))
                is_valid = value in accepted
                expected = f"{'one of ' * (len(words) > 1)}{', '.join(words)}{nearest(str(value), words)}"
            if not is_valid:
                raise UserError(f"{self.config_file}: {key}={value}: expected {expected}")


def find_source(path: Path) -> TensorFile:
    """A directory's file of tensors, or the file itself, and the configuration. Raises UserError if there is none, or
    its config.json is no JSON object."""
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"source={path}: holds none of {', '.join(FILES)}; expected one of them, or a file")
    elif not path.is_file():
        raise UserError(f"source={path}: no such file or directory")
    elif path.suffix not in SUFFIXES:
        raise UserError(f"source={path}: expected a directory, or a file that ends in {', '.join(SUFFIXES)}")
    config_file = file.parent / CONFIG_FILE
    try:
        config = json.loads(config_file.read_text())
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise UserError(f"{config_file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file}: expected a JSON object, got {type(config).__name__}")
    return TensorFile(file, {key: value for key, value in config.items() if value is not None})


@dataclass(frozen=True)
class Contents:
    """What a conversion makes of a file.

    Attributes:
        format: of SOURCE_FORMATS.
        described: the source in a few words, for the command's output.
        config: family and shape of the checkpoint.
        hidden_size: D.
        vocab_size: V.
        dtype: of its tensors.
        state: of the module, by its names, as `write_checkpoint` takes it.
        logit_cap: its soft cap.
        base_name: the base model that the source names.
        record: what else its `config.json` keeps of the source.
    """

    format: str
    described: str
    config: SpeculatorConfig
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    state: Mapping[str, Tensor]
    logit_cap: float | None = None
    base_name: str | None = None
    record: Mapping[str, Any] | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """As in `torch.<name>`."""
    return str(dtype).removeprefix("torch.")


def base_config(base: str) -> Any:
    """A base model's configuration, after `base_shape` has accepted it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base)
