"""The evaluation: every method on every prompt, in turn, each measurement kept as soon as it is made."""

from __future__ import annotations

import datetime
import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.loading import (
    base_shape,
    check_base,
    choose_device,
    choose_dtype,
    load_base,
    load_tokenizer,
)
from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo, load_speculator
from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, hardware, versions, weights_fingerprint
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.target import position_limit
from verl_speculator.evaluation.methods import Entries, Entry, Run, SpeculativeMethod
from verl_speculator.evaluation.metrics import Document
from verl_speculator.evaluation.prompts import Prompt, prompt_ids, read_prompts, read_texts
from verl_speculator.evaluation.report import Journal, write_results
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.models import Speculator
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import progress_bar, spread

MEBIBYTE = 1024 * 1024


class PeakMemory:
    """The most memory held at once since `reset`.

    On an accelerator, what torch allocated there. On a CPU, the resident size of the process (with everything that was
    loaded before); where the kernel does not let the mark be lowered, the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> float:
        """The peak, in MiB."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated() / MEBIBYTE
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:", 1)[1].split()[0]) / 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


JOURNALS = "journals"
# What is counted over the rounds of a run, and added over runs.
COUNTS = ("histogram", "overlap", "drafted", "judged", "nodes")


def evaluate(settings: EvaluationSettings) -> Path:
    """Measure, and write `results.csv`, `categories.csv` and `skipped.csv` (docs/evaluation.md).

    Returns:
        The output directory.

    Raises:
        UserError: for a setting, a prompt file or a checkpoint that cannot be used; before the base is loaded wherever
            it can be known by then.
    """
    settings.check_output()
    infos = settings.checkpoints()
    prompts = {path: read_prompts(path) for path in settings.prompts}
    shape = base_shape(settings.base, settings.form)
    for info in infos.values():
        info.check_base(*shape)
        info.check_base_weights(settings.base, settings.form, allow_other=settings.allow_other_base)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    tokenizer = load_tokenizer(settings.base, settings.form)
    check_base(settings.base, settings.form)
    texts = read_texts(settings.texts, tokenizer) if settings.texts else []

    speculators = {name: _load_trained(name, settings, device, dtype) for name in infos}
    base = load_base(settings.base, device=device, dtype=dtype, form=settings.form)
    ends = end_token_ids(tokenizer, base.generation_config)
    found = {
        "base": settings.form.name_of(settings.base),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    bench = EvaluationModels(settings, base, tokenizer, ends, found)
    entries = Entries(settings, base, ends).of(infos, speculators)
    with progress_bar() as progress:
        for path, several in prompts.items():
            bench.measure_behaviour(path, several, entries, progress)
        if texts:
            bench.measure_quality(texts, infos, speculators, progress)
    write_results(settings.out, settings.out / JOURNALS)
    return settings.out


def _load_trained(name: str, settings: EvaluationSettings, device: str, dtype: torch.dtype) -> Speculator:
    """A checkpoint that training has changed."""
    speculator = load_speculator(name, device=device, dtype=dtype).requires_grad_(False).eval()
    if speculator.is_untrained() and not settings.allow_untrained:
        raise UserError(
            f"speculator={name}: its tensors are those it was initialised with, no training step has changed them; "
            "--allow-untrained evaluates it all the same"
        )
    return speculator


class EvaluationModels:
    """A base with all that is run on it.

    Args:
        settings: of the evaluation.
        base: in evaluation mode.
        tokenizer: of the base.
        ends: tokens that end a text.
        found: what was settled when loading: dtype, device, threads.
    """

    def __init__(
        self, settings: EvaluationSettings, base: nn.Module, tokenizer: Any, ends: Sequence[int], found: dict[str, Any]
    ) -> None:
        self.settings, self.base, self.tokenizer, self.ends, self.found = settings, base, tokenizer, ends, found
        self.policy, self.limit = settings.policy, position_limit(base)
        self.alone = SpeculativeMethod(base, None, self.policy, None, ends)
        self.reader = SpeculativeMethod(base, None, SamplingPolicy(), None, ends)
        self.memory = PeakMemory(base.device)
        self.journals = settings.out / JOURNALS
        self.base_identity = {"base": weights_fingerprint(settings.base, settings.gguf_file)}
        if settings.quantization is not None:
            self.base_identity["quantization"] = settings.quantization

    def _journal(
        self, kind: str, name: str, describes: dict[str, Any], identity: dict[str, Any], file: Path, scope: list[int]
    ) -> Journal:
        """Of one row, on one file."""
        used = self.settings
        row = {"kind": kind, "speculator": name, "file": str(file), **describes, **self.found}
        if kind == "behaviour":
            row |= asdict(self.policy) | {
                "seed": used.seed,
                "num_trials": used.num_trials,
                "warmup_steps": used.warmup_steps,
                "max_new_tokens": used.max_new_tokens,
            }
        identity = {**self.base_identity, **identity, "file": file_fingerprint(file), "versions": versions()}
        identity["hardware"] = hardware(self.base.device.type)
        origin = {"date": datetime.date.today().isoformat(), "commit": git_commit()}
        return Journal.open(self.journals, row, identity, origin, scope)

    # Behaviour on prompts.

    def measure_behaviour(
        self, path: Path, prompts: Sequence[Prompt], entries: Sequence[Entry], progress: Progress
    ) -> None:
        """Every entry on the prompts of one file; those already measured are left out."""
        scope = spread(len(prompts), self.settings.num_prompts)
        journals = {
            e.key: self._journal("behaviour", e.speculator, e.describes, e.identity, path, scope) for e in entries
        }
        waiting = sorted({index for journal in journals.values() for index in journal.missing()})
        task = progress.add_task(path.name, total=len(scope), completed=len(scope) - len(waiting))
        warm = False
        for prompt in (prompts[index] for index in waiting):
            due = [e for e in entries if prompt.index not in journals[e.key].records]
            turns, reason = self._turns(prompt)
            if turns and not warm:
                self._warm_up(turns[0], due)
                warm = True
            measured = self._measure_prompt(prompt.index, turns, due) if turns else {}
            for entry in due:
                record = {"category": prompt.category, "turns": len(turns)} | measured.get(entry.key, {})
                if reason:
                    record["skipped"] = reason
                journals[entry.key].add(prompt.index, record)
            progress.advance(task)

    def _turns(self, prompt: Prompt) -> tuple[list[list[int]], str | None]:
        """The tokens of every turn that fits, the base's own greedy answers between them, and why others do not."""
        turns: list[list[int]] = []
        replies: list[str] = []
        for turn in range(prompt.num_turns):
            if turn:
                answer = self.reader.generate(turns[-1], max_new_tokens=self.settings.max_new_tokens, seed=0)
                replies.append(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            ids = prompt_ids(prompt, self.tokenizer, replies)
            if self.limit is not None and len(ids) >= self.limit:
                place = f"turn {turn + 1} of {prompt.num_turns}: " if prompt.num_turns > 1 else ""
                return turns, f"{place}{len(ids)} tokens, the base has {self.limit} positions"
            turns.append(ids)
        return turns, None

    def _warm_up(self, prompt: list[int], entries: Sequence[Entry]) -> None:
        for _ in range(self.settings.warmup_steps):
            for method in [self.alone, *(e.method for e in entries if e.method)]:
                method.generate(prompt, max_new_tokens=min(16, self.settings.max_new_tokens), seed=0)

    def _measure_prompt(
        self, index: int, turns: list[list[int]], entries: Sequence[Entry]
    ) -> dict[tuple[str, Path | None], dict[str, Any]]:
        """Each trial runs the base alone and every entry in turn, forwards or backwards, so that a machine that grows
        slower favours none."""
        records: dict[tuple[str, Path | None], dict[str, Any]] = {
            e.key: {"alone": [], "own": [], "identical": 0, "peak_mb": 0.0} | {name: [] for name in COUNTS}
            for e in entries
        }
        for trial in range(self.settings.num_trials):
            seeds = [hash((self.settings.seed, index, turn, trial)) % 2**31 for turn in range(len(turns))]
            running = [None, *(e for e in entries if e.method)]
            runs: dict[Any, list[Run]] = {}
            peaks: dict[Any, float] = {}
            for entry in running if (index + trial) % 2 == 0 else reversed(running):
                name, method = (entry.key, entry.method) if entry else (None, self.alone)
                self.memory.reset()
                runs[name] = [
                    method.generate(ids, max_new_tokens=self.settings.max_new_tokens, seed=seed)
                    for ids, seed in zip(turns, seeds, strict=True)
                ]
                peaks[name] = self.memory.read()
            for entry in entries:
                record, name = records[entry.key], entry.key if entry.method else None
                record["alone"].append(_times(runs[None]))
                record["own"].append(_times(runs[name]))
                record["peak_mb"] = max(record["peak_mb"], peaks[name])
                same = [a.tokens == b.tokens for a, b in zip(runs[None], runs[name], strict=True)]
                record["identical"] += all(same)
                # A greedy text is the same in every trial: its rounds count once.
                if trial == 0 or not self.policy.greedy:
                    for count in COUNTS:
                        record[count].append(_add(_count(run, count) for run in runs[name]))
        for record in records.values():
            record |= {count: _add(record[count]) for count in COUNTS}
        return records

    # Quality on text.

    def measure_quality(
        self,
        texts: Sequence[tuple[list[int], list[int]]],
        infos: dict[str, CheckpointInfo],
        speculators: dict[str, Speculator],
        progress: Progress,
    ) -> None:
        """Every checkpoint on the held-out text; each document is read once for all of them."""
        path, scope = self.settings.texts, spread(len(texts), self.settings.num_texts)
        journals, temperatures = {}, {}
        for name, info in infos.items():
            temperatures[name] = self.settings.kl_temperature or _training_temperature(info)
            describes = {"training_temperature": temperatures[name]}
            identity = {"weights": file_fingerprint(info.directory / WEIGHTS_FILE)}
            journals[name] = self._journal("quality", name, describes, identity, path, scope)
        waiting = sorted({i for journal in journals.values() for i in journal.missing()})
        task = progress.add_task(f"{path.name} (text)", total=len(scope), completed=len(scope) - len(waiting))
        for i in waiting:
            ids, mask = texts[i]
            # A document longer than the base is measured as far as the base can read it.
            document = Document(self.base, ids[: self.limit], mask[: self.limit])
            for name, journal in journals.items():
                if i not in journal.records:
                    journal.add(i, document.measure(speculators[name], self.ends, temperatures[name]))
            progress.advance(task)


def _training_temperature(info: CheckpointInfo) -> float:
    """What the checkpoint's loss softened the distributions with; 1 where none is recorded."""
    return float(info.provenance.get("training", {}).get("kl_temperature", 1.0))


def _times(runs: Sequence[Run]) -> dict[str, float]:
    """Tokens and seconds of one trial, all turns together."""
    sums = {name: sum(getattr(run, name) for run in runs) for name in ("prefill", "decode", "draft", "target")}
    return {"tokens": sum(len(run.tokens) for run in runs)} | {name: round(s, 6) for name, s in sums.items()}


def _count(run: Run, name: str) -> list[float]:
    """One of COUNTS, as a list."""
    value = getattr(run, name)
    return value if isinstance(value, list) else [value]


def _add(rows: Any) -> list[float]:
    """Element by element."""
    return [sum(column) for column in zip(*rows, strict=True)]
