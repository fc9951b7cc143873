"""A round: drafting, one call of the target, verification, and forgetting what was rejected."""

from __future__ import annotations

import abc
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.decoding.drafters import Drafter, SpeculatorDrafter, TreeDrafter
from verl_speculator.decoding.outputs import Seconds
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.self_speculative import EarlyExitDrafter, SharedTarget
from verl_speculator.decoding.target import Target
from verl_speculator.decoding.tree import DraftTree
from verl_speculator.decoding.tree_attention import TreeAttention
from verl_speculator.decoding.verification import draw, verify, verify_greedy, verify_tree
from verl_speculator.models import Speculator


class Outcome(NamedTuple):
    """What a round came to.

    Attributes:
        tokens: the accepted drafts and the token after them.
        accepted: number of those drafts.
        overlap: Σ_v min(p, q) at the drafts up to the first rejected one.
        nodes: number of drafts that the target read.
    """

    tokens: list[int]
    accepted: int
    overlap: tuple[float, ...]
    nodes: int


def wait_and_read() -> float:
    """The time once the accelerator has done all that it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


class DraftAndVerify(abc.ABC):
    """One generation's state: the target's cache, the newest token, and the hidden state before it."""

    def __init__(self, target: Target, policy: SamplingPolicy, generator: torch.Generator, *, time_parts: bool) -> None:
        self.target, self.policy, self.generator = target, policy, generator
        self.device = target.base.device
        self.seconds = Seconds()
        self.clock = wait_and_read if time_parts and self.device.type != "cpu" else time.perf_counter

    def uniforms(self, count: int) -> Tensor | None:
        """[count] in [0, 1) to draw with; None where nothing is drawn."""
        if self.policy.greedy:
            return None
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> int:
        """Read the prompt; the first token.

        Raises:
            UserError: for a base that keeps no KV cache.
        """
        self.hidden, logits = self.target.read(prompt, last_only=True)
        self.target.check_cache(len(prompt))
        if self.policy.greedy:
            self.token = logits.argmax(-1)
        else:
            self.token = draw(self.policy.probabilities(logits), self.uniforms(1))
        return int(self.token)

    @abc.abstractmethod
    def advance(self, count: int) -> Outcome:
        """A round of drafts that go `count` tokens ahead."""


class ChainDraftAndVerify(DraftAndVerify):
    """Each draft goes on from the one before.

    Args:
        drafter: None for the base alone, whose rounds have no drafts.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        policy: SamplingPolicy,
        generator: torch.Generator,
        *,
        time_parts: bool,
    ) -> None:
        super().__init__(target, policy, generator, time_parts=time_parts)
        self.drafter = drafter

    @torch.inference_mode()
    def advance(self, count: int) -> Outcome:
        """`DraftAndVerify.advance`"""
        begin, clock = self.target.length, self.clock
        uniforms = self.uniforms(2 * count + 1)
        start = clock()
        if count:
            draft_uniforms = None if uniforms is None else uniforms[count + 1 :]
            drafts, q = self.drafter.propose(self.hidden, self.token, draft_uniforms, count)
            inputs = torch.cat([self.token, drafts])
        else:
            drafts, q, inputs = self.token[:0], None, self.token
        drafted = clock()
        hidden, logits = self.target.read(inputs)
        read = clock()
        self.seconds.draft += drafted - start
        self.seconds.target += read - drafted
        if self.policy.greedy:
            best = logits.argmax(-1)
            flat = torch.cat([drafts, best]).tolist()
            tokens = flat[:count]
            accepted, last = verify_greedy(flat[count:], tokens)
            overlap = (1.0,) * accepted + (0.0,) * (accepted < count)
            self.token = best[accepted : accepted + 1]
        else:
            verdict = verify(self.policy.probabilities(logits), q, drafts, uniforms[: count + 1])
            # One transfer for everything that Python needs to know.
            facts = torch.cat([verdict.accepted.view(1), verdict.token.view(1), drafts, verdict.overlap]).tolist()
            accepted, last, tokens = int(facts[0]), int(facts[1]), [int(t) for t in facts[2 : 2 + count]]
            overlap = tuple(facts[2 + count :][: accepted + 1])
            self.token = verdict.token.view(1)
        # The target has read the newest token before this round, and the drafts; rejected ones are forgotten.
        self.target.roll_back(begin + 1 + accepted)
        self.hidden = hidden[accepted : accepted + 1]
        return Outcome([*tokens[:accepted], last], accepted, overlap, count)


class TreeDraftAndVerify(DraftAndVerify):
    """Drafts branch, and the target reads all branches at once. Greedy only.

    Args:
        speculator: what drafts.
        tree: to be drafted; less of it where the base's positions end.

    Raises:
        UserError: for a base that cannot read a tree.
    """

    def __init__(
        self, target: Target, speculator: Speculator, tree: DraftTree, generator: torch.Generator, *, time_parts: bool
    ) -> None:
        super().__init__(target, SamplingPolicy(), generator, time_parts=time_parts)
        self.speculator, self.tree = speculator, tree
        self._prepare(tree.depth)

    def _prepare(self, count: int) -> None:
        """Drafting and reading the tree's first `count` levels."""
        self.count = count
        self.drafter = TreeDrafter(self.speculator, self.tree.cut(count)) if count else None
        parents = self.drafter.tree.parents if count else ()
        self.parents, self.attention = parents, TreeAttention(self.target.base, parents)

    @torch.inference_mode()
    def advance(self, count: int) -> Outcome:
        """`DraftAndVerify.advance`"""
        if count != self.count:
            self._prepare(count)
        begin, clock, size = self.target.length, self.clock, len(self.parents)
        start = clock()
        drafts = self.drafter.propose(self.hidden, self.token) if count else self.token[:0]
        drafted = clock()
        hidden, logits = self.target.read(torch.cat([self.token, drafts]), arrangement=self.attention.arguments(begin))
        read = clock()
        self.seconds.draft += drafted - start
        self.seconds.target += read - drafted
        best = logits.argmax(-1)
        flat = torch.cat([drafts, best]).tolist()
        path, last = verify_tree(self.parents, flat[size:], flat[:size])
        place = path[-1] if path else 0
        # Of what the target has read, the newest token before this round and the accepted branch are kept.
        self.target.keep(begin, [0, *path])
        self.token, self.hidden = best[place : place + 1], hidden[place : place + 1]
        overlap = (1.0,) * len(path) + (0.0,) * (len(path) < count)
        return Outcome([*(flat[node - 1] for node in path), last], len(path), overlap, size)


def make_target_and_drafter(
    base: nn.Module, speculator: Speculator | None, policy: SamplingPolicy, *, sampled: bool
) -> tuple[Target, Drafter | None]:
    """The base as a target, and the drafter of a speculator: beside the base, or a part of it.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        speculator: of any family, None for the base alone.
        policy: of sampling, the same for both.
        sampled: draw the drafts; otherwise take the most likely tokens.

    Raises:
        UserError: for a base that does not go with it, or whose state cannot be rolled back.
    """
    if speculator is None:
        return Target(base), None
    if speculator.shared_blocks is None:
        return Target(base, speculator.hidden_state_source), SpeculatorDrafter(speculator, policy, sampled=sampled)
    target = SharedTarget(base, speculator)
    return target, EarlyExitDrafter(speculator, target, policy, sampled=sampled)
