"""What a file holds against what its config.json, the options and the base say: every difference names both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from verl_speculator.bases import base_shape
from verl_speculator.convert.keymaps import KEY_MAPS, Layout
from verl_speculator.convert.settings import NEXT_TOKEN, ConvertSettings
from verl_speculator.convert.source import Source
from verl_speculator.decoding.load import DTYPES
from verl_speculator.errors import UserError
from verl_speculator.families import HIDDEN_STATES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POST_NORM, PRE_NORM = HIDDEN_STATES
TOKEN_MAP = "token_map"
WIDTH_SETTINGS = ("hidden_size", "input_hidden_dim")
VOCABULARY_SETTING = "vocab_size"


def check_supported(source: Source, tensors: Mapping[str, Tensor]) -> None:
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


def check_counts(settings: ConvertSettings, source: Source, layout: Layout) -> None:
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


def state_read(settings: ConvertSettings, source: Source, layout: Layout) -> str:
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
    settings: ConvertSettings, source: Source, layout: Layout, tensors: Mapping[str, Tensor]
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


def _size(source: Source, tensors: Mapping[str, Tensor], key: str, axis: int) -> int:
    """A matrix's size along an axis."""
    if tensors[key].dim() != 2:
        raise UserError(f"{source.file}: {key} is {list(tensors[key].shape)}, expected a matrix")
    return tensors[key].shape[axis]


def choose_type(
    settings: ConvertSettings, source: Source, layout: Layout, tensors: Mapping[str, Tensor]
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
