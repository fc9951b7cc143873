"""Medusa heads in the formats of other projects: which tensor each key names, and what `config.json` may say.

Read from the sources of FasterDecoding/Medusa and of vLLM's Medusa model. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from verl_speculator.checkpoint.format import CAP_KEY
from verl_speculator.config.families import HEADS, HIDDEN_STATES
from verl_speculator.interop.engine_formats import first_few
from verl_speculator.interop.source import COUNT, POSITIVE, TRUTH, Accepted
from verl_speculator.utils.settings import UserError

AUTO = "auto"
PARTS = ("weight", "bias")
# Names of the heads' module in files that hold more than the heads.
PREFIXES = ("medusa_heads.", "medusa_head.")
# Names of a norm in front of the heads.
NORMS = ("norm", "final_norm", "model.norm")


@dataclass(frozen=True)
class KeyMap:
    """How one format names residual blocks and output matrices. Ours are vLLM's names.

    Attributes:
        block: template of a residual block's key, with `head`, `layer` and `part`.
        out: template of the key of a head's output matrix, with `head` and the number of `layers`.
        heads_settings: keys of its config.json for the number of heads.
        layers_settings: those for the number of blocks of a head.
        shared_out: key of an output matrix that all heads share, if the format has one.
    """

    block: str
    out: str
    heads_settings: tuple[str, ...]
    layers_settings: tuple[str, ...]
    shared_out: str | None = None

    def blocks_of(self, keys: Iterable[str]) -> dict[tuple[int, int, str], str]:
        """The keys of residual blocks, by (head, layer, part)."""
        return _fields(self.block, keys)

    def outs_of(self, keys: Iterable[str]) -> dict[tuple[int, ...], str]:
        """The keys of output matrices, by (head, number of layers), or (head,) if the key does not have the number."""
        return _fields(self.out, keys)


def _fields(template: str, keys: Iterable[str]) -> dict[tuple, str]:
    """The keys that a template matches, by its fields. At most three digits: heads are counted up to the highest."""
    numbers = {name: f"(?P<{name}>0|[1-9][0-9]{{0,2}})" for name in ("head", "layer", "layers")}
    pattern = re.compile(template.replace(".", r"\.").format(**numbers, part=f"(?P<part>{'|'.join(PARTS)})"))
    matches = {key: pattern.fullmatch(key) for key in keys}
    return {
        tuple(int(field) if field.isdigit() else field for field in match.groups()): key
        for key, match in matches.items()
        if match is not None
    }


KEY_MAPS: Mapping[str, KeyMap] = MappingProxyType(
    {
        "fasterdecoding": KeyMap(
            block="{head}.{layer}.linear.{part}",
            out="{head}.{layers}.weight",
            heads_settings=("medusa_num_heads",),
            layers_settings=("medusa_num_layers",),
        ),
        "vllm": KeyMap(
            block="blocks.{head}.layers.{layer}.{part}",
            out="lm_heads.{head}.weight",
            heads_settings=("num_heads", "medusa_num_heads", "n_predict"),
            layers_settings=("num_hidden_layers", "medusa_num_layers", "num_layers"),
            shared_out="lm_head.weight",
        ),
    }
)


@dataclass(frozen=True)
class Layout:
    """Which key of a file is which tensor.

    Attributes:
        format: a key of KEY_MAPS.
        heads: their number.
        layers: the number of residual blocks of each head.
        blocks: the key of each (head, layer, part); either all biases or none.
        outs: the keys of the output matrices: one for each head, a shared one, or none (the base's LM head is meant).
        shared: whether the first of `outs` is that of all heads.
        norm: the key of the norm in front of the heads, None if there is none.
        eps: the key of its ε.
    """

    format: str
    heads: int
    layers: int
    blocks: Mapping[tuple[int, int, str], str]
    outs: tuple[str, ...]
    shared: bool
    norm: str | None
    eps: str | None


def lay_out(keys: Iterable[str], name: str, *, where: str, shared: bool = False, biased: bool = False) -> Layout:
    """Recognise all tensors of a file by their keys.

    Args:
        keys: of the file.
        name: of SOURCE_FORMATS.
        where: the file, for messages.
        shared: whether its configuration says that all heads share one output matrix, the first of several.
        biased: whether its configuration says that blocks have a bias.

    Raises:
        UserError: for an unknown format, missing or unexpected keys.
    """
    key_of = _without_prefixes(keys, where)
    name = recognise(key_of, where) if name == AUTO else name
    key_map = KEY_MAPS[name]
    blocks, outs = key_map.blocks_of(key_of), key_map.outs_of(key_of)
    if not blocks:
        raise UserError(
            f"format={name}: {where} has no key like {key_map.block}; it holds {first_few(sorted(key_of), ', ')}"
        )
    heads = 1 + max(head for head, *_ in (*blocks, *outs))
    layers = max(*(layer + 1 for _, layer, _ in blocks), *(sum(before) for _, *before in outs), 1)

    shared_out = key_map.shared_out if key_map.shared_out in key_of else None
    expected = {
        key_map.block.format(head=head, layer=layer, part=part): f"head {head}, layer {layer}"
        for head, layer, part in product(range(heads), range(layers), PARTS)
        if part == "weight" or biased or any(place[2] == "bias" for place in blocks)
    }
    # Without any output matrix, the heads end in the base's own.
    own = [key_map.out.format(head=head, layers=layers) for head in range(heads)] if outs and not shared_out else []
    expected |= {key: f"output of head {head}" for head, key in enumerate(own[:1] if shared else own)}
    norm = next((name for name in NORMS if f"{name}.weight" in key_of), None)
    eps = f"{norm}.eps" if f"{norm}.eps" in key_of else None
    known = {*expected, *own, shared_out, f"{norm}.weight", eps}
    faults = [f"missing {key} ({place})" for key, place in expected.items() if key not in key_of]
    faults += [f"unexpected {key_of[key]}" for key in key_of if key not in known]
    if faults:
        raise UserError(f"{where}: no complete checkpoint of format {name}: {first_few(faults)}")

    return Layout(
        format=name,
        heads=heads,
        layers=layers,
        blocks={place: key_of[blocks[place]] for place in sorted(blocks, key=lambda p: (*p[:2], PARTS.index(p[2])))},
        outs=tuple(key_of[key] for key in ([shared_out] if shared_out else own) if key in key_of),
        shared=bool(shared_out or (shared and outs)),
        norm=norm and key_of[f"{norm}.weight"],
        eps=eps and key_of[eps],
    )


def recognise(keys: Iterable[str], where: str) -> str:
    """The format whose blocks these keys name. Raises UserError for none, or more than one."""
    keys = list(keys)
    first = {name: next(iter(key_map.blocks_of(keys).values()), None) for name, key_map in KEY_MAPS.items()}
    present = {name: key for name, key in first.items() if key is not None}
    if len(present) == 1:
        return next(iter(present))
    if present:
        mixture = ", ".join(f"{key} ({name})" for name, key in present.items())
        raise UserError(f"{where}: a mixture of formats: {mixture}; expected one of them")
    known = ", ".join(f"{key_map.block} ({name})" for name, key_map in KEY_MAPS.items())
    raise UserError(f"{where}: no known Medusa heads: it holds {first_few(sorted(keys), ', ')}; expected {known}")


def _without_prefixes(keys: Iterable[str], where: str) -> dict[str, str]:
    """The file's keys by their names without that of the heads' module."""
    key_of: dict[str, str] = {}
    for key in keys:
        bare = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
        if bare in key_of:
            raise UserError(f"{where}: holds both {key_of[bare]} and {key}; expected one of them")
        key_of[bare] = key
    return key_of


COUNTS = {key for key_map in KEY_MAPS.values() for key in (*key_map.heads_settings, *key_map.layers_settings)}
WIDTHS = ("hidden_size", "input_hidden_dim")
VOCABULARIES = ("vocab_size", "truncated_vocab_size")
SETTINGS: Mapping[str, Accepted] = MappingProxyType(
    dict.fromkeys((*COUNTS, *WIDTHS, *VOCABULARIES), COUNT)
    | dict.fromkeys(("medusa_fc_bias", "original_lm_head"), TRUTH)
    | {"hidden_state": HIDDEN_STATES, "head": HEADS, "logit_scale": (1,), CAP_KEY: POSITIVE}
)
