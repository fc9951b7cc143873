"""Converts speculators of other formats to a checkpoint: read, check, rename, write, and load again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from verl_speculator.base_model.loading import DTYPES
from verl_speculator.checkpoint.format import (
    BASE_DIRECTORY,
    CONFIG_FILE,
    PROVENANCE_KEY,
    STATE_DIRECTORY,
    TRACKER_FILE,
    WEIGHTS_FILE,
    load_speculator,
    read_checkpoint_info,
    write_checkpoint,
)
from verl_speculator.checkpoint.provenance import git_commit, versions, weights_fingerprint
from verl_speculator.config.families import HIDDEN_STATES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop.convert_eagle3 import FORMATS as EAGLE3_FORMATS
from verl_speculator.interop.convert_eagle3 import eagle3_format, read_eagle3
from verl_speculator.interop.convert_medusa import NEXT_TOKEN, TOKEN_AFTER_NEXT, read_medusa
from verl_speculator.interop.key_maps import AUTO, KEY_MAPS
from verl_speculator.interop.source import Contents, TensorFile, base_config, dtype_name, find_source
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.settings import Option, UserError, check_minimums, nearest

SOURCE_FORMATS = (AUTO, *KEY_MAPS, *EAGLE3_FORMATS)
# `--overwrite` replaces a checkpoint's own files, and never those of a training run.
RUN_FILES = (STATE_DIRECTORY, BASE_DIRECTORY, TRACKER_FILE)


@dataclass(frozen=True)
class ConvertSettings:
    """The file to convert, what is known about it, and the directory to write."""

    source: Annotated[
        Path, Option("directory of a Medusa or EAGLE-3 checkpoint, or its .safetensors, .pt or .bin", positional=True)
    ]
    out: Annotated[Path, Option("directory of the checkpoint")]
    format: Annotated[str, Option(", ".join(SOURCE_FORMATS))] = AUTO
    base: Annotated[str | None, Option("the base, a directory or a hub name: checks, and what is missing")] = None
    n_predict: Annotated[
        int | None,
        Option("Medusa: heads in the file, where its config.json is wrong; EAGLE-3: draft tokens", minimum=1),
    ] = None
    first_offset: Annotated[
        int, Option("Medusa: the first head predicts the token so many positions on: 2, or 1 (it is dropped then)")
    ] = TOKEN_AFTER_NEXT
    hidden_state: Annotated[
        str | None, Option("Medusa: the base's state that the heads read: post_norm or pre_norm [config.json's]")
    ] = None
    dtype: Annotated[str | None, Option("fp32, bf16, fp16, fp64 [the file's]")] = None
    overwrite: Annotated[bool, Option("replace a checkpoint that is there", flag="--overwrite")] = False

    def __post_init__(self) -> None:
        for name, known in (("format", SOURCE_FORMATS), ("hidden_state", HIDDEN_STATES), ("dtype", tuple(DTYPES))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name}={value}: expected one of {', '.join(known)}{nearest(value, known)}")
        if self.first_offset not in (NEXT_TOKEN, TOKEN_AFTER_NEXT):
            raise UserError(
                f"first_offset={self.first_offset}: expected {TOKEN_AFTER_NEXT} (the first head predicts the token "
                f"after the next), or {NEXT_TOKEN} (the next)"
            )
        check_minimums(self)

    def check_output(self, source: Path) -> None:
        """Reject an output directory that cannot be written to, or whose files would be lost. Does not make it."""
        setting = f"out={self.out}"
        check_writable(setting, self.out)
        if self.out.is_dir() and self.out.samefile(source.parent):
            raise UserError(f"{setting}: {source.name} is read there; expected another directory")
        for name in RUN_FILES:
            if (self.out / name).exists():
                raise UserError(f"{setting}: holds {name} of a training run; expected another directory")
        held = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (self.out / name).exists()]
        if held and not self.overwrite:
            raise UserError(f"{setting}: holds {held[0]} already; expected another directory, or --overwrite")
        if CONFIG_FILE in held:
            try:
                read_checkpoint_info(self.out)
            except UserError:
                # Base models and the other formats have a file of that name too.
                raise UserError(
                    f"{setting}: holds a {CONFIG_FILE} that is no speculator's of ours; expected another directory"
                ) from None


@dataclass(frozen=True)
class Converted:
    """The source and the checkpoint.

    Attributes:
        source: the file that was read.
        contents: what was found in it.
        directory: of the checkpoint.
    """

    source: TensorFile
    contents: Contents
    directory: Path

    @property
    def config(self) -> SpeculatorConfig:
        """Family and shape of the checkpoint."""
        return self.contents.config

    def summary(self) -> str:
        """Both in one line."""
        contents, config = self.contents, self.contents.config
        settings = {"medusa": ("n_predict", "head", "hidden_state"), "eagle3": ("n_predict", "embedding", "head")}
        shown = ", ".join(f"{name}={getattr(config, name)}" for name in settings[config.method])
        return (
            f"{self.source.file}: {contents.format}, {contents.described}, hidden_size={contents.hidden_size}, "
            f"vocab_size={contents.vocab_size} → {self.directory}: {shown}, {dtype_name(contents.dtype)}"
        )


def convert(settings: ConvertSettings) -> Converted:
    """Write a checkpoint from a speculator of another format, completely or not at all. Raises UserError for tensors
    that are missing or unexpected, contradict config.json, or do not fit the base model."""
    source = find_source(settings.source)
    settings.check_output(source.file)
    if eagle3_format(settings.format, source) is not None:
        contents = read_eagle3(settings, source)
    else:
        contents = read_medusa(settings, source)

    # Between the two files there is no checkpoint, not one of new tensors with an old configuration.
    (settings.out / CONFIG_FILE).unlink(missing_ok=True)
    write_checkpoint(
        settings.out,
        contents.config,
        contents.state,
        hidden_size=contents.hidden_size,
        vocab_size=contents.vocab_size,
        logit_cap=contents.logit_cap,
        base_architectures=() if settings.base is None else base_config(settings.base).architectures or (),
        provenance=_provenance(settings, source, contents),
    )
    load_speculator(settings.out)
    return Converted(source, contents, settings.out)


def _provenance(settings: ConvertSettings, source: TensorFile, contents: Contents) -> dict[str, Any]:
    """The record in config.json: the base model as far as it is known, and the source."""
    recorded = source.config.get(PROVENANCE_KEY)
    if settings.base is not None:
        base = {"name": settings.base, "weights_fingerprint": weights_fingerprint(settings.base)}
    elif isinstance(recorded, dict) and isinstance(recorded.get("base"), dict):
        base = recorded["base"]
    else:
        base = {} if contents.base_name is None else {"name": contents.base_name}
    return {
        "base": base,
        "converted": {
            "source": str(settings.source),
            "file": source.file.name,
            "format": contents.format,
            **(contents.record or {}),
        },
        "versions": versions(),
        "git_commit": git_commit(),
    }
