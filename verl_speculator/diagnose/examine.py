"""A checkpoint, a base and prompts in; the checks out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.loading import base_shape, choose_device, choose_dtype, load_base, load_tokenizer
from verl_speculator.checkpoint.format import CheckpointInfo, load_speculator, read_checkpoint_info, read_weights
from verl_speculator.diagnose.acceptance import AlignedTexts, answers
from verl_speculator.diagnose.checkpoint_checks import (
    FAULT,
    Check,
    DiagnosisContext,
    check_serving,
    percent,
    run_checks,
)
from verl_speculator.diagnose.trace_file import read_trace
from verl_speculator.evaluation.prompts import Prompt, prompt_ids, read_prompts, read_texts
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import progress_bar, spread

# Its place in the order: behind whether it was trained, and for which base.
SERVING_PLACE = 2


@dataclass(frozen=True)
class DiagnosisReport:
    """What `examine` found: the acceptance as it is, None where the checkpoint does not load, and every check."""

    accepted: str | None
    rows: int
    checks: list[Check]


def examine(
    checkpoint: str,
    base: str,
    prompts: Path,
    *,
    rollout_trace: Path | None,
    train_data: Path | None,
    num_prompts: int,
    max_new_tokens: int,
    num_draft: int | None,
    device: str,
    dtype: str,
) -> DiagnosisReport:
    """Run every check.

    Raises:
        UserError: for a file, a base or a setting that cannot be used; before the base is loaded.
    """
    asked = {"num-prompts": num_prompts, "max-new-tokens": max_new_tokens, "num-draft": num_draft}
    for setting, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f"{setting}={value}: expected a number ≥ 1")
    info = read_checkpoint_info(checkpoint)
    info.check_base(*base_shape(base))
    served = read_trace(rollout_trace) if rollout_trace else None
    if num_draft is None and served is not None and "drafts" in served.notes:
        num_draft = len(served.notes["drafts"])
    given = _chosen(prompts, num_prompts)
    known = train_data or _training_file(info)
    trained_on = _chosen(known, num_prompts) if known else []
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    try:
        read_weights(info)
    except UserError as error:
        if "does not fit its" not in str(error):
            raise
        advice = "take both files from the same checkpoint: its heads are not those that n_predict calls for"
        return DiagnosisReport(None, 0, [Check("n_predict and heads", FAULT, str(error), advice)])
    tokenizer, model = load_tokenizer(base), load_base(base, device=place, dtype=kind)
    speculator = load_speculator(checkpoint, device=place, dtype=kind).requires_grad_(False).eval()
    ends = end_token_ids(tokenizer, model.generation_config)
    with progress_bar() as progress:
        own = _bench(model, given, tokenizer, ends, max_new_tokens, progress, "prompts")
        trained = text = None
        if trained_on:
            trained = _bench(model, trained_on, tokenizer, ends, max_new_tokens, progress, "training prompts")
            whole = read_texts(known, tokenizer)
            text = AlignedTexts(model, [whole[i] for i in spread(len(whole), num_prompts)], ends)
    patient = DiagnosisContext(info, speculator, model, base, own, trained, text, num_draft)
    if not patient.now.rows:
        raise UserError(
            f"prompts={prompts}: the base's answers are shorter than {speculator.n_predict + 1} tokens, which leaves "
            "no place to draft from; expected other prompts, or a larger --max-new-tokens"
        )
    checks = list(run_checks(patient))
    if served is not None:
        checks.insert(SERVING_PLACE, check_serving(served, speculator, model))
    return DiagnosisReport(percent(patient.now), patient.now.rows, checks)


def _training_file(info: CheckpointInfo) -> Path | None:
    """The first of the files that it was trained on that is still there."""
    files = info.provenance.get("data", {}).get("train_files", [])
    return next((Path(file).expanduser() for file in files if Path(file).expanduser().is_file()), None)


def _chosen(path: Path, count: int) -> list[Prompt]:
    prompts = read_prompts(path)
    return [prompts[i] for i in spread(len(prompts), count)]


def _bench(
    model: nn.Module,
    prompts: list[Prompt],
    tokenizer: Any,
    ends: tuple[int, ...],
    count: int,
    progress: Progress,
    name: str,
) -> AlignedTexts:
    texts = []
    for prompt in progress.track(prompts, description=name):
        texts += answers(model, [prompt_ids(prompt, tokenizer)], count, ends)
    return AlignedTexts(model, texts, ends)
