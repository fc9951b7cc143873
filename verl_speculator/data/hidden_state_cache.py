"""The base model's hidden states of a training set on disk: written in the first epoch, read in every later one.

    <directory>/manifest.json     what the states depend on: base model, data, tokenizer, settings, versions
    <directory>/lengths.npy       [N] number of states of each row
    <directory>/states.bf16       [Σ lengths, D], of a family that reads the sequence [Σ lengths, 4D]
    <directory>/checksums.u32     [N] CRC-32 of each row's states, 0 where they are not written yet

Only the states that a draft may read are kept (`alignment.states_read`), so that one cache serves speculators of any
draft length and of any family that reads one state. A row counts as written once its checksum matches, so a kill costs
only the rows that were being written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_speculator.base_model.loading import BaseModelFormat
from verl_speculator.checkpoint.provenance import file_digest, weights_fingerprint
from verl_speculator.config.families import FAMILIES
from verl_speculator.utils.atomic_io import atomic_directory, check_writable
from verl_speculator.utils.settings import UserError, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

SETTING = "data.cache_hidden_states"
FORMAT = 2  # in format 1 the RoPE frequencies of the base model were in the compute type
MANIFEST, LENGTHS, STATES, CHECKSUMS = "manifest.json", "lengths.npy", "states.bf16", "checksums.u32"
BYTES = 2  # of a number in bf16
READABLE = ("format", "engine.mixed_precision.param_dtype")
# Settings of `data` that change neither rows nor tokens.
IRRELEVANT = {
    *("train_batch_size", "micro_batch_size_per_gpu", "max_token_len_per_gpu", "use_dynamic_bsz", "num_workers"),
    *("train_files", "val_files", "val_max_samples", "balance_dp_token", "use_shm", "cache_hidden_states"),
}

# Values of newer settings that change nothing, so that older caches can be read.
KEPT_DEFAULTS = [("thinking_targets", True)]


def identify_states(config: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """All that the hidden states of a run depend on, by name: the `identity` of a manifest.

    Takes the resolved configuration, and the tokenizer with the chat template that training uses.

    Raises:
        UserError: if the base model's weights have no fingerprint.
    """
    from omegaconf import OmegaConf

    base, data = config.model.path, OmegaConf.to_container(config.data)
    fingerprint = weights_fingerprint(base, config.model.gguf_file)
    if fingerprint is None:
        raise UserError(f"{SETTING}: {base} has no *.safetensors, so its weights cannot be told from others")
    custom = data["custom_cls"]["path"]
    speculator = config.model.speculator
    # The states of several layers are those of one family.
    layers = {}
    if FAMILIES[speculator.get("method", "sum_rnn")].reads_sequence:
        named = speculator.get("aux_layers")
        layers["model.speculator.aux_layers"] = "default" if named is None else list(named)
    return layers | {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("verl_speculator", "transformers")},
        "the base's weights": BaseModelFormat(config.model.quantization).name_of(fingerprint),
        "engine.mixed_precision.param_dtype": (config.engine.mixed_precision or {}).get("param_dtype", "bf16"),
        "model.speculator.hidden_state": config.model.speculator.get("hidden_state", "post_norm"),
        "model.override_config": {k: v for k, v in config.model.override_config.items() if k != "attn_implementation"},
        "the contents of data.train_files": [file_digest(Path(file)) for file in data["train_files"]],
        "tokenizer or chat template": tokenizer_digest(tokenizer),
        "data": {k: v for k, v in sorted(data.items()) if k not in IRRELEVANT and (k, v) not in KEPT_DEFAULTS},
        "the code of data.custom_cls": file_digest(Path(custom)) if custom else None,
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of vocabulary, rules and chat template, without the settings of padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps([rules, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def check_directory(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the directory holds a cache of these states; False where one can be made.

    Raises:
        UserError: if it holds something else, a torn cache or one of other states, or cannot be written.
    """
    setting, advice = f"{SETTING}={directory}", "; remove it, or name another directory"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{setting}: a file, expected a directory")
    if not directory.exists() or not any(directory.iterdir()):
        check_writable(setting, directory)
        return False
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{setting}: has no {MANIFEST}, so it is no cache; expected an empty directory, or a new one")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        recorded, rows, width = manifest["identity"], int(manifest["rows"]), int(manifest["width"])
        num_states = int(np.load(directory / LENGTHS).sum())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{setting}: torn, {one_line(error)}{advice}") from None
    for name, size in {STATES: num_states * width * BYTES, CHECKSUMS: 4 * rows}.items():
        file = directory / name
        if (actual := file.stat().st_size if file.is_file() else 0) != size:
            raise UserError(f"{setting}: torn, {name} has {actual} bytes, expected {size}{advice}")
    if differing := list(_differences(recorded, dict(identity))):
        raise UserError(f"{setting}: holds other states (its own, this run's): {', '.join(differing)}{advice}")
    return True


def _differences(recorded: Any, current: Any, name: str = "") -> Iterator[str]:
    """What differs, by name, with both values where they are readable."""
    if isinstance(recorded, dict) and isinstance(current, dict):
        for key in dict.fromkeys([*recorded, *current]):
            yield from _differences(recorded.get(key), current.get(key), f"{name}.{key}" if name else key)
    elif recorded != current:
        readable = name in READABLE or name.startswith(("data.", "model.override_config.", "versions."))
        yield f"{name} ({recorded}, {current})" if readable else name


def check_space(directory: Path, needed: int, *, estimated: bool = False) -> None:
    """Raise a `UserError` if the disk has less than `needed` bytes left."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        size = f"{'about ' if estimated else ''}{say_size(needed)}"
        raise UserError(f"{SETTING}={directory}: needs {size}, the disk has {say_size(free)} left")


def say_size(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class StateCache:
    """Hidden states of a training set by row, in a directory that `create` made.

    The processes of a run share the files: each writes the rows that it trains on.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        manifest = json.loads((directory / MANIFEST).read_text())
        self.rows, self.width = manifest["rows"], manifest["width"]
        self.lengths = np.load(directory / LENGTHS)
        self._ends = self.lengths.cumsum()
        mode = "r+" if os.access(directory / STATES, os.W_OK) else "r"
        self._checksums = np.memmap(directory / CHECKSUMS, np.uint32, mode)
        # A file without a byte cannot be mapped.
        states = np.memmap(directory / STATES, np.uint16, mode) if self.size else np.empty(0, np.uint16)
        self._states = states.reshape(-1, self.width)
        self._verified = np.zeros(self.rows, bool)

    @classmethod
    def create(
        cls, directory: Path, identity: Mapping[str, Any], lengths: Sequence[int] | np.ndarray, width: int
    ) -> StateCache:
        """Make a cache in which no row is written, and reserve the disk space for all rows.

        Args:
            directory: does not exist yet, or is empty.
            identity: of `identify_states`.
            lengths: [N] number of states of each row.
            width: D.

        Raises:
            UserError: if the disk has too little space, or cannot be written to.
        """
        lengths = np.asarray(lengths, np.int64)
        size = int(lengths.sum()) * width * BYTES
        check_space(directory, size)
        try:
            with atomic_directory(directory) as folder:
                np.save(folder / LENGTHS, lengths)
                for name, count in ((STATES, size), (CHECKSUMS, 4 * len(lengths))):
                    with (folder / name).open("wb") as file:
                        if count:
                            os.posix_fallocate(file.fileno(), 0, count)
                manifest = {"identity": dict(identity), "rows": len(lengths), "width": width}
                (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{SETTING}={directory}: {say_size(size)} cannot be written: {reason}") from None
        return cls(directory)

    @property
    def written(self) -> int:
        """The number of rows with a checksum, whether or not it matches."""
        return int(np.count_nonzero(self._checksums))

    @property
    def size(self) -> int:
        """Bytes of all states."""
        return int(self._ends[-1]) * self.width * BYTES

    def _part(self, row: int) -> np.ndarray:
        end = self._ends[row]
        return self._states[end - self.lengths[row] : end]

    def has(self, rows: Sequence[int]) -> bool:
        """Whether all these rows are written and match their checksums."""
        for row in rows:
            self._verified[row] = self._verified[row] or self._checksums[row] == _checksum(self._part(row))
        return bool(self._verified[list(rows)].all())

    def read(self, rows: Iterable[int]) -> Tensor:
        """[S, D] bf16, the states of these rows, concatenated."""
        import torch

        return torch.from_numpy(np.concatenate([self._part(row) for row in rows])).view(torch.bfloat16)

    def write(self, row: int, states: Tensor) -> None:
        """Save [lengths[row], D] states in bf16, unless they are written, or the files are read-only."""
        import torch

        if not self._checksums.flags.writeable or self.has([row]):
            return
        part = self._part(row)
        if states.shape != part.shape:
            raise ValueError(f"row {row}: states of shape {tuple(states.shape)}, expected {part.shape}")
        part[:] = states.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
        self._checksums[row] = _checksum(part)
        self._verified[row] = True


def _checksum(part: np.ndarray) -> int:
    """CRC-32, never 0, which stands for a row that is not written."""
    return zlib.crc32(part) or 1
