"""Converts Medusa heads of other formats to a checkpoint: read, check, rename, write, and load again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from verl_speculator.base_model.loading import DTYPES, base_shape, load_base
from verl_speculator.checkpoint.format import (
    BASE_DIRECTORY,
    CAP_KEY,
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
from verl_speculator.config.families import HEADS, HIDDEN_STATES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop.key_maps import (
    AUTO,
    KEY_MAPS,
    PARTS,
    SOURCE_FORMATS,
    VOCABULARIES,
    WIDTHS,
    Layout,
    TensorFile,
    find_source,
    lay_out,
)
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.settings import Option, UserError, check_minimums, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COPY, SHARED, FROZEN_SHARED = HEADS
POST_NORM, PRE_NORM = HIDDEN_STATES
EPSILON_SETTING = "rms_norm_eps"
TOKEN_MAP = "token_map"
# The token that the first head predicts: the one after the newest, or the one after that.
NEXT_TOKEN, TOKEN_AFTER_NEXT = 1, 2
# `--overwrite` replaces a checkpoint's own files, and never those of a training run.
RUN_FILES = (STATE_DIRECTORY, BASE_DIRECTORY, TRACKER_FILE)


@dataclass(frozen=True)
class ConvertSettings:
    """The file to convert, what is known about it, and the directory to write."""

    source: Annotated[
        Path, Option("directory of a Medusa checkpoint, or its .safetensors, .pt or .bin", positional=True)
    ]
    out: Annotated[Path, Option("directory of the checkpoint")]
    format: Annotated[str, Option(", ".join(SOURCE_FORMATS))] = AUTO
    base: Annotated[str | None, Option("the base, a directory or a hub name: checks, and what is missing")] = None
    n_predict: Annotated[int | None, Option("heads in the file, where its config.json is wrong", minimum=1)] = None
    first_offset: Annotated[
        int, Option("the first head predicts the token so many positions on: 2, or 1 (it is dropped then)")
    ] = TOKEN_AFTER_NEXT
    hidden_state: Annotated[
        str | None, Option("the base's state that the heads read: post_norm or pre_norm [config.json's]")
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
        layout: of its tensors.
        directory: of the checkpoint.
        config: family and shape of the checkpoint.
        hidden_size: D.
        vocab_size: V.
        dtype: of its tensors.
    """

    source: TensorFile
    layout: Layout
    directory: Path
    config: SpeculatorConfig
    hidden_size: int
    vocab_size: int
    dtype: str

    def summary(self) -> str:
        """Both in one line."""
        return (
            f"{self.source.file}: {self.layout.format}, heads={self.layout.heads}, num_layers={self.layout.layers}, "
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size} → {self.directory}: "
            f"n_predict={self.config.n_predict}, head={self.config.head}, hidden_state={self.config.hidden_state}, "
            f"{self.dtype}"
        )


def convert(settings: ConvertSettings) -> Converted:
    """Write a checkpoint from Medusa heads of another format, with all of them or not at all. Raises UserError for
    tensors that are missing or unexpected, contradict config.json, or do not fit the base model."""
    source = find_source(settings.source)
    settings.check_output(source.file)
    if TOKEN_MAP in source.tensors:
        raise UserError(f"{source.file}: {TOKEN_MAP}: a truncated vocabulary; expected heads over all of it")
    conversion = _Conversion(
        settings,
        source,
        lay_out(
            source.tensors,
            settings.format,
            where=str(source.file),
            shared=source.config.get("original_lm_head", False) or source.config.get("head", COPY) != COPY,
            biased=source.config.get("medusa_fc_bias", False),
        ),
    )
    conversion.check_heads()
    width, vocab = conversion.check_shapes()
    config, dtype = conversion.speculator_config(), conversion.choose_dtype()
    tensors = conversion.speculator_tensors(width)

    # Between the two files there is no checkpoint, not one of new tensors with an old configuration.
    (settings.out / CONFIG_FILE).unlink(missing_ok=True)
    write_checkpoint(
        settings.out,
        config,
        {name: conversion.cast(name, tensor, dtype) for name, tensor in tensors.items()},
        hidden_size=width,
        vocab_size=vocab,
        logit_cap=source.config.get(CAP_KEY),
        base_architectures=() if settings.base is None else base_config(settings.base).architectures or (),
        provenance=conversion.provenance(),
    )
    load_speculator(settings.out)
    return Converted(source, conversion.layout, settings.out, config, width, vocab, _dtype_name(dtype))


def base_config(base: str) -> Any:
    """A base model's configuration, after `base_shape` has accepted it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Conversion:
    """Medusa heads of a file, and the options for their conversion."""

    settings: ConvertSettings
    source: TensorFile
    layout: Layout

    @property
    def _dropped(self) -> int:
        """The number of first heads that predict the next token, as the base model's own does."""
        return 1 if self.settings.first_offset == NEXT_TOKEN else 0

    @property
    def _hidden_state(self) -> str:
        """The base model's state that the heads read: by the options, then config.json, then the tensors."""
        stated = self.settings.hidden_state or self.source.config.get("hidden_state")
        return stated or (POST_NORM if self.layout.norm is None else PRE_NORM)

    @property
    def _needs_base_norm(self) -> bool:
        return self._hidden_state == PRE_NORM and self.layout.norm is None

    def check_heads(self) -> None:
        """Check number and kind of the heads, and that a base model is given if it has to provide tensors."""
        settings, layout, file = self.settings, self.layout, self.source.file
        state = f"hidden_state={self._hidden_state}"
        if settings.n_predict not in (None, layout.heads):
            raise UserError(f"n_predict={settings.n_predict}: {file} holds {layout.heads} heads")
        if layout.heads == self._dropped:
            raise UserError(
                f"first_offset={NEXT_TOKEN}: {file} holds a single head; it predicts the next token, as the base's "
                "own does, and none would be left"
            )
        if self._hidden_state == POST_NORM and layout.norm is not None:
            raise UserError(f"{state}: {file} holds {layout.norm}; expected hidden_state={PRE_NORM}")
        for reason, needed in (("no output matrix", not layout.outs), (f"no norm, and {state}", self._needs_base_norm)):
            if needed and settings.base is None:
                raise UserError(f"{file}: {reason}: it would be the base's; expected --base")

    def check_shapes(self) -> tuple[int, int]:
        """(D, V), after all tensors were compared with each other, with config.json and with the base model."""
        layout, source, base = self.layout, self.source, self.settings.base
        first, out = layout.blocks[0, 0, "weight"], next(iter(layout.outs), None)
        sizes = {key: list(source.tensors[key].shape) for key in (first, out) if key is not None}
        for key, size in sizes.items():
            if len(size) != 2:
                raise UserError(f"{source.file}: {key} is {size}, expected a matrix")
        width, vocab = sizes[first][1], sizes[out][0] if out else None
        shapes = {key: [width, width] if part == "weight" else [width] for (*_, part), key in layout.blocks.items()}
        shapes |= {key: [vocab, width] for key in layout.outs} | {layout.norm: [width], layout.eps: [1]}
        for key, shape in shapes.items():
            if key is not None and list(source.tensors[key].shape) != shape:
                others = ", ".join(f"{other} is {size}" for other, size in sizes.items())
                actual = list(source.tensors[key].shape)
                raise UserError(f"{source.file}: {key} is {actual}, expected {shape}; {others}")
        base_width, base_vocab = (width, vocab) if base is None else base_shape(base)
        for name, size, base_size in (("hidden_size", width, base_width), ("vocab_size", vocab, base_vocab)):
            if size not in (None, base_size):
                raise UserError(f"base={base}: {name} {base_size}, {source.file} holds heads of {name} {size}")
        self._check_stated(width, base_vocab)
        return width, base_vocab

    def _check_stated(self, width: int, vocab: int) -> None:
        """Compare the settings of config.json with the tensors; `n_predict` replaces its numbers of heads."""
        layout, source, key_map = self.layout, self.source, KEY_MAPS[self.layout.format]
        actual: dict[str, Any] = {
            **dict.fromkeys(() if self.settings.n_predict else key_map.heads_settings, layout.heads),
            **dict.fromkeys(key_map.layers_settings, layout.layers),
            **dict.fromkeys(WIDTHS, width),
            **dict.fromkeys(VOCABULARIES, vocab),
            "medusa_fc_bias": (0, 0, "bias") in layout.blocks,
        }
        for key, value in actual.items():
            if (stated := source.config.get(key, value)) != value:
                hint = f"; if the file is right: --n-predict {value}" if key in key_map.heads_settings else ""
                raise UserError(
                    f"{source.file} holds heads of format {layout.format} with {key}={value}, {source.config_file} "
                    f"says {key}={stated}{hint}"
                )

    def choose_dtype(self) -> torch.dtype:
        """The type to write: that of the options, or of the heads. A norm gets the same."""
        import torch

        keys: dict[torch.dtype, str] = {}
        for key in [*self.layout.blocks.values(), *self.layout.outs]:
            keys.setdefault(self.source.tensors[key].dtype, key)
        for dtype, key in keys.items():
            if not dtype.is_floating_point:
                raise UserError(
                    f"{self.source.file}: {key} is {_dtype_name(dtype)}; expected heads that are not quantised"
                )
        if self.settings.dtype is not None:
            return getattr(torch, DTYPES[self.settings.dtype])
        first, *others = keys
        if others or _dtype_name(first) not in DTYPES.values():
            present = ", ".join(f"{key} is {_dtype_name(dtype)}" for dtype, key in keys.items())
            raise UserError(f"{self.source.file}: {present}; expected one type of {', '.join(DTYPES)}, or --dtype")
        return first

    def speculator_config(self) -> SpeculatorConfig:
        """Family and shape of the checkpoint."""
        layout, head = self.layout, COPY
        if not layout.outs:
            head = FROZEN_SHARED
        elif layout.shared:
            head = FROZEN_SHARED if self.source.config.get("head") == FROZEN_SHARED else SHARED
        return SpeculatorConfig(
            method="medusa",
            n_predict=layout.heads - self._dropped,
            num_layers=layout.layers,
            head=head,
            hidden_state=self._hidden_state,
        )

    def speculator_tensors(self, width: int) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by its name there; norm and output matrix are the base's if not in the file.

        Args:
            width: D.
        """
        layout, source = self.layout, self.source
        tensors: dict[str, Tensor] = {}
        for head, layer, part in product(range(self._dropped, layout.heads), range(layout.layers), PARTS):
            key = layout.blocks.get((head, layer, part))
            name = f"blocks.{head - self._dropped}.layers.{layer}.{part}"
            weight = source.tensors[layout.blocks[head, layer, "weight"]]
            tensors[name] = weight.new_zeros(len(weight)) if key is None else source.tensors[key]
        outs = self._shared_out() if layout.shared else layout.outs[self._dropped :]
        tensors |= {f"lm_heads.{k}.weight": source.tensors[key] for k, key in enumerate(outs)}
        if layout.norm is not None:
            tensors |= {"norm.weight": source.tensors[layout.norm], "norm.eps": self._norm_eps()}
        if self._needs_base_norm or not layout.outs:
            tensors |= self._base_tensors(width)
        return tensors

    def _shared_out(self) -> tuple[str, ...]:
        import torch

        first, *others = self.layout.outs
        for key in others:
            if not torch.equal(self.source.tensors[key], self.source.tensors[first]):
                raise UserError(f"original_lm_head=true: {key} differs from {first}; expected one matrix for all heads")
        return (first,)

    def _norm_eps(self) -> Tensor:
        """[1] ε of the norm in the file: in the file itself, in config.json, or in the base model's configuration."""
        import torch

        source, base = self.source, self.settings.base
        if self.layout.eps is not None:
            return source.tensors[self.layout.eps]
        value = source.config.get(EPSILON_SETTING)
        if value is None and base is not None:
            value = getattr(base_config(base).get_text_config(), EPSILON_SETTING, None)
        if not isinstance(value, float) or not 0 < value < 1:
            raise UserError(
                f"{source.file}: {self.layout.norm}: {EPSILON_SETTING}={value}; expected a number between 0 and 1 in "
                f"{source.config_file}, or --base"
            )
        return torch.tensor([value])

    def _base_tensors(self, width: int) -> dict[str, Tensor]:
        """The base model's LM head with the scale of its logits, and its final norm, as far as they are needed."""
        import torch

        from verl_speculator.base_model.hidden_states import FrozenNorm, final_norm
        from verl_speculator.models.layers import copied_head

        name = self.settings.base
        base = load_base(name, device="cpu", dtype=base_config(name).dtype or torch.float32)
        tensors: dict[str, Tensor] = {}
        if not self.layout.outs:
            tensors["lm_heads.0.weight"] = copied_head(base, f"base={name}", "heads with output matrices")
        if self._needs_base_norm:
            norm = FrozenNorm(width).requires_grad_(False)
            # In float32, since some norms round the weight that they keep as a difference from 1.
            norm.copy_from(final_norm(base).float())
            tensors |= {f"norm.{key}": parameter.detach() for key, parameter in norm.named_parameters()}
        return tensors

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in the type to write; the file's may be views of one storage."""
        copy = tensor.to(dtype, copy=True)
        if not copy.isfinite().all():
            raise UserError(
                f"{self.source.file}: {name} has values that are not finite in {_dtype_name(dtype)}; expected finite "
                "ones, or another --dtype"
            )
        return copy

    def provenance(self) -> dict[str, Any]:
        """The record in config.json: the base model as far as it is known, and the source."""
        settings, source, layout = self.settings, self.source, self.layout
        recorded, base_name = source.config.get(PROVENANCE_KEY), source.config.get("base_model_name_or_path")
        if settings.base is not None:
            base = {"name": settings.base, "weights_fingerprint": weights_fingerprint(settings.base)}
        elif isinstance(recorded, dict) and isinstance(recorded.get("base"), dict):
            base = recorded["base"]
        else:
            base = {"name": base_name} if isinstance(base_name, str) else {}
        return {
            "base": base,
            "converted": {
                "source": str(settings.source),
                "file": source.file.name,
                "format": layout.format,
                "heads": layout.heads,
                "first_offset": settings.first_offset,
            },
            "versions": versions(),
            "git_commit": git_commit(),
        }
