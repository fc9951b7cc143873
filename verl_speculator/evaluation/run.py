"""The evaluation loop: every method on every prompt, in turn; each measurement is logged as soon as it is made."""

from __future__ import annotations

import datetime
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.cpu import optimize_speculator_for_cpu
from verl_speculator.base_model.loading import BaseModelLoader, base_shape
from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo, load_speculator
from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, hardware, versions, weights_fingerprint
from verl_speculator.decoding import DraftTree, SamplingPolicy, speculative_generate
from verl_speculator.decoding.generate import first_difference, generation_settings
from verl_speculator.decoding.options import AUTO, DraftLength, most_drafts
from verl_speculator.decoding.target import position_limit, windows
from verl_speculator.evaluation.metrics import Document
from verl_speculator.evaluation.prompts import Prompt, prompt_ids, read_prompts, read_texts
from verl_speculator.evaluation.report import Record, ResultsLog, write_results
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.utils.process import evenly_spaced, progress_bar
from verl_speculator.utils.settings import UserError

LOGS = "journals"
MEBIBYTE = 1024 * 1024
NAN = float("nan")
# Draft length of prompt lookup where no checkpoint gives one.
LOOKUP_LENGTH = 3


@dataclass(frozen=True)
class MethodRun:
    """One generation of a method: a way to generate that is compared with others.

    Attributes:
        tokens: the new tokens.
        seconds: wall time of `prefill` and `decode`, and of `draft` and `target` within the latter, NaN where they are
            not measured.
        counts: over the counted rounds: `histogram` [γ+1], rounds that accepted j draft tokens; `overlap` [γ], sums of
            Σ_v min(p, q) at each depth; `drafted` [γ+1], rounds that drafted j tokens; `judged` [γ], rounds that
            reached the depth with a draft token there; `nodes` [1], draft tokens that the base model read.
    """

    tokens: list[int]
    seconds: dict[str, float]
    counts: dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class SpeculativeMethod:
    """This package's decoding loop: with a speculator, which drafts `n_predict` tokens if `draft_length` is None, or a
    tree instead of a chain; or with the base model alone."""

    base: nn.Module
    speculator: Speculator | None
    policy: SamplingPolicy
    draft_length: DraftLength
    eos_token_ids: Sequence[int]
    draft_tree: DraftTree | None = None

    @property
    def max_draft_length(self) -> int:
        """γ, the most tokens that a round accepts; 0 for the base model alone."""
        n_predict = self.speculator.n_predict if self.speculator else 0
        return most_drafts(self.draft_length, n_predict, self.draft_tree)

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> MethodRun:
        """Continue a prompt."""
        drafts = {"draft_length": self.draft_length, "draft_tree": self.draft_tree}
        options = asdict(self.policy) | drafts | {"seed": seed, "eos_token_id": self.eos_token_ids}
        generation = speculative_generate(self.base, self.speculator, prompt, max_new_tokens=max_new_tokens, **options)
        seconds = asdict(generation.seconds)
        if self.base.device.type != "cpu":  # to tell the two apart, each would have to wait for the device
            seconds |= {"draft": NAN, "target": NAN}
        rounds, depths, lengths = generation.counted, range(generation.draft_length), range(generation.draft_length + 1)
        counts = {
            "histogram": [sum(r.accepted == length for r in rounds) for length in lengths],
            "overlap": [sum(r.overlap[k] for r in rounds if len(r.overlap) > k) for k in depths],
            "drafted": [sum(r.drafted == length for r in rounds) for length in lengths],
            "judged": [sum(len(r.overlap) > k for r in rounds) for k in depths],
            "nodes": [sum(r.nodes for r in rounds)],
        }
        return MethodRun(generation.tokens, seconds, counts)


@dataclass(frozen=True, eq=False)
class HuggingFaceMethod:
    """`base.generate`, plain (`max_draft_length` 0) or with prompt lookup, which copies that many tokens from the text
    so far."""

    base: nn.Module
    policy: SamplingPolicy
    max_draft_length: int
    eos_token_ids: Sequence[int]

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> MethodRun:
        """Continue a prompt."""
        ids = torch.tensor([prompt], device=self.base.device)
        if (limit := position_limit(self.base)) is not None:  # `generate` only warns, and goes on
            max_new_tokens = min(max_new_tokens, limit - len(prompt))
        torch.manual_seed(seed)
        # Assisted generation needs an end token; no token of the vocabulary is -1.
        ends = list(self.eos_token_ids)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or [-1], "pad_token_id": (ends or [0])[0]}
        if self.max_draft_length:
            options["prompt_lookup_num_tokens"] = self.max_draft_length
        lengths: list[int] = []
        ends_at: list[float] = []

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            lengths.append(kwargs["past_key_values"].get_seq_length())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module.device.type != "cpu":
                torch.accelerator.synchronize()
            ends_at.append(time.perf_counter())

        with (
            generation_settings(self.base, self.policy, **options),
            self.base.register_forward_pre_hook(before, with_kwargs=True),
            self.base.register_forward_hook(after),
        ):
            start = time.perf_counter()
            text = self.base.generate(ids, attention_mask=torch.ones_like(ids))
            end = time.perf_counter()
        # Prompt lookup may exceed the limit by one token.
        tokens = text[0, len(prompt) :][:max_new_tokens].tolist()
        seconds = {"prefill": ends_at[0] - start, "decode": end - ends_at[0], "draft": NAN, "target": NAN}
        return MethodRun(tokens, seconds, self._count_calls(lengths))

    def _count_calls(self, cache_lengths: list[int]) -> dict[str, list[float]]:
        """`MethodRun.counts`, as if every round had copied the most tokens: shorter copies show in no call."""
        histogram = [0] * (self.max_draft_length + 1)
        # The first call is the prefill and the last one ends the text: neither counts. The tokens that a call emitted
        # are in the cache at the next one.
        for before, after in pairwise(cache_lengths[1:]):
            histogram[after - before - 1] += 1
        rounds, depths = sum(histogram), range(self.max_draft_length)
        return {
            "histogram": histogram,
            # A greedy overlap is 1 for an accepted token and 0 for a rejected one; a sampled one is not known here.
            "overlap": [sum(histogram[k + 1 :]) if self.policy.greedy else NAN for k in depths],
            "drafted": [0] * self.max_draft_length + [rounds],
            "judged": [sum(histogram[k:]) for k in depths],
            "nodes": [rounds * self.max_draft_length],
        }


Method = SpeculativeMethod | HuggingFaceMethod


@dataclass(frozen=True, eq=False)
class MethodRow:
    """A method with its row's columns; the speculator is a checkpoint as it was given, or the name of a baseline."""

    speculator: str
    method: Method
    columns: dict[str, Any]
    identity: dict[str, Any]  # fingerprints of what is measured


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`; on a CPU only where the kernel allows it."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory in use since the reset, in MiB: what torch allocated on an accelerator, on a CPU the resident
    size of the process (since its start if the kernel allows no reset)."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / MEBIBYTE
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:", 1)[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def evaluate(settings: EvaluationSettings) -> None:
    """Measure, and write `results.csv`, `categories.csv` and `skipped.csv` (docs/evaluation.md). Raises UserError for a
    setting, a prompt file or a checkpoint that cannot be used, before the base model is loaded where that is possible.
    """
    settings.check_output()
    infos = settings.checkpoints()
    prompts = {path: read_prompts(path) for path in settings.prompts}
    loader = BaseModelLoader(settings.base, device=settings.device, dtype=settings.dtype, form=settings.form)
    speculators = {}
    for name, info in infos.items():
        info.check_base(*base_shape(loader.config))
        info.check_base_weights(settings.base, settings.form, allow_other=settings.allow_other_base)
        speculator = load_speculator(name, device=loader.device, dtype=loader.dtype).requires_grad_(False).eval()
        if speculator.is_untrained() and not settings.allow_untrained:
            reason = "its tensors are those it was initialised with, no training step has changed them"
            raise UserError(f"speculator={name}: {reason}; --allow-untrained evaluates it all the same")
        if loader.device == "cpu":
            optimize_speculator_for_cpu(speculator)
        speculators[name] = speculator
    texts = read_texts(settings.texts, loader.tokenizer) if settings.texts else []
    evaluator = Evaluator(settings, loader, infos, speculators)
    with progress_bar() as progress:
        for path, file_prompts in prompts.items():
            evaluator.measure_behaviour(path, file_prompts, progress)
        if texts:
            evaluator.measure_quality(settings.texts, texts, progress)
    write_results(settings.out, settings.out / LOGS)


@dataclass
class Evaluator:
    """Runs the methods on prompts, and the speculators on texts; `infos` and `speculators` are by checkpoint."""

    settings: EvaluationSettings
    loader: BaseModelLoader
    infos: dict[str, CheckpointInfo]
    speculators: dict[str, Speculator]

    def __post_init__(self) -> None:
        settings, loader = self.settings, self.loader
        self.tokenizer, self.base = loader.tokenizer, loader.load()  # a missing tokenizer is found before weights load
        self.ends = end_token_ids(self.tokenizer, self.base.generation_config)
        self.policy, self.limit = settings.policy, position_limit(self.base)
        self.vanilla = SpeculativeMethod(self.base, None, self.policy, None, self.ends)
        self.greedy = replace(self.vanilla, policy=SamplingPolicy())
        self.base_columns = {
            "base": settings.form.name_of(settings.base),
            "dtype": str(loader.dtype).removeprefix("torch."),
            "device": loader.device,
            "threads": torch.get_num_threads(),
        }
        self.base_identity = {"base": weights_fingerprint(settings.base, settings.gguf_file)}
        if settings.quantization is not None:
            self.base_identity["quantization"] = settings.quantization
        prints = {name: file_fingerprint(info.directory / WEIGHTS_FILE) for name, info in self.infos.items()}
        self.weights = {name: {"weights": fingerprint} for name, fingerprint in prints.items()}
        self.rows = self._method_rows()

    def _method_rows(self) -> list[MethodRow]:
        """The rows of the results: baselines first, then each checkpoint with its draft trees. Raises UserError for
        trees with a base model that cannot read them."""
        settings, trees = self.settings, self.settings.trees()
        if trees:
            windows(self.base)
        first = next(iter(self.infos.values()), None)
        # Prompt lookup copies as many tokens as the first checkpoint drafts at most.
        length = first.config.n_predict if first else LOOKUP_LENGTH
        length = settings.draft_length if isinstance(settings.draft_length, int) else length
        rows = [MethodRow("none", self.vanilla, {"method": "none"}, {})]
        for name, copied in (("generate", 0), ("prompt_lookup", length)):
            method = HuggingFaceMethod(self.base, self.policy, copied, self.ends)
            rows.append(MethodRow(name, method, {"method": name, "draft_length": copied}, {}))
        rows = [row for row in rows if row.speculator in settings.baselines]
        if "random" in settings.baselines and first is not None:
            options = {"seed": settings.seed, "device": self.base.device, "dtype": self.base.dtype}
            untrained = build_speculator(first.config, **first.shape, **options).requires_grad_(False).eval()
            if self.base.device.type == "cpu":
                optimize_speculator_for_cpu(untrained)
            rows.append(self._speculator_row("random", untrained, {"shape_of": str(first.directory)}))
        for (name, speculator), (path, tree) in product(self.speculators.items(), {None: None, **trees}.items()):
            row = self._speculator_row(name, speculator, self.weights[name], path, tree)
            row.columns["data_share"] = self.infos[name].data_share
            rows.append(row)
        return rows

    def _speculator_row(
        self, name: str, speculator: Speculator, identity: Record, path: Any = None, tree: DraftTree | None = None
    ) -> MethodRow:
        """The row of a chain, or of a draft tree and its file."""
        length = self.settings.draft_length if tree is None else None
        method = SpeculativeMethod(self.base, speculator, self.policy, length, self.ends, tree)
        columns = {
            "method": speculator.config.method,
            "n_predict": speculator.n_predict,
            "draft_length": method.max_draft_length,
            "untrained": speculator.is_untrained(),
        }
        if tree is not None:
            columns |= {"draft_shape": f"tree of {len(tree.paths)}", "draft_tree": str(path)}
            identity = identity | {"tree": [list(ranks) for ranks in tree.paths]}
        elif length == AUTO:
            columns["draft_shape"] = AUTO
        return MethodRow(name, method, columns, identity)

    def _open_log(
        self, kind: str, name: str, columns: Record, identity: Record, file: Path, scope: list[int]
    ) -> ResultsLog:
        """The log of one row on one file; its settings become columns of the results."""
        row = {"kind": kind, "speculator": name, "file": str(file), **columns, **self.base_columns}
        if kind == "behaviour":
            names = ("seed", "num_trials", "warmup_steps", "max_new_tokens")
            row |= asdict(self.policy) | {name: getattr(self.settings, name) for name in names}
        identity = self.base_identity | identity | {"file": file_fingerprint(file)}
        identity |= {"versions": versions(), "hardware": hardware(self.base.device.type)}
        origin = {"date": datetime.date.today().isoformat(), "commit": git_commit()}
        return ResultsLog.open(self.settings.out / LOGS, row, identity, origin, scope)

    def measure_behaviour(self, path: Path, prompts: Sequence[Prompt], progress: Progress) -> None:
        """Run every method on the prompts of one file that its log does not have yet."""
        scope = evenly_spaced(len(prompts), self.settings.num_prompts)
        logs = {r: self._open_log("behaviour", r.speculator, r.columns, r.identity, path, scope) for r in self.rows}
        is_warm = False
        for index in _missing(path.name, logs, scope, progress):
            due = [row for row, log in logs.items() if index not in log.records]
            turns, skipped = self._turns(prompts[index])
            methods = list(dict.fromkeys([self.vanilla, *(row.method for row in due)]))
            if turns and not is_warm:
                for method in methods * self.settings.warmup_steps:
                    method.generate(turns[0], max_new_tokens=min(16, self.settings.max_new_tokens), seed=0)
                is_warm = True
            records = self._measure_prompt(index, turns, methods, due) if turns else {}
            for row in due:
                record = {"category": prompts[index].category, "turns": len(turns)}
                logs[row].add(index, record | records.get(row, {}) | skipped)

    def _turns(self, prompt: Prompt) -> tuple[list[list[int]], Record]:
        """The tokens of every turn that fits, with the base model's greedy answers to the earlier ones; and the reason
        why the others are `skipped`."""
        turns: list[list[int]] = []
        replies: list[str] = []
        for turn in range(prompt.num_turns):
            if turn:
                answer = self.greedy.generate(turns[-1], max_new_tokens=self.settings.max_new_tokens, seed=0)
                replies.append(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            ids = prompt_ids(prompt, self.tokenizer, replies)
            if self.limit is not None and len(ids) >= self.limit:
                place = f"turn {turn + 1} of {prompt.num_turns}: " if prompt.num_turns > 1 else ""
                return turns, {"skipped": f"{place}{len(ids)} tokens, the base has {self.limit} positions"}
            turns.append(ids)
        return turns, {}

    def _measure_prompt(
        self, index: int, turns: list[list[int]], methods: Sequence[Method], rows: Sequence[MethodRow]
    ) -> dict[MethodRow, Record]:
        """Records of a prompt. Every other trial runs the methods backwards, so that a machine that slows down favours
        none of them."""
        settings, device = self.settings, self.base.device
        trials: list[dict[Any, list[MethodRun]]] = []
        peaks = dict.fromkeys(methods, 0.0)
        for trial in range(settings.num_trials):
            seeds = [hash((settings.seed, index, turn, trial)) % 2**31 for turn in range(len(turns))]
            trials.append({})
            for method in methods if (index + trial) % 2 == 0 else reversed(methods):
                reset_peak_memory(device)
                generate = partial(method.generate, max_new_tokens=settings.max_new_tokens)
                trials[-1][method] = [generate(ids, seed=seed) for ids, seed in zip(turns, seeds, strict=True)]
                peaks[method] = max(peaks[method], peak_memory(device))
        trial_texts = [{m: [run.tokens for run in runs] for m, runs in trial.items()} for trial in trials]
        # A greedy text is the same in every trial: its rounds count once.
        counted = trials[:1] if self.policy.greedy else trials
        gaps = {
            row.method: self._largest_gap(turns, trial_texts[0][self.vanilla], trial_texts[0][row.method])
            for row in rows
        }
        return {
            row: {
                "alone": [_times(runs[self.vanilla]) for runs in trials],
                "own": [_times(runs[row.method]) for runs in trials],
                "identical": sum(texts[row.method] == texts[self.vanilla] for texts in trial_texts),
                "difference_gap": gaps[row.method],
                "peak_mb": peaks[row.method],
                **_sum_counts([run.counts for runs in counted for run in runs[row.method]]),
            }
            for row in rows
        }

    def _largest_gap(self, turns: list[list[int]], alone: list[list[int]], own: list[list[int]]) -> float:
        """The largest `Difference.gap` over the turns whose greedy texts differ, NaN if none does."""
        if not self.policy.greedy:
            return NAN
        differences = (first_difference(self.base, *texts) for texts in zip(turns, alone, own, strict=True))
        return max((difference.gap for difference in differences if difference is not None), default=NAN)

    def measure_quality(self, path: Path, texts: Sequence[tuple[list[int], list[int]]], progress: Progress) -> None:
        """Measure every checkpoint on the texts of one file that its log does not have yet."""
        scope, logs = evenly_spaced(len(texts), self.settings.num_texts), {}
        for name, info in self.infos.items():
            trained_at = info.provenance.get("training", {}).get("kl_temperature", 1.0)
            columns = {"training_temperature": self.settings.kl_temperature or float(trained_at)}
            logs[name] = self._open_log("quality", name, columns, self.weights[name], path, scope)
        for i in _missing(f"{path.name} (text)", logs, scope, progress):
            ids, mask = texts[i]
            # Of a text longer than the base model's positions, what fits is measured.
            document = Document(self.base, ids[: self.limit], mask[: self.limit])
            for name, log in logs.items():
                if i not in log.records:
                    temperature = log.settings["training_temperature"]
                    log.add(i, document.measure(self.speculators[name], self.ends, temperature))


def _missing(name: str, logs: Mapping[Any, ResultsLog], scope: list[int], progress: Progress) -> Iterator[int]:
    """The indices that a log still lacks, under a progress bar."""
    indices = sorted({index for log in logs.values() for index in log.missing()})
    # Not `track`, whose bar of a resumed run would end at the number of these indices.
    task = progress.add_task(name, total=len(scope), completed=len(scope) - len(indices))
    for index in indices:
        yield index
        progress.advance(task)


def _times(runs: Sequence[MethodRun]) -> dict[str, float]:
    """Tokens and seconds of one trial, all turns together."""
    seconds = {name: round(sum(run.seconds[name] for run in runs), 6) for name in runs[0].seconds}
    return {"tokens": sum(len(run.tokens) for run in runs)} | seconds


def _sum_counts(counts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: [sum(column) for column in zip(*(c[name] for c in counts), strict=True)] for name in counts[0]}
