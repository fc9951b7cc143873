"""What others call the tensors of Medusa heads: one row a format, and which key of a file is which tensor.

Read from the sources of FasterDecoding/Medusa and of vLLM's Medusa model. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from verl_speculator.checkpoint.format import CONFIG_FILE, WEIGHTS_FILE
from verl_speculator.utils.atomic_io import read_tensors
from verl_speculator.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import torch


AUTO = "auto"
SHOWN = 5
PARTS = ("weight", "bias")
# What a head's module is called where more than the heads was saved.
PREFIXES = ("medusa_heads.", "medusa_head.")
# What a norm in front of the heads is called.
NORMS = ("norm", "final_norm", "model.norm")


@dataclass(frozen=True)
class KeyMap:
    """How one format names residual blocks and output matrices. Ours are vLLM's names.

    Attributes:
        block: of a residual block, from `head`, `layer` and `part`.
        out: of a head's output matrix, from `head` and the number of `layers`.
        shared_out: of the output matrix that all heads share, where the format has a name for it.
        heads_settings: keys of its config.json that say how many heads there are.
        layers_settings: those that say how many blocks a head has.
    """

    block: str
    out: str
    heads_settings: tuple[str, ...]
    layers_settings: tuple[str, ...]
    shared_out: str | None = None

    def block_at(self, key: str) -> tuple[int, int, str] | None:
        """(head, layer, part) of a block's key, None for another."""
        found = _pattern(self.block).fullmatch(key)
        return None if found is None else (int(found["head"]), int(found["layer"]), found["part"])

    def out_at(self, key: str) -> tuple[int, int | None] | None:
        """(head, number of layers before it) of an output matrix's key, None for another."""
        found = _pattern(self.out).fullmatch(key)
        if found is None:
            return None
        return int(found["head"]), int(found["layers"]) if "layers" in found.groupdict() else None


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
            heads_settings=("num_heads", "medusa_num_heads"),
            layers_settings=("num_hidden_layers", "medusa_num_layers"),
            shared_out="lm_head.weight",
        ),
    }
)
SOURCE_FORMATS = (AUTO, *KEY_MAPS)


@dataclass(frozen=True)
class Layout:
    """Which key of a file is which tensor.

    Attributes:
        format: of KEY_MAPS.
        heads: how many there are.
        layers: residual blocks of each.
        blocks: key of each (head, layer, part); no biases, or all.
        outs: key of each output matrix: all heads', one that is shared, or none, where the base's own is meant.
        shared: whether the first of `outs` is that of all heads.
        norm: key of the norm in front of the heads, None where there is none.
        eps: key of its ε.
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
    """Recognise a file's tensors by their keys, all of them.

    Args:
        keys: of the file.
        name: of SOURCE_FORMATS.
        where: the file, for messages.
        shared: whether its configuration says that all heads share one output matrix; the first of several is it.
        biased: whether its configuration says that blocks have a bias.

    Raises:
        UserError: for a format that is not known, or keys that are missing or too many.
    """
    found = _bare(keys, where)
    name = recognise(found, where) if name == AUTO else name
    key_map = KEY_MAPS[name]
    blocks = {place: key for key in found if (place := key_map.block_at(key)) is not None}
    outs = {place: key for key in found if (place := key_map.out_at(key)) is not None}
    if not blocks:
        raise UserError(f"format={name}: {where} has no key like {key_map.block}; it holds {shown(sorted(found))}")
    heads = 1 + max(head for head, *_ in (*blocks, *outs))
    layers = max(*(layer + 1 for _, layer, _ in blocks), *(before or 0 for _, before in outs), 1)

    shared_out = key_map.shared_out if key_map.shared_out in found else None
    expected = {
        key_map.block.format(head=head, layer=layer, part=part): f"head {head}, layer {layer}"
        for head, layer, part in product(range(heads), range(layers), PARTS)
        if part == "weight" or biased or any(place[2] == "bias" for place in blocks)
    }
    # None at all: the heads end in the base's own.
    own = [key_map.out.format(head=head, layers=layers) for head in range(heads)] if outs and not shared_out else []
    expected |= {key: f"output of head {head}" for head, key in enumerate(own[:1] if shared else own)}
    norm = next((name for name in NORMS if f"{name}.weight" in found), None)
    eps = f"{norm}.eps" if f"{norm}.eps" in found else None
    known = {*expected, *own, shared_out, f"{norm}.weight", eps}
    faults = [f"missing {key} ({place})" for key, place in expected.items() if key not in found]
    faults += [f"unexpected {found[key]}" for key in found if key not in known]
    if faults:
        raise UserError(f"{where}: no complete checkpoint of format {name}: {shown(faults, '; ')}")

    return Layout(
        format=name,
        heads=heads,
        layers=layers,
        blocks={p: found[blocks[p]] for p in sorted(blocks, key=lambda p: (*p[:2], PARTS.index(p[2])))},
        outs=tuple(found[key] for key in ([shared_out] if shared_out else own) if key in found),
        shared=bool(shared_out or (shared and outs)),
        norm=norm and found[f"{norm}.weight"],
        eps=eps and found[eps],
    )


def recognise(keys: Iterable[str], where: str) -> str:
    """The format whose blocks these keys name.

    Raises:
        UserError: for none, or more than one.
    """
    keys = list(keys)
    first = {
        name: next((key for key in keys if key_map.block_at(key) is not None), None)
        for name, key_map in KEY_MAPS.items()
    }
    named = {name: key for name, key in first.items() if key is not None}
    if len(named) > 1:
        mixture = ", ".join(f"{key} ({name})" for name, key in named.items())
        raise UserError(f"{where}: a mixture of formats: {mixture}; expected one of them")
    if not named:
        maps = ", ".join(f"{key_map.block} ({name})" for name, key_map in KEY_MAPS.items())
        raise UserError(
            f"{where}: no Medusa heads that are known here: it holds {shown(sorted(keys))}; expected {maps}"
        )
    return next(iter(named))


def shown(words: list[str], between: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return (between.join(words[:SHOWN]) or "nothing") + more


def _bare(keys: Iterable[str], where: str) -> dict[str, str]:
    """The keys without the name of the heads' module, and as the file has them.

    Raises:
        UserError: for two that are one without it.
    """
    found: dict[str, str] = {}
    for key in keys:
        bare = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
        if bare in found:
            raise UserError(f"{where}: holds both {found[bare]} and {key}; expected one of them")
        found[bare] = key
    return found


def _pattern(template: str) -> re.Pattern[str]:
    """What reads a template's fields out of a key. Few digits: a key's number is no reason to look for as many keys."""
    fields = {name: f"(?P<{name}>0|[1-9][0-9]{{0,2}})" for name in ("head", "layer", "layers")}
    return re.compile(template.replace(".", r"\.").format(**fields, part=f"(?P<part>{'|'.join(PARTS)})"))


SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pt", ".bin", ".pth")
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", WEIGHTS_FILE)


@dataclass(frozen=True)
class TensorFile:
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


def find_source(path: Path) -> TensorFile:
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
    return TensorFile(file, config)


def read_source(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file by its key.

    Raises:
        UserError: for a file that is torn, or holds something else.
    """
    return read_tensors(file)
