"""Exports in the format of a serving engine, checked against the engine's requirements, with a model card; upload."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.loading import DTYPES, load_base
from verl_speculator.checkpoint.format import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    PROVENANCE_KEY,
    TARGET_TO_DRAFT,
    CheckpointInfo,
    load_speculator,
    read_weights,
    vocabulary_mask,
    vocabulary_tensors,
)
from verl_speculator.config.families import BASE_FROZEN, FAMILIES, OWN
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop.engine_formats import (
    FORMATS,
    KEY,
    PROPOSER,
    PROPOSER_ENGINE,
    contract_faults,
    first_few,
    proposer_unsupported_reason,
)
from verl_speculator.utils.atomic_io import atomic_directory, write_safetensors
from verl_speculator.utils.settings import UserError, nearest, one_line

if TYPE_CHECKING:
    import torch

AUTO = "auto"
EXPORT_DTYPES = (AUTO, "fp32", "bf16", "fp16")
CARD = "README.md"
# Columns of an evaluation's results.csv that the model card shows: heading, and format of a number.
COLUMNS = {
    "prompts": ("prompts", None),
    "speculator": ("", None),
    "temperature": ("temperature", "g"),
    "draft_length": ("drafts", ".0f"),
    "tau": ("τ", ".2f"),
    "accept_rate": ("accepted", ".1%"),
    "speedup": ("speedup", ".2f"),
}
BASELINES = ("none", "prompt_lookup", "random", "generate")


def check_export(
    info: CheckpointInfo, name: str, out: Path, dtype: str, overwrite: bool, base: str | None = None
) -> None:
    """Check the arguments of `export_speculator`. Reads no weights. Raises UserError for an unknown format, one that
    cannot hold the speculator (with what to train instead), an unknown dtype, no base model to take tables from, or an
    output directory that exists."""
    for option, value, known in (("format", name, FORMATS), ("dtype", dtype, EXPORT_DTYPES)):
        if value not in known:
            raise UserError(f"--{option} {value}: expected one of {', '.join(known)}{nearest(value, known)}")
    config = _own_config(info.config, name)
    if (reason := FORMATS[name].unsupported_reason(config)) is not None:
        raise UserError(f"--format {name}: {FORMATS[name].engine} cannot load {info.directory}: {reason}")
    if (
        written := [table for table in info.config.frozen_tables if table not in config.frozen_tables]
    ) and base is None:
        named = ", ".join(f"{table}=base_frozen" for table in written)
        raise UserError(
            f"--format {name}: {info.directory} has {named}, and an export writes the base model's weights out; "
            f"expected --base, the directory or hub name of {info.base_name}"
        )
    checkpoint = info.directory.resolve()
    if out.resolve() in (checkpoint, *checkpoint.parents):
        raise UserError(f"--out {out}: the checkpoint itself lies there; expected another directory")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; expected a new directory, or --overwrite")


def _own_config(config: SpeculatorConfig, name: str) -> SpeculatorConfig:
    """The configuration of the same speculator with tables of its own, but for an embedding that the engine takes from
    the base model by itself."""
    if not config.base_tables:
        return config
    is_shared = FORMATS[name].shares_embedding and config.embedding == BASE_FROZEN
    return replace(config, embedding=BASE_FROZEN if is_shared else OWN, head=OWN)


def own_state(info: CheckpointInfo, own: SpeculatorConfig, base: str | None) -> dict[str, torch.Tensor]:
    """The state of the same speculator with tables of its own: the base model's tables are written out, and a
    projection is multiplied into its table, since both are linear.

    Args:
        info: the checkpoint.
        own: of `_own_config`.
        base: where to take the tables of base_frozen from.

    Raises:
        UserError: if its weights are not those that the speculator was trained for.
    """
    if not info.config.base_tables:
        return read_weights(info)
    import torch

    from verl_speculator.models.layers import Table

    needs_base = info.config.frozen_tables != own.frozen_tables
    speculator = load_speculator(info.directory, base=base if needs_base else None)
    if needs_base:
        speculator.attach(load_base(base, device="cpu", dtype=torch.float32))
    state = speculator.state_dict()
    for name, table in speculator.named_modules():
        if isinstance(table, Table) and not (table.embeds and own.embedding == BASE_FROZEN):
            weight, projection = table.weight.detach(), state.pop(f"{name}.projection.weight", None)
            if projection is not None:
                weight = weight @ (projection.T if table.embeds else projection)
            state[f"{name}.weight"] = weight
    return state


def exported_tensors(
    info: CheckpointInfo, state: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of an export in `dtype`, by its name in the format; tied tensors share their memory.

    Args:
        info: describes the speculator.
        state: of the module.
        name: a key of `FORMATS`.
        dtype: of the tensors.
    """
    from verl_speculator.models import build_speculator

    state = dict(state)
    tokens = state.pop(DRAFT_TOKENS, None)
    vocabulary = vocabulary_tensors(info.config, tokens)
    if tokens is not None and FORMATS[name].vocabulary_mask:
        vocabulary[TARGET_TO_DRAFT] = vocabulary_mask(tokens, info.vocab_size)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    slots = build_speculator(info.config, **info.shape, device="meta").checkpoint_slots()
    tensor_of_slot = {slot: slot.of(state).contiguous() for slot in slots.values()}
    return {FORMATS[name].tensor_name(key): tensor_of_slot[slot] for key, slot in slots.items()} | vocabulary


def export_speculator(
    info: CheckpointInfo,
    name: str,
    out: Path,
    *,
    dtype: str = AUTO,
    card: str | None = None,
    base_architectures: Sequence[str] = (),
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another format, completely or not at all.

    Args:
        info: the checkpoint.
        name: a key of `FORMATS`.
        out: directory; made, or replaced with `overwrite`.
        dtype: of the tensors: auto (the checkpoint's), fp32, bf16 or fp16.
        card: content of `README.md`; no such file by default.
        base_architectures: those of the base model; the checkpoint's record by default.
        base: the base model, whose tables are written out where the speculator uses them.
        overwrite: replace an existing directory.

    Returns:
        The directory.

    Raises:
        UserError: as `check_export`.
        RuntimeError: if the result does not meet the format's requirements: a bug of this package.
    """
    import torch

    check_export(info, name, out, dtype, overwrite, base)
    form = FORMATS[name]
    exported = replace(
        info,
        config=_own_config(info.config, name),
        dtype=DTYPES.get(dtype, info.dtype),
        base_architectures=base_architectures or info.base_architectures,
    )
    content = exported.content()
    del content[PROVENANCE_KEY]
    content = form.content(content)
    tensors = exported_tensors(exported, own_state(info, exported.config, base), name, getattr(torch, exported.dtype))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if faults := contract_faults(name, exported.config, info.hidden_size, info.vocab_size, shapes, content):
        raise RuntimeError(f"export to {name} departs from its contract: {first_few(faults)}")
    with atomic_directory(out) as directory:
        write_tensors = write_safetensors if form.weights_file.endswith(".safetensors") else torch.save
        write_tensors(tensors, directory / form.weights_file)
        content |= {PROVENANCE_KEY: info.provenance}
        (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        if card is not None:
            (directory / CARD).write_text(card)
    return out


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of an evaluation's `results.csv`, or of the one in a directory. Raises UserError if there is no such file,
    or it has other columns."""
    file = path / "results.csv" if path.is_dir() else path
    expected = "expected the results.csv of verl-speculator evaluate"
    try:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--results {path}: no such file; {expected}") from None
    if missing := [name for name in COLUMNS if not rows or name not in rows[0]]:
        raise UserError(f"--results {file}: no {', '.join(missing)} in it; {expected}")
    return rows


def _number(text: str, form: str) -> str:
    try:
        return format(float(text), form)
    except ValueError:
        return "–"


def _results_table(rows: Sequence[Mapping[str, str]], info: CheckpointInfo) -> list[str]:
    """The rows of this speculator and of the baselines, as a table in Markdown."""
    speculators = {row["speculator"] for row in rows} - set(BASELINES)
    exported = {name for name in speculators if Path(name).name == info.directory.name or len(speculators) == 1}
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    for row in rows:
        if row["speculator"] not in exported | set(BASELINES):
            continue
        name = "**this speculator**" if row["speculator"] in exported else row["speculator"].replace("_", " ")
        numbers = [_number(row[column], form) for column, (_, form) in COLUMNS.items() if form is not None]
        lines.append([Path(row["prompts"]).stem, name, *numbers])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _json(value: Mapping[str, Any]) -> list[str]:
    return ["```json", json.dumps(value, indent=2), "```"]


def _serving(info: CheckpointInfo, name: str) -> list[str]:
    """Settings of each program that reads the format."""
    count, lines = {"num_speculative_tokens": info.config.n_predict}, []
    if (method := FORMATS[name].method) is not None:
        variable = ", with `ARCTIC_INFERENCE_ENABLED=1`" if method == "arctic" else ""
        lines += [f"{FORMATS[name].engine}{variable}, as `speculative_config`:", ""]
        lines += _json({"method": method, "model": "/absolute/path/of/this"} | count)
    if FORMATS[name].ours and proposer_unsupported_reason(info.config) is None:
        lines += ["", f"{PROPOSER_ENGINE}, as `speculative_config`:", ""]
        lines += _json({"method": "custom_class", "model": PROPOSER} | count)
        lines += ["", "and as `additional_config`:", "", *_json({KEY: {"path": "/absolute/path/of/this"}})]
    if FORMATS[name].ours:
        lines += ["", "With Hugging Face's transformers:", "", "```bash"]
        lines += ["verl-speculator generate --base BASE --speculator /path/of/this --prompt '…' --compare", "```"]
    return lines


def model_card(info: CheckpointInfo, name: str, results: Sequence[Mapping[str, str]] = ()) -> str:
    """The content of `README.md`: what the speculator is, its training, its results, how to serve it.

    Args:
        info: the checkpoint.
        name: the format of the export, a key of `FORMATS`.
        results: rows of an evaluation.
    """
    trained, data, versions, base = (info.provenance.get(key, {}) for key in ("training", "data", "versions", "base"))
    base_name, config, jointly = base.get("name"), info.config, info.trained_base is not None
    # A local directory is no name of a base model for other users.
    hub_name = base_name if base_name and not base_name.startswith((".", "/", "~")) else None
    subject = hub_name or (Path(base_name).name if base_name else "a base that its config.json does not name")
    relation = [f"base_model: {hub_name}", "base_model_relation: adapter"] if hub_name and not jointly else []
    files = ", ".join(Path(path).name for path in data.get("train_files", ()))
    training = ("step", "train_batch_size", "lr", "loss", "seed")
    table = {
        "base": f"{subject}{', trained jointly' if jointly else ''}",
        "for a base of": f"width {info.hidden_size}, vocabulary {info.vocab_size}",
        "drafts from": f"{config.draft_vocab_size} of these tokens" if config.draft_vocab_size else None,
        "settings": ", ".join(f"{key}={value}" for key, value in config.to_dict().items() if key != "method"),
        "trained on": f"{files} ({data.get('train_rows', 0):,} rows)" if files else None,
        "training": ", ".join(f"{key} {trained[key]}" for key in training if key in trained),
        "weights of the base": base.get("weights_fingerprint"),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "commit": info.provenance.get("git_commit"),
    }
    lines = ["---", "library_name: verl_speculator", "tags:", "- speculative-decoding", f"- {config.method}"]
    lines += [*relation, "---", "", f"# {config.method} speculator for {subject}", ""]
    lines += [
        f"{FAMILIES[config.method].summary}. It drafts **{config.n_predict} tokens** (K) after each pass of its base "
        "model, which verifies them: the text is the base model's own.",
        *("", "| | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in table.items() if value),
    ]
    if results:
        lines += ["", "## Results", "", "τ is the number of tokens per pass of the base model.", ""]
        lines += _results_table(results, info)
    lines += ["", "## Serving", "", *_serving(info, name), ""]
    lines += ["It serves only the base model that it was trained for. Made with verl_speculator.", ""]
    return "\n".join(lines)


def check_repo(repo: str) -> None:
    """Check the name of a repository on the hub. Raises UserError naming the repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {one_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--push-to-hub {repo}: expected owner/name")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Upload a directory in one commit, to a repository that is made if it does not exist.

    Returns:
        The URL of the commit.

    Raises:
        UserError: if the hub refuses: no token, no permission, no connection.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload a speculator"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.TransportError, OSError) as error:
        raise UserError(f"--push-to-hub {repo}: {one_line(error)}; what was exported is in {directory}") from None
