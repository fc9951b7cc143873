"""A round: draft, one forward pass of the target, verification, and rollback of the rejected drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import Proposal, SpeculatorDrafter, TreeDrafter
from verl_speculator.decoding.options import GenerationOptions
from verl_speculator.decoding.target import Target, TreeAttention
from verl_speculator.decoding.verification import draw, verify, verify_tree


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
    """The state of one generation: the target's cache, the newest token, and what the drafter has not read yet: hidden
    states and the token after each.

    Args:
        target: entered by the caller.
        drafter: None for the target alone, whose rounds have no drafts; of a tree if the options have one.
        options: sampling policy, seed, and whether to measure drafting and the target's passes on an accelerator.

    Raises:
        UserError: for a draft tree and a base model that cannot read one.
    """

    def __init__(
        self, target: Target, drafter: SpeculatorDrafter | TreeDrafter | None, options: GenerationOptions
    ) -> None:
        self.target, self.drafter, self.policy, self.tree = target, drafter, options, options.draft_tree
        self.attention = None if self.tree is None else TreeAttention(target.base, self.tree.parents)
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
        hidden, logits = self.target.read(prompt, last_only=True)
        self.target.check_cache(len(prompt))
        token = logits.argmax(-1) if self.policy.greedy else draw(self.policy.probabilities(logits), self.uniforms(1))
        self.hidden, self.tokens = hidden[:0], prompt[:0]
        self._keep(hidden, torch.cat([prompt[1:], token]))
        return Round((int(token),))

    def _keep(self, hidden: Tensor, tokens: Tensor) -> None:
        """Keep states [n, D] and the token after each [n] for the next draft; only the last unless the drafter reads
        the sequence."""
        if self.drafter is not None and self.drafter.reads_sequence:
            self.hidden, self.tokens = torch.cat([self.hidden, hidden]), torch.cat([self.tokens, tokens])
        else:
            self.hidden, self.tokens = hidden[-1:].clone(), tokens[-1:]

    @torch.inference_mode()
    def advance(self, count: int) -> Round:
        """One round with draft length `count`."""
        length, uniforms = self.target.length, self.uniforms(2 * count + 1)
        token = self.tokens[-1:]
        with self._timed("draft"):
            proposal = Proposal(token[:0])
            if count:
                draws = None if uniforms is None else uniforms[count + 1 :]
                proposal = self.drafter.propose(self.hidden, self.tokens, draws, count, length)
                self.hidden, self.tokens = self.hidden[:0], self.tokens[:0]
        with self._timed("target"):
            tree = None if self.tree is None else self.attention.arguments(length, len(proposal.tokens))
            hidden, logits = self.target.read(torch.cat([token, proposal.tokens]), tree=tree)
        if self.policy.greedy:
            result, rows = self._verify_greedy(count, proposal.tokens, logits)
        else:
            result, rows = self._verify_sampled(proposal, logits, uniforms[: count + 1])
        # The cache keeps the newest token before this round and the accepted drafts.
        self.target.keep(length, rows)
        self._keep(hidden[list(rows)], torch.tensor(result.tokens, device=self.device))
        return result

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = self.clock()
        yield
        setattr(self.seconds, part, getattr(self.seconds, part) + self.clock() - start)

    def _verify_greedy(self, count: int, drafts: Tensor, logits: Tensor) -> tuple[Round, list[int]]:
        """The round, and the rows of what was read that stay in the cache."""
        best, size = logits.argmax(-1), len(drafts)
        tokens = torch.cat([drafts, best]).tolist()  # one transfer from the device
        parents = range(size) if self.tree is None else self.tree.parents[:size]
        path, last = verify_tree(parents, tokens[size:], tokens[:size])
        rows = [0, *path]
        overlap = (1.0,) * len(path) + (0.0,) * (len(path) < count)
        return Round((*(tokens[node - 1] for node in path), last), count, len(path), overlap, size), rows

    def _verify_sampled(self, proposal: Proposal, logits: Tensor, uniforms: Tensor) -> tuple[Round, range]:
        """As `_verify_greedy`, for a chain above temperature 0."""
        drafts, count = proposal.tokens, len(proposal.tokens)
        verdict = verify(self.policy.probabilities(logits), proposal.probabilities, drafts, uniforms)
        # One transfer from the device for all that Python needs.
        values = torch.cat([verdict.accepted.view(1), verdict.token.view(1), drafts, verdict.overlap]).tolist()
        accepted, last, *tokens = (int(value) for value in values[: 2 + count])
        overlap = tuple(values[2 + count :][: accepted + 1])
        return Round((*tokens[:accepted], last), count, accepted, overlap, count), range(accepted + 1)
