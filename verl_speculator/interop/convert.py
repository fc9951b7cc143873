"""From someone else's Medusa heads to a checkpoint of ours: read, check, take over, write, and load again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from verl_speculator.base_model.loading import DTYPES, base_shape, load_base
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
from verl_speculator.config.families import HEADS, HIDDEN_STATES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop.key_maps import (
    AUTO,
    KEY_MAPS,
    PARTS,
    SOURCE_FORMATS,
    Layout,
    TensorFile,
    find_source,
    lay_out,
    read_source,
)
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError, nearest
from verl_speculator.utils.options import Option, check_minimums

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


# What a head may predict first: the token after the newest one, or the one after that.
NEXT_TOKEN, TOKEN_AFTER_NEXT = 1, 2
# A checkpoint's own files are replaced if asked; a training run's are not.
OF_A_RUN = (STATE_DIRECTORY, BASE_DIRECTORY, TRACKER_FILE)


@dataclass(frozen=True)
class ConvertSettings:
    """What is read, what is known of it, and where it goes."""

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
        """Refuse an output directory that cannot be written to or holds what would be lost, without making it.

        Args:
            source: the file that is read.

        Raises:
            UserError: naming what is in the way.
        """
        setting = f"out={self.out}"
        check_writable(setting, self.out)
        if self.out.is_dir() and self.out.samefile(source.parent):
            raise UserError(f"{setting}: {source.name} is read there; expected another directory")
        for name in OF_A_RUN:
            if (self.out / name).exists():
                raise UserError(f"{setting}: holds {name} of a training run; expected another directory")
        held = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (self.out / name).exists()]
        if held and not self.overwrite:
            raise UserError(f"{setting}: holds {held[0]} already; expected another directory, or --overwrite")
        if CONFIG_FILE in held:
            try:
                read_checkpoint_info(self.out)
            except UserError:
                # A base has a file of that name too, and the other formats have.
                raise UserError(
                    f"{setting}: holds a {CONFIG_FILE} that is no speculator's of ours; expected another directory"
                ) from None


COPY, SHARED, FROZEN_SHARED = HEADS
EPSILON_SETTING = "rms_norm_eps"


@dataclass(frozen=True)
class Converted:
    """What was read and what was written.

    Attributes:
        source: that was read.
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
    """Write a checkpoint of ours from Medusa heads of another format: all of them, or nothing.

    Raises:
        UserError: for what is missing, too much, contradicts its configuration, or does not fit the base.
    """
    source = find_source(settings.source)
    settings.check_output(source.file)
    shared = bool(source.flag("original_lm_head")) or source.config.get("head") in (SHARED, FROZEN_SHARED)
    biased = bool(source.flag("medusa_fc_bias"))
    tensors = read_source(source.file)
    check_supported(source, tensors)
    layout = lay_out(tensors, settings.format, where=str(source.file), shared=shared, biased=biased)
    check_counts(settings, source, layout)
    state = state_read(settings, source, layout)
    takes_norm = state == PRE_NORM and layout.norm is None
    for reason, needed in (("no output matrix", not layout.outs), (f"no norm, and hidden_state={state}", takes_norm)):
        if needed and settings.base is None:
            raise UserError(f"{source.file}: {reason}: it would be the base's; expected --base")
    width, vocab = check_shapes(settings, source, layout, tensors)
    dtype = choose_type(settings, source, layout, tensors)
    eps = None if layout.norm is None else epsilon(settings, source, layout, tensors)

    if not layout.outs:
        head = FROZEN_SHARED
    elif layout.shared:
        head = FROZEN_SHARED if source.config.get("head") == FROZEN_SHARED else SHARED
    else:
        head = COPY
    dropped = 1 if settings.first_offset == NEXT_TOKEN else 0
    config = SpeculatorConfig(
        method="medusa",
        n_predict=layout.heads - dropped,
        num_layers=layout.layers,
        head=head,
        hidden_state=state,
    )
    found = heads_of(layout, tensors, dropped)
    if layout.norm is not None:
        found |= {"norm.weight": tensors[layout.norm], "norm.eps": eps}
    if takes_norm or not layout.outs:
        found |= parts_of_base(settings, width, norm=takes_norm, out=not layout.outs)
    found = {name: cast(source, name, tensor, dtype) for name, tensor in found.items()}

    # Between the two files there is no checkpoint, not one of new tensors with an old configuration.
    (settings.out / CONFIG_FILE).unlink(missing_ok=True)
    write_checkpoint(
        settings.out,
        config,
        found,
        hidden_size=width,
        vocab_size=vocab,
        base_architectures=() if settings.base is None else base_config(settings.base).architectures or (),
        provenance=provenance(settings, source, layout),
    )
    load_speculator(settings.out)
    return Converted(source, layout, settings.out, config, width, vocab, str(dtype).removeprefix("torch."))


def heads_of(layout: Layout, tensors: Mapping[str, Tensor], dropped: int) -> dict[str, Tensor]:
    """Blocks and output matrices under our names, without the first `dropped` heads.

    Raises:
        UserError: where matrices that are said to be one are not.
    """
    import torch

    found: dict[str, Tensor] = {}
    for head in range(dropped, layout.heads):
        for layer in range(layout.layers):
            weight = tensors[layout.blocks[head, layer, "weight"]]
            for part in PARTS:
                key = layout.blocks.get((head, layer, part))
                tensor = weight.new_zeros(len(weight)) if key is None else tensors[key]
                found[f"blocks.{head - dropped}.layers.{layer}.{part}"] = tensor
    if not layout.shared:
        return found | {f"lm_heads.{k}.weight": tensors[key] for k, key in enumerate(layout.outs[dropped:])}
    one = layout.outs[0]
    for key in layout.outs[1:]:
        if not torch.equal(tensors[key], tensors[one]):
            raise UserError(f"original_lm_head=true: {key} differs from {one}; expected one matrix for all heads")
    return found | {"lm_heads.0.weight": tensors[one]}


def cast(source: TensorFile, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own in the type that is written; the file's may be views of one storage.

    Raises:
        UserError: for values that are no numbers in it.
    """
    found = tensor.to(dtype, copy=True)
    if not found.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{source.file}: {name} has values that are not finite in {kind}; expected finite ones, or another --dtype"
        )
    return found


def epsilon(settings: ConvertSettings, source: TensorFile, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """[1] ε of the norm in the file: beside it, or in its configuration, or in the base's.

    Raises:
        UserError: where nobody says, or it is no small number.
    """
    import torch

    if layout.eps is not None:
        return tensors[layout.eps]
    value = source.config.get(EPSILON_SETTING)
    if value is None and settings.base is not None:
        value = getattr(base_config(settings.base).get_text_config(), EPSILON_SETTING, None)
    if isinstance(value, bool) or not isinstance(value, float) or not 0 < value < 1:
        raise UserError(
            f"{source.file}: {layout.norm}: {EPSILON_SETTING}={value}; expected a number between 0 and 1 in "
            f"{source.config_file}, or --base"
        )
    return torch.tensor([value])


def base_config(base: str) -> Any:
    """A base's configuration, after `base_shape` has let it through."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base)


def parts_of_base(settings: ConvertSettings, width: int, *, norm: bool, out: bool) -> dict[str, Tensor]:
    """The base's final norm and its LM head with its logits' scale, whichever is asked for, under our names.

    Raises:
        UserError: for an LM head with a bias.
    """
    import torch

    from verl_speculator.base_model.hidden_states import FrozenNorm, final_norm
    from verl_speculator.models.layers import copied_head

    base: nn.Module = load_base(settings.base, device="cpu", dtype=base_config(settings.base).dtype or torch.float32)
    found: dict[str, Tensor] = {}
    if out:
        found["lm_heads.0.weight"] = copied_head(base, f"base={settings.base}", "heads with output matrices")
    if norm:
        copy = FrozenNorm(width).requires_grad_(False)
        # In float32, since some norms round the weight that they keep as a difference from 1.
        copy.copy_from(final_norm(base).float())
        found |= {"norm.weight": copy.weight.detach(), "norm.eps": copy.eps.detach()}
    return found


def provenance(settings: ConvertSettings, source: TensorFile, layout: Layout) -> dict[str, Any]:
    """What config.json records: the base as far as it is known, and what was read and how."""
    ours = source.config.get(PROVENANCE_KEY)
    named = source.config.get("base_model_name_or_path")
    if settings.base is not None:
        base = {"name": settings.base, "weights_fingerprint": weights_fingerprint(settings.base)}
    elif isinstance(ours, dict) and isinstance(ours.get("base"), dict):
        base = ours["base"]
    else:
        base = {"name": named} if isinstance(named, str) else {}
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


POST_NORM, PRE_NORM = HIDDEN_STATES
TOKEN_MAP = "token_map"
WIDTH_SETTINGS = ("hidden_size", "input_hidden_dim")
VOCABULARY_SETTING = "vocab_size"


def check_supported(source: TensorFile, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what our heads do not do.

    Raises:
        UserError: for logits over a part of the vocabulary, or with a scale.
    """
    if TOKEN_MAP in tensors:
        raise UserError(f"{source.file}: {TOKEN_MAP}: a truncated vocabulary; expected heads over all of it")
    truncated = source.number("truncated_vocab_size")
    if truncated is not None and truncated != source.number(VOCABULARY_SETTING):
        raise UserError(
            f"{source.config_file}: truncated_vocab_size={truncated}, {VOCABULARY_SETTING}="
            f"{source.number(VOCABULARY_SETTING)}: a truncated vocabulary; expected heads over all of it"
        )
    if source.config.get("logit_scale", 1) != 1:
        raise UserError(f"{source.config_file}: logit_scale={source.config['logit_scale']}: expected 1")


def check_counts(settings: ConvertSettings, source: TensorFile, layout: Layout) -> None:
    """Heads, blocks and biases against the configuration, and heads against `n_predict`, which is believed first.

    Raises:
        UserError: naming both numbers.
    """
    key_map = KEY_MAPS[layout.format]
    if settings.n_predict is not None and settings.n_predict != layout.heads:
        raise UserError(f"n_predict={settings.n_predict}: {source.file} holds {layout.heads} heads")
    for key in key_map.heads_settings if settings.n_predict is None else ():
        if source.number(key) not in (None, layout.heads):
            raise UserError(
                f"{source.file} holds {layout.heads} heads, {source.config_file} says {key}={source.number(key)}; "
                f"if the file is right: --n-predict {layout.heads}"
            )
    for key in key_map.layers_settings:
        if source.number(key) not in (None, layout.layers):
            raise UserError(
                f"{source.file} holds {layout.layers} residual blocks a head, {source.config_file} says "
                f"{key}={source.number(key)}"
            )
    if source.flag("medusa_fc_bias") is False and (0, 0, "bias") in layout.blocks:
        key = layout.blocks[0, 0, "bias"]
        raise UserError(f"{source.file} holds {key}, {source.config_file} says medusa_fc_bias=false")
    if settings.first_offset == NEXT_TOKEN and layout.heads == 1:
        raise UserError(
            f"first_offset={NEXT_TOKEN}: {source.file} holds a single head; it predicts the next token, as the base's "
            "own does, and none would be left"
        )


def state_read(settings: ConvertSettings, source: TensorFile, layout: Layout) -> str:
    """Which of the base's states the heads read: what the options say, then the configuration, then the tensors.

    Raises:
        UserError: for `post_norm` with a norm in the file.
    """
    said = settings.hidden_state or source.choice("hidden_state", HIDDEN_STATES)
    if layout.norm is None:
        return said or POST_NORM
    if said == POST_NORM:
        raise UserError(f"hidden_state={said}: {source.file} holds {layout.norm}; expected hidden_state={PRE_NORM}")
    return PRE_NORM


def check_shapes(
    settings: ConvertSettings, source: TensorFile, layout: Layout, tensors: Mapping[str, Tensor]
) -> tuple[int, int]:
    """(D, V), after the tensors were held against each other, the configuration and the base.

    Raises:
        UserError: naming both sizes.
    """
    first, out = layout.blocks[0, 0, "weight"], layout.outs[0] if layout.outs else None
    width = _size(source, tensors, first, 1)
    vocab = None if out is None else _size(source, tensors, out, 0)
    shapes = {key: [width, width] if part == "weight" else [width] for (*_, part), key in layout.blocks.items()}
    shapes |= {key: [vocab, width] for key in layout.outs} | ({} if layout.norm is None else {layout.norm: [width]})
    shapes |= {} if layout.eps is None else {layout.eps: [1]}
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape:
            raise UserError(
                f"{source.file}: {key} is {list(tensors[key].shape)}, expected {shape}; {first} is "
                f"{list(tensors[first].shape)}" + (f", {out} {list(tensors[out].shape)}" if out else "")
            )
    for key, mine in [*((key, width) for key in WIDTH_SETTINGS), (VOCABULARY_SETTING, vocab)]:
        if mine is not None and source.number(key) not in (None, mine):
            raise UserError(
                f"{source.file} holds heads of {key} {mine}, {source.config_file} says {key}={source.number(key)}"
            )
    if settings.base is None:
        assert vocab is not None, "heads without output matrices need the base"
        return width, vocab
    theirs = base_shape(settings.base)
    for name, mine, other in (("hidden_size", width, theirs[0]), ("vocab_size", vocab, theirs[1])):
        if mine is not None and mine != other:
            raise UserError(f"base={settings.base}: {name} {other}, {source.file} holds heads of {name} {mine}")
    return theirs


def _size(source: TensorFile, tensors: Mapping[str, Tensor], key: str, axis: int) -> int:
    """A matrix's size along an axis."""
    if tensors[key].dim() != 2:
        raise UserError(f"{source.file}: {key} is {list(tensors[key].shape)}, expected a matrix")
    return tensors[key].shape[axis]


def choose_type(
    settings: ConvertSettings, source: TensorFile, layout: Layout, tensors: Mapping[str, Tensor]
) -> torch.dtype:
    """The type that is written: the one that is asked for, or that of the file's heads. A norm follows them.

    Raises:
        UserError: for integers, or for several types where none is asked for.
    """
    import torch

    kinds: dict[torch.dtype, str] = {}
    for key in [*layout.blocks.values(), *layout.outs]:
        kinds.setdefault(tensors[key].dtype, key)
    for kind, key in kinds.items():
        if not kind.is_floating_point:
            raise UserError(f"{source.file}: {key} is {_name(kind)}; expected heads that are not quantised")
    if settings.dtype is not None:
        return getattr(torch, DTYPES[settings.dtype])
    if len(kinds) > 1 or _name(next(iter(kinds))) not in DTYPES.values():
        found = ", ".join(f"{key} is {_name(kind)}" for kind, key in kinds.items())
        raise UserError(f"{source.file}: {found}; expected one type of {', '.join(DTYPES)}, or --dtype")
    return next(iter(kinds))


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
