"""A round: draft, one forward pass of the target, verification, and rollback of the rejected drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import Proposal, SpeculatorDrafter, TreeDrafter
from verl_speculator.decoding.options import GenerationOptions
from verl_speculator.decoding.target import Target, TreeAttention
from verl_speculator.decoding.verification import draw, verify, verify_tree
from verl_speculator.models import Speculator


@dataclass(frozen=True)
class Round:
    """One forward pass of the target and its result. The first of a generation is the prefill, which verifies nothing.

    Attributes:
        tokens: the emitted tokens: the accepted drafts and the token after them, cut where the text ends.
        drafted: number of drafts that could be accepted: the length of a chain, the depth of a tree.
        accepted: number of accepted drafts, before the cut.
        overlap: Σ_v min(p, q) at each draft up to the first rejected one.
        nodes: number of drafts that the target read: more than `drafted` in a tree.
        finish: why the text ends with this round: "stop" (end token or stop string), "length", or None.
        full_length: False if the target's position limit shortened the draft.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    overlap: tuple[float, ...] = ()
    nodes: int = 0
    finish: str | None = None
    full_length: bool = True


@dataclass
class Seconds:
    """Wall time of a generation in seconds.

    Attributes:
        prefill: until the first token.
        decode: of all rounds after it.
        draft: of these, drafting.
        target: of these, the target's forward passes. On an accelerator the two are measured with `time_parts` only,
            because each measurement waits for the device.
    """

    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0
    target: float = 0.0


def synchronized_time() -> float:
    """The time after the accelerator has finished all work it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


class DraftAndVerify:
    """The state of one generation: the target's cache, the newest token and the hidden state before it.

    Args:
        target: entered by the caller.
        drafter: None for the target alone, whose rounds have no drafts.
        options: sampling policy, seed, and whether to measure drafting and the target's passes on an accelerator.
    """

    def __init__(self, target: Target, drafter: SpeculatorDrafter | None, options: GenerationOptions) -> None:
        self.target, self.drafter, self.policy = target, drafter, options
        self.generator = torch.Generator()
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)
        self.device = target.base.device
        self.seconds = Seconds()
        self.clock = synchronized_time if options.time_parts and self.device.type != "cpu" else time.perf_counter

    def uniforms(self, count: int) -> Tensor | None:
        """[count] in [0, 1); None for a greedy policy, which draws nothing."""
        if self.policy.greedy:
            return None
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Round:
        """Read the prompt [N] and emit the first token.

        Raises:
            UserError: for a base model without a KV cache.
        """
        self.hidden, logits = self.target.read(prompt, last_only=True)
        self.target.check_cache(len(prompt))
        if self.policy.greedy:
            self.token = logits.argmax(-1)
        else:
            self.token = draw(self.policy.probabilities(logits), self.uniforms(1))
        return Round((int(self.token),))

    @torch.inference_mode()
    def advance(self, count: int) -> Round:
        """One round with draft length `count`."""
        length, uniforms = self.target.length, self.uniforms(2 * count + 1)
        with self._timed("draft"):
            proposal = self.draft(count, None if uniforms is None else uniforms[count + 1 :])
        with self._timed("target"):
            tokens = torch.cat([self.token, proposal.tokens])
            hidden, logits = self.target.read(tokens, tree=self.tree_arguments(length))
        if self.policy.greedy:
            result, rows = self._verify_greedy(count, proposal.tokens, logits)
        else:
            result, rows = self._verify_sampled(proposal, logits, uniforms[: count + 1])
        # The cache keeps the newest token before this round and the accepted drafts.
        self.target.keep(length, rows)
        self.hidden = hidden[rows[-1] : rows[-1] + 1]
        return result

    def draft(self, count: int, uniforms: Tensor | None) -> Proposal:
        """Draft `count` tokens after the newest one."""
        if not count:
            return Proposal(self.token[:0])
        return self.drafter.propose(self.hidden, self.token, uniforms, count)

    def tree_arguments(self, length: int) -> dict[str, Any] | None:
        """Mask and positions of the drafts; None for a chain."""
        return None

    def parents(self, count: int) -> Sequence[int]:
        """Parents of the draft nodes 1 … N, which verification walks; 0 is the newest token."""
        return range(count)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = self.clock()
        yield
        setattr(self.seconds, part, getattr(self.seconds, part) + self.clock() - start)

    def _verify_greedy(self, count: int, drafts: Tensor, logits: Tensor) -> tuple[Round, list[int]]:
        """The round, and the rows of what was read that stay in the cache."""
        best, size = logits.argmax(-1), len(drafts)
        tokens = torch.cat([drafts, best]).tolist()  # one transfer from the device
        path, last = verify_tree(self.parents(count), tokens[size:], tokens[:size])
        rows = [0, *path]
        self.token = best[rows[-1] : rows[-1] + 1]
        overlap = (1.0,) * len(path) + (0.0,) * (len(path) < count)
        return Round((*(tokens[node - 1] for node in path), last), count, len(path), overlap, size), rows

    def _verify_sampled(self, proposal: Proposal, logits: Tensor, uniforms: Tensor) -> tuple[Round, range]:
        """As `_verify_greedy`, for a chain above temperature 0."""
        drafts, count = proposal.tokens, len(proposal.tokens)
        verdict = verify(self.policy.probabilities(logits), proposal.probabilities, drafts, uniforms)
        # One transfer from the device for all that Python needs.
        values = torch.cat([verdict.accepted.view(1), verdict.token.view(1), drafts, verdict.overlap]).tolist()
        accepted, last, *tokens = (int(value) for value in values[: 2 + count])
        self.token = verdict.token.view(1)
        overlap = tuple(values[2 + count :][: accepted + 1])
        return Round((*tokens[:accepted], last), count, accepted, overlap, count), range(accepted + 1)


class TreeDraftAndVerify(DraftAndVerify):
    """Rounds that draft a tree, which the target reads in one forward pass. Greedy only.

    Args:
        target: entered by the caller.
        speculator: of any family that reads one hidden state.
        options: with the tree, which is cut near the target's position limit.

    Raises:
        UserError: for a base model that cannot read a tree.
    """

    def __init__(self, target: Target, speculator: Speculator, options: GenerationOptions) -> None:
        super().__init__(target, None, options)
        self.speculator, self.tree = speculator, options.draft_tree
        self._prepare(self.tree.depth)

    def _prepare(self, count: int) -> None:
        """Use the first `count` levels of the tree."""
        self.count = count
        self.tree_drafter = TreeDrafter(self.speculator, self.tree.cut(count)) if count else None
        self.attention = TreeAttention(self.target.base, self.parents(count))

    def parents(self, count: int) -> Sequence[int]:
        return self.tree_drafter.tree.parents if count else ()

    def draft(self, count: int, uniforms: Tensor | None) -> Proposal:
        if count != self.count:
            self._prepare(count)
        return Proposal(self.tree_drafter.propose(self.hidden, self.token) if count else self.token[:0])

    def tree_arguments(self, length: int) -> dict[str, Any] | None:
        return self.attention.arguments(length)
