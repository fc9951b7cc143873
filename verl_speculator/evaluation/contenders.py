"""What is run against each other: the base alone, speculators, and Hugging Face's prompt lookup.

Each gives the same account of a generation, so that nothing after this asks which one it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from verl_speculator.decoding import DraftTree, Generation, SamplingPolicy, speculative_generate
from verl_speculator.decoding.hugging_face import generation_settings
from verl_speculator.decoding.length import DraftLength, lengths_of
from verl_speculator.decoding.target import position_limit
from verl_speculator.models import Speculator


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


class Contender(Protocol):
    """One way to generate."""

    draft_length: int

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> Run:
        """Generate after a prompt."""
        ...


class Speculating:
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
            self.draft_length = lengths_of(draft_length, speculator.n_predict).most
        else:
            self.drafts, self.draft_length = {}, 0

    def generate(self, prompt: list[int], *, max_new_tokens: int, seed: int) -> Run:
        """`Contender.generate`"""
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
        """`Contender.generate`"""
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
        # Rounds with shorter copies, or none, are taken for whole ones: what was copied shows in no call.
        count = sum(histogram)
        drafted = [0] * self.draft_length + [count]
        judged = [sum(histogram[k:]) for k in range(self.draft_length)]
        seconds = (recorder.ends[0] - start, end - recorder.ends[0], nan, nan)
        return Run(tokens, *seconds, histogram, overlap, drafted, judged, count * self.draft_length)
