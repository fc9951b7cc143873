"""What is run against each other: the base alone, speculators, and Hugging Face's prompt lookup.

Each gives the same account of a generation, so that nothing after this asks which one it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo
from verl_speculator.checkpoint.provenance import file_fingerprint
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.decoding import DraftTree, Generation, SamplingPolicy, speculative_generate
from verl_speculator.decoding.draft_length import AUTO, DraftLength, draft_length_policy
from verl_speculator.decoding.generate import generation_settings
from verl_speculator.decoding.target import position_limit, windows
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.models import Speculator, build_speculator


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens: what was generated.
        prefill: seconds until the first token.
        decode: seconds after it.
        draft: of these, the drafting; nan where it is not told apart.
        target: of these, the base's forward passes.
        histogram: [γ+1] number of counted rounds that accepted j drafts.
        overlap: [γ] sums of Σ_v min(p, q) over the counted rounds that reached the depth.
        drafted: [γ+1] number of counted rounds that drafted j tokens ahead.
        judged: [γ] number of counted rounds that reached the depth and had a draft there.
        nodes: drafts that the base read in the counted rounds.
    """

    tokens: list[int]
    prefill: float
    decode: float
    draft: float
    target: float
    histogram: list[int]
    overlap: list[float]
    drafted: list[int]
    judged: list[int]
    nodes: int


class Method(Protocol):
    """One way to generate."""

    draft_length: int

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> Run:
        """Generate after a prompt."""
        ...


class SpeculativeMethod:
    """The project's own loop, with a speculator or without.

    Args:
        base: in evaluation mode.
        speculator: None for the base alone.
        policy: of sampling.
        draft_length: None for the speculator's `n_predict`.
        eos_token_ids: tokens that end a text.
        draft_tree: drafted instead of a chain.
    """

    def __init__(
        self,
        base: nn.Module,
        speculator: Speculator | None,
        policy: SamplingPolicy,
        draft_length: DraftLength,
        eos_token_ids: Sequence[int],
        draft_tree: DraftTree | None = None,
    ) -> None:
        self.base, self.speculator, self.policy, self.ends = base, speculator, policy, tuple(eos_token_ids)
        if draft_tree is not None:
            self.drafts, self.draft_length = {"draft_tree": draft_tree}, draft_tree.depth
        elif speculator is not None:
            self.drafts = {"draft_length": draft_length}
            self.draft_length = draft_length_policy(draft_length, speculator.n_predict).most
        else:
            self.drafts, self.draft_length = {}, 0

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> Run:
        """`Method.generate`"""
        done = speculative_generate(
            self.base,
            self.speculator,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=self.policy.temperature,
            top_p=self.policy.top_p,
            top_k=self.policy.top_k,
            seed=seed,
            eos_token_id=self.ends,
            **self.drafts,
        )
        seconds = done.seconds
        # On an accelerator the two are not told apart in a timed run: each mark would wait for the device.
        parts = (seconds.draft, seconds.target) if self.base.device.type == "cpu" else (float("nan"),) * 2
        return Run(done.tokens, seconds.prefill, seconds.decode, *parts, **count_rounds(done))


def count_rounds(done: Generation) -> dict[str, Any]:
    """`Run`'s fields of the counted rounds."""
    most = done.draft_length
    histogram, drafted, judged, overlap = [0] * (most + 1), [0] * (most + 1), [0] * most, [0.0] * most
    for one in done.counted:
        histogram[one.accepted] += 1
        drafted[one.drafted] += 1
        for depth, value in enumerate(one.overlap):
            overlap[depth] += value
            judged[depth] += 1
    nodes = sum(one.nodes for one in done.counted)
    return {"histogram": histogram, "overlap": overlap, "drafted": drafted, "judged": judged, "nodes": nodes}


class CallRecorder:
    """Notes of every forward pass of a base how many tokens its cache held, how many it read, and when it was done."""

    def __init__(self, base: nn.Module) -> None:
        self.base, self.calls, self.ends = base, [], []

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append((kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1]))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())

    def __enter__(self) -> CallRecorder:
        self._hooks = [
            self.base.register_forward_pre_hook(self._before, with_kwargs=True),
            self.base.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()


class HuggingFace:
    """`base.generate`, with prompt lookup (drafts copied from what was already said) or without.

    Args:
        base: in evaluation mode.
        policy: of sampling.
        draft_length: how many tokens prompt lookup copies, 0 for plain generation.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, base: nn.Module, policy: SamplingPolicy, draft_length: int, eos_token_ids: Sequence[int]
    ) -> None:
        self.base, self.policy, self.draft_length, self.ends = base, policy, draft_length, tuple(eos_token_ids)

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> Run:
        """`Method.generate`"""
        ids = torch.tensor([prompt], device=self.base.device)
        if (limit := position_limit(self.base)) is not None:  # `generate` only warns, and goes on
            max_new_tokens = min(max_new_tokens, limit - len(prompt))
        torch.manual_seed(seed)
        settings = {"max_new_tokens": max_new_tokens, "pad_token_id": self.ends[0] if self.ends else 0}
        # Its assisted generation cannot do without end tokens; none of the vocabulary's is -1.
        settings["eos_token_id"] = list(self.ends) or [-1]
        if self.draft_length:
            settings["prompt_lookup_num_tokens"] = self.draft_length
        with generation_settings(self.base, self.policy, **settings), CallRecorder(self.base) as recorder:
            start = time.perf_counter()
            text = self.base.generate(ids, attention_mask=torch.ones_like(ids))
            end = time.perf_counter()
        histogram = [0] * (self.draft_length + 1)
        # The first call is the prefill, the last one ends the text: neither counts. What a call emitted shows in the
        # length of the cache at the next one.
        rounds = zip(recorder.calls[1:], recorder.calls[2:], strict=False)
        for (before, _), (after, _) in rounds:
            histogram[after - before - 1] += 1
        nan = float("nan")
        # Greedily an overlap is 1 where the draft is accepted and 0 where it is not; otherwise it is not known here.
        overlap = [sum(histogram[k + 1 :]) if self.policy.greedy else nan for k in range(self.draft_length)]
        # Prompt lookup may go one token past the limit.
        tokens = text[0, len(prompt) :][:max_new_tokens].tolist()
        # DraftAndVerify with shorter copies, or none, are taken for whole ones: what was copied shows in no call.
        count = sum(histogram)
        drafted = [0] * self.draft_length + [count]
        judged = [sum(histogram[k:]) for k in range(self.draft_length)]
        seconds = (recorder.ends[0] - start, end - recorder.ends[0], nan, nan)
        return Run(tokens, *seconds, histogram, overlap, drafted, judged, count * self.draft_length)


LOOKUP_LENGTH = 3


@dataclass
class Entry:
    """One row of the results to be: who, and how it generates.

    Attributes:
        speculator: the checkpoint as it was given, or the name of a baseline.
        describes: what the row says of it.
        identity: fingerprint of what is measured.
        method: None for the base alone, which is run beside all others.
        tree: the file of the tree that it drafts, where it drafts one.
    """

    speculator: str
    describes: dict[str, Any]
    identity: dict[str, Any]
    method: Method | None
    tree: Path | None = None

    @property
    def key(self) -> tuple[str, Path | None]:
        """What tells it from all other entries."""
        return self.speculator, self.tree


class Entries:
    """Makes the rows.

    Args:
        settings: of the evaluation.
        base: in evaluation mode.
        ends: tokens that end a text.
    """

    def __init__(self, settings: EvaluationSettings, base: nn.Module, ends: Sequence[int]) -> None:
        self.settings, self.base, self.ends, self.policy = settings, base, ends, settings.policy

    def of(self, infos: dict[str, CheckpointInfo], speculators: dict[str, Speculator]) -> list[Entry]:
        """The rows: baselines first, then the checkpoints as they were given.

        Raises:
            UserError: for trees on a base that cannot read them.
        """
        first = next(iter(infos.values()), None)
        entries, trees = [], self.settings.trees()
        if trees:
            windows(self.base)
        if "none" in self.settings.baselines:
            entries.append(Entry("none", {"method": "none"}, {}, None))
        length = _lookup_length(self.settings.draft_length, first)
        for name, copied in (("generate", 0), ("prompt_lookup", length)):
            if name in self.settings.baselines:
                lookup = HuggingFace(self.base, self.policy, copied, self.ends)
                entries.append(Entry(name, {"method": name, "draft_length": copied}, {}, lookup))
        if "random" in self.settings.baselines and first is not None:
            untrained = self._random(first)
            entries.append(self._entry("random", first.config, untrained, {"shape_of": str(first.directory)}))
        for name, info in infos.items():
            identity = {"weights": file_fingerprint(info.directory / WEIGHTS_FILE)}
            chain = self._entry(name, info.config, speculators[name], identity)
            beside = [self._tree_entry(chain, path, tree, speculators[name]) for path, tree in trees.items()]
            entries += [chain, *beside]
        return entries

    def _random(self, info: CheckpointInfo) -> Speculator:
        """A freshly initialised speculator: what an unloaded checkpoint would be."""
        untrained = build_speculator(
            info.config,
            **info.shape,
            seed=self.settings.seed,
            device=self.base.device,
            dtype=self.base.dtype,
        )
        return untrained.requires_grad_(False).eval()

    def _entry(self, name: str, config: SpeculatorConfig, speculator: Speculator, identity: dict[str, Any]) -> Entry:
        method = SpeculativeMethod(self.base, speculator, self.policy, self.settings.draft_length, self.ends)
        describes = {
            "method": config.method,
            "n_predict": config.n_predict,
            "draft_length": method.draft_length,
            "untrained": speculator.is_untrained(),
        }
        if self.settings.draft_length == AUTO:
            describes["draft_shape"] = AUTO
        return Entry(name, describes, identity, method)

    def _tree_entry(self, beside: Entry, path: Path, tree: DraftTree, speculator: Speculator) -> Entry:
        """The row of a tree, like that of the chain it stands beside."""
        method = SpeculativeMethod(self.base, speculator, self.policy, None, self.ends, tree)
        describes = beside.describes | {
            "draft_length": tree.depth,
            "draft_shape": f"tree of {len(tree.paths)}",
            "draft_tree": str(path),
        }
        identity = beside.identity | {"tree": [list(ranks) for ranks in tree.paths]}
        return Entry(beside.speculator, describes, identity, method, path)


def _lookup_length(draft_length: DraftLength, first: CheckpointInfo | None) -> int:
    """How many tokens prompt lookup copies: as many as the first checkpoint drafts at most."""
    if isinstance(draft_length, int):
        return draft_length
    return first.config.n_predict if first else LOOKUP_LENGTH
