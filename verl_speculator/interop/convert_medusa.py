"""Medusa heads of other programs as a checkpoint: checks, names, and what the base model has to give."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.loading import base_shape, load_base
from verl_speculator.checkpoint.format import CAP_KEY, TOKEN_MAP
from verl_speculator.config.families import HEADS, HIDDEN_STATES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop.key_maps import KEY_MAPS, PARTS, SETTINGS, VOCABULARIES, WIDTHS, Layout, lay_out
from verl_speculator.interop.source import Contents, TensorFile, base_config
from verl_speculator.utils.settings import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from verl_speculator.interop.convert import ConvertSettings

COPY, SHARED, FROZEN_SHARED = HEADS
POST_NORM, PRE_NORM = HIDDEN_STATES
EPSILON_SETTING = "rms_norm_eps"
# The token that the first head predicts: the one after the newest, or the one after that.
NEXT_TOKEN, TOKEN_AFTER_NEXT = 1, 2


def read_medusa(settings: ConvertSettings, source: TensorFile) -> Contents:
    """Medusa heads of a file. Raises UserError for tensors that are missing or unexpected, contradict config.json, or
    do not fit the base model."""
    source.check_settings(SETTINGS)
    if TOKEN_MAP in source.tensors:
        raise UserError(f"{source.file}: {TOKEN_MAP}: a truncated vocabulary; expected heads over all of it")
    layout = lay_out(
        source.tensors,
        settings.format,
        where=str(source.file),
        shared=source.config.get("original_lm_head", False) or source.config.get("head", COPY) != COPY,
        biased=source.config.get("medusa_fc_bias", False),
    )
    conversion = _MedusaConversion(settings, source, layout)
    conversion.check_heads()
    width, vocab = conversion.check_shapes()
    dtype = source.choose_dtype([*layout.blocks.values(), *layout.outs], settings.dtype)  # a norm gets the same
    config = conversion.speculator_config()
    base_name = source.config.get("base_model_name_or_path")
    return Contents(
        format=layout.format,
        described=f"heads={layout.heads}, num_layers={layout.layers}",
        config=config,
        hidden_size=width,
        vocab_size=vocab,
        dtype=dtype,
        state={k: source.cast(k, tensor, dtype) for k, tensor in conversion.speculator_tensors(width).items()},
        logit_cap=source.config.get(CAP_KEY),
        base_name=base_name if isinstance(base_name, str) else None,
        record={"heads": layout.heads, "first_offset": settings.first_offset},
    )


@dataclass(frozen=True)
class _MedusaConversion:
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
