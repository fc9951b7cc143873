"""A checkpoint in the format of a serving engine, held against the engine's contract before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.checkpoint.format import CONFIG_FILE, PROVENANCE_KEY, CheckpointInfo, config_content, read_weights
from verl_speculator.interop.engine_formats import FORMATS, PROPOSER_ENGINE, contract_faults, proposer_obstacle
from verl_speculator.utils.atomic_io import atomic_directory, write_safetensors
from verl_speculator.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AUTO = "auto"
CARD = "README.md"
VLLM = "vllm"  # no format, and what a user asks for first
_SINGLE_LAYER = re.compile(r"^(emb|proj|ln)\.(\d+)\.0\.")


def check_export(info: CheckpointInfo, name: str, out: Path, dtype: str, overwrite: bool) -> None:
    """What can be said before a weight is read.

    Raises:
        UserError: for a format that is none, one that cannot hold the speculator (and what to train instead), a type
            that is none, or a directory that is in the way.
    """
    if name == VLLM:
        raise UserError(_about_vllm(info))
    if name not in FORMATS:
        raise UserError(f"--format {name}: expected one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    if dtype not in (AUTO, *DTYPES):
        known = (AUTO, *DTYPES)
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(known)}{nearest(dtype, known)}")
    contract = FORMATS[name]
    unsupported_reason = contract.unsupported_reason(info.config)
    if unsupported_reason is not None:
        raise UserError(f"--format {name}: {contract.engine} cannot load {info.directory}: {unsupported_reason}")
    here = info.directory.resolve()
    if out.resolve() in (here, *here.parents):
        raise UserError(f"--out {out}: the checkpoint itself lies there; expected another directory")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; expected a new directory, or --overwrite")


def _about_vllm(info: CheckpointInfo) -> str:
    unsupported_reason = proposer_obstacle(info.config)
    if unsupported_reason is not None:
        return f"--format {VLLM}: {PROPOSER_ENGINE} cannot load {info.directory}: {unsupported_reason}"
    return (
        f"--format {VLLM}: {PROPOSER_ENGINE} serves {info.directory} as it stands, without an export "
        "(docs/serving-engines.md; `verl-speculator rollout-args` prints its settings); expected one of "
        f"{', '.join(FORMATS)}"
    )


def exported_content(
    info: CheckpointInfo, name: str, dtype: str, base_architectures: Sequence[str] = ()
) -> dict[str, Any]:
    """The `config.json` of an export.

    Args:
        info: the checkpoint.
        name: of the format.
        dtype: of the tensors, as in `torch.<dtype>`.
        base_architectures: those of the base; the checkpoint's own by default.
    """
    if not base_architectures:
        base_architectures = json.loads((info.directory / CONFIG_FILE).read_text()).get("base_model_archs", ())
    content = config_content(
        info.config,
        **info.shape,
        dtype=dtype,
        base_architectures=base_architectures,
    )
    del content[PROVENANCE_KEY]
    return FORMATS[name].content(content) | {PROVENANCE_KEY: info.provenance}


def exported_tensors(info: CheckpointInfo, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of an export; those that are tied share their memory."""
    from verl_speculator.models import build_speculator

    state = {key: tensor.to(dtype) for key, tensor in read_weights(info).items()}
    module = build_speculator(info.config, **info.shape, device="meta")
    made: dict[Any, torch.Tensor] = {}
    tensors = {}
    for key, slot in module.checkpoint_slots().items():
        if slot not in made:
            made[slot] = slot.of(state).contiguous()
        tensors[_SINGLE_LAYER.sub(r"\1.\2.", key) if name == "arctic-mlp" else key] = made[slot]
    return tensors


def export_speculator(
    info: CheckpointInfo,
    name: str,
    out: Path,
    *,
    dtype: str = AUTO,
    card: str | None = None,
    base_architectures: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another format, as a whole or not at all.

    Args:
        info: the checkpoint.
        name: a key of `FORMATS`.
        out: directory; made, or replaced with `overwrite`.
        dtype: of the tensors: auto (as they are), fp32, bf16 or fp16.
        card: what `README.md` says; none by default.
        base_architectures: those of the base; the checkpoint's own by default.
        overwrite: replace what is there.

    Returns:
        The directory.

    Raises:
        UserError: as `check_export`.
        RuntimeError: if what would be written is not what the contract says: a fault of ours.
    """
    import torch

    check_export(info, name, out, dtype, overwrite)
    contract, kind = FORMATS[name], DTYPES.get(dtype, info.dtype)
    content = exported_content(info, name, kind, base_architectures)
    tensors = exported_tensors(info, name, getattr(torch, kind))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    own = {key: value for key, value in content.items() if key != PROVENANCE_KEY}
    faults = contract_faults(name, info.config, info.hidden_size, info.vocab_size, shapes, own)
    if faults:
        raise RuntimeError(f"export to {name} departs from its contract: {'; '.join(faults[:5])}")
    with atomic_directory(out) as directory:
        if contract.weights_file.endswith(".safetensors"):
            write_safetensors(tensors, directory / contract.weights_file)
        else:
            torch.save(tensors, directory / contract.weights_file)
        (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        if card is not None:
            (directory / CARD).write_text(card)
    return out
