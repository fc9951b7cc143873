"""What commands that generate load: a base, its tokenizer, and a speculator or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from verl_speculator.base_model.loading import UNQUANTIZED, BaseModelFormat
from verl_speculator.decoding.draft_length import DraftLength, check_length, read_length
from verl_speculator.decoding.tree import DraftTree, check_beside, read_tree

if TYPE_CHECKING:
    from torch import nn

    from verl_speculator.models import Speculator


@dataclass(frozen=True)
class Loaded:
    """A base in evaluation mode with its tokenizer, a speculator or None, and the tokens that end an answer."""

    base: nn.Module
    tokenizer: Any
    speculator: Speculator | None
    ends: tuple[int, ...]


QUANTIZATION_HELP = "bnb4 holds the base in 4 bits"
GGUF_HELP = "read the base from this file in --base"


def read_drafts(
    draft_length: str | None, draft_tree: Path | None, temperature: float = 0.0
) -> tuple[DraftLength, DraftTree | None]:
    """`--draft-length` and `--draft-tree`.

    Raises:
        UserError: for what is neither a number nor `auto`, a file without a tree, both at once, or a tree above
            temperature 0.
    """
    if draft_tree is not None:
        check_beside(draft_length, temperature)
    return read_length(draft_length), read_tree(draft_tree) if draft_tree is not None else None


def check_form(base: str, quantization: str | None, gguf_file: str | None) -> BaseModelFormat:
    """The form in which the base is to be held.

    Raises:
        UserError: for values that make no sense, a package that is not installed, a file that is not there.
    """
    form = BaseModelFormat(quantization, gguf_file)
    form.check()
    form.check_file(base)
    return form


def check_speculator(
    speculator: str,
    base: str,
    draft_length: DraftLength,
    allow_other_base: bool,
    draft_tree: DraftTree | None = None,
    form: BaseModelFormat = UNQUANTIZED,
) -> None:
    """What the checkpoint's configuration and the base's tell without loading either.

    Raises:
        UserError: for a speculator that is not there, or not for this base, or drafts fewer tokens than asked for.
    """
    from verl_speculator.base_model.loading import base_shape
    from verl_speculator.checkpoint.format import read_checkpoint_info

    info = read_checkpoint_info(speculator)
    check_length(draft_length, info.config.n_predict)
    if draft_tree is not None:
        draft_tree.check(info.config, info.vocab_size)
    info.check_base(*base_shape(base, form))
    info.check_base_weights(base, form, allow_other=allow_other_base)
    typer.echo(f"{info.directory}: trained for {info.base_name}", err=True)


def load(base: str, speculator: str | None, *, device: str, dtype: str, form: BaseModelFormat = UNQUANTIZED) -> Loaded:
    """Load what `check_speculator` has let through; an untrained speculator is warned of.

    Raises:
        UserError: for a device or dtype that is none, or a base that cannot be loaded or decoded with.
    """
    from verl_speculator.base_model.loading import BaseModelLoader, check_base
    from verl_speculator.checkpoint.format import load_speculator

    loader = BaseModelLoader(base, device=device, dtype=dtype, form=form)
    check_base(base, form)
    tokenizer = loader.tokenizer
    model = loader.load()
    draft = None
    if speculator is not None:
        draft = load_speculator(speculator, device=loader.device, dtype=loader.dtype).requires_grad_(False).eval()
        if draft.is_untrained():
            typer.echo(f"warning: {speculator}: no training step has changed its tensors", err=True)
    return Loaded(model, tokenizer, draft, loader.end_token_ids)
