"""The model card of an exported speculator: what it is, what it was trained with, what it reaches, how to serve it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.format import BASE_DIRECTORY, CheckpointInfo
from verl_speculator.config.families import FAMILIES
from verl_speculator.interop.engine_formats import FORMATS, KEY, PROPOSER, serving_engines
from verl_speculator.utils.errors import UserError

COLUMNS = ("prompts", "speculator", "temperature", "draft_length", "tau", "accept_rate", "speedup")
BESIDES = ("none", "prompt_lookup", "random", "generate")
HEADINGS = ("prompts", "", "temperature", "drafts", "τ", "accepted", "speedup")


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of an evaluation's `results.csv`; a directory means the one in it.

    Raises:
        UserError: if it is none.
    """
    file = path / "results.csv" if path.is_dir() else path
    try:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--results {path}: no such file; expected the results.csv of verl-speculator evaluate"
        ) from None
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise UserError(
            f"--results {file}: no {', '.join(missing)} in it; expected what verl-speculator evaluate wrote"
        )
    return rows


def _number(text: str, form: str) -> str:
    try:
        return format(float(text), form)
    except ValueError:
        return "–"


def _results_table(rows: Sequence[dict[str, str]], info: CheckpointInfo) -> list[str]:
    """This speculator's rows and those of its baselines."""
    names = {row["speculator"] for row in rows} - set(BESIDES)
    own = {name for name in names if Path(name).name == info.directory.name or len(names) == 1}
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        if row["speculator"] not in own | set(BESIDES):
            continue
        name = "**this speculator**" if row["speculator"] in own else row["speculator"].replace("_", " ")
        lines.append(
            f"| {Path(row['prompts']).stem} | {name} | {_number(row['temperature'], 'g')} "
            f"| {_number(row['draft_length'], '.0f')} | {_number(row['tau'], '.2f')} "
            f"| {_number(row['accept_rate'], '.1%')} | {_number(row['speedup'], '.2f')} |"
        )
    return lines


def _json(value: dict[str, Any]) -> list[str]:
    return ["```json", json.dumps(value, indent=2), "```"]


def _serving(info: CheckpointInfo, name: str) -> list[str]:
    """How whatever reads the format is told to."""
    tokens, lines = info.config.n_predict, []
    if name.startswith("arctic"):
        lines += [f"{FORMATS[name].engine}, with `ARCTIC_INFERENCE_ENABLED=1`, as `speculative_config`:", ""]
        lines += _json({"method": "arctic", "model": "/absolute/path/of/this", "num_speculative_tokens": tokens})
    if name == "vllm-medusa":
        lines += [f"{FORMATS[name].engine}, as `speculative_config`:", ""]
        lines += _json({"method": "medusa", "model": "/absolute/path/of/this", "num_speculative_tokens": tokens})
    engines = {s.engine: s.unsupported_reason for s in serving_engines(info.config)}
    if FORMATS[name].ours and any(why is None for engine, why in engines.items() if "SpeculatorProposer" in engine):
        lines += ["", "vLLM 0.24 to 0.33 with `verl_speculator` installed, as `speculative_config`:", ""]
        lines += _json({"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": tokens})
        lines += ["", "and as `additional_config`:", ""]
        lines += _json({KEY: {"path": "/absolute/path/of/this"}})
    if FORMATS[name].ours:
        lines += ["", "With Hugging Face's transformers:", "", "```bash"]
        lines += ["verl-speculator generate --base BASE --speculator /path/of/this --prompt '…' --compare", "```"]
    return lines


def model_card(info: CheckpointInfo, name: str, results: Sequence[dict[str, str]] = ()) -> str:
    """The text of `README.md`.

    Args:
        info: the checkpoint.
        name: the format it is exported in, a key of `FORMATS`.
        results: rows of an evaluation, for the table of what it reaches.
    """
    trained, data, versions = (info.provenance.get(key, {}) for key in ("training", "data", "versions"))
    base = info.provenance.get("base", {}).get("name")
    config = info.config
    # A directory of the machine that it was trained on is no name of a base for anybody else.
    hub_name = base if base and not base.startswith((".", "/", "~")) else None
    beside = (info.directory / BASE_DIRECTORY).is_dir()
    front = ["---", "library_name: verl_speculator", "tags:", "- speculative-decoding", f"- {config.method}"]
    front += [f"base_model: {hub_name}", "base_model_relation: adapter"] if hub_name and not beside else []
    subject = hub_name or (Path(base).name if base else "a base that its config.json does not name")
    lines = [*front, "---", "", f"# {config.method} speculator for {subject}", ""]
    lines += [
        f"{FAMILIES[config.method].summary}. It drafts **{config.n_predict} tokens** (K) after each pass of its base, "
        "which checks them: the text stays the base's own.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {subject}{', trained jointly' if beside else ''} |",
        f"| for a base of | width {info.hidden_size}, vocabulary {info.vocab_size} |",
        f"| settings | {', '.join(f'{key}={value}' for key, value in config.to_dict().items() if key != 'method')} |",
    ]
    files = ", ".join(Path(path).name for path in data.get("train_files", ()))
    facts = {
        "trained on": f"{files} ({data.get('train_rows', 0):,} rows)" if files else None,
        "training": ", ".join(
            f"{key} {trained[key]}" for key in ("step", "train_batch_size", "lr", "loss", "seed") if key in trained
        ),
        "weights of the base": info.provenance.get("base", {}).get("weights_fingerprint"),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "commit": info.provenance.get("git_commit"),
    }
    lines += [f"| {key} | {value} |" for key, value in facts.items() if value]
    if results:
        lines += ["", "## What it reaches", ""]
        lines += ["τ is the number of tokens per pass of the base.", "", *_results_table(results, info)]
    lines += ["", "## Serving", "", *_serving(info, name), ""]
    lines += ["It serves the base that it was trained for, and no other. Made with verl_speculator.", ""]
    return "\n".join(lines)


def check_repo(repo: str) -> None:
    """Refuse what can be no repository, before anything is read.

    Raises:
        UserError: naming the repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {' '.join(str(error).split())}") from None
    if "/" not in repo:
        raise UserError(f"--push-to-hub {repo}: expected owner/name")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Upload a directory as one commit, making the repository if there is none.

    Returns:
        The address of the commit.

    Raises:
        UserError: if the hub refuses: no token, no right, no connection.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload a speculator"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.TransportError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"--push-to-hub {repo}: {told}; what was exported is in {directory}") from None
