"""From someone else's Medusa heads to a checkpoint of ours: read, check, take over, write, and load again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.checkpoint import CONFIG_FILE, PROVENANCE_KEY, load_speculator, write_checkpoint
from verl_speculator.config import SpeculatorConfig
from verl_speculator.convert.checks import (
    PRE_NORM,
    check_counts,
    check_shapes,
    check_supported,
    choose_type,
    state_read,
)
from verl_speculator.convert.keymaps import PARTS, Layout, lay_out
from verl_speculator.convert.settings import NEXT_TOKEN, ConvertSettings
from verl_speculator.convert.source import Source, find_source, read_source
from verl_speculator.decoding.load import load_base
from verl_speculator.errors import UserError
from verl_speculator.families import HEADS
from verl_speculator.provenance import git_commit, versions, weights_fingerprint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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

    source: Source
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


def cast(source: Source, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
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


def epsilon(settings: ConvertSettings, source: Source, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
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

    from verl_speculator.models.hidden_state import FrozenNorm, final_norm
    from verl_speculator.models.initialise import copied_head

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


def provenance(settings: ConvertSettings, source: Source, layout: Layout) -> dict[str, Any]:
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
