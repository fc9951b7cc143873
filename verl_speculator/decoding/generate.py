"""The loop: prefill, then rounds of drafting, one call of the target, verification and rollback."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.decoding.draft import Drafter
from verl_speculator.decoding.pair import pair
from verl_speculator.decoding.policy import SamplingPolicy
from verl_speculator.decoding.sampling import draw
from verl_speculator.decoding.stop import StopRule
from verl_speculator.decoding.target import Target, position_limit
from verl_speculator.decoding.verification import verify, verify_greedy
from verl_speculator.errors import UserError
from verl_speculator.models import Speculator


@dataclass(frozen=True)
class Round:
    """One call of the target and what came of it. The first of a generation is the prefill, which verifies nothing.

    Attributes:
        tokens: what is emitted: the accepted drafts and the token after them, cut where the text ends.
        drafted: number of drafts that the target judged.
        accepted: how many of them it accepted, before anything was cut.
        overlap: Σ_v min(p, q) at the drafts up to the first rejected one.
        finish: why the text ends with this round: "stop" (end token or stop string), "length", or None.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    overlap: tuple[float, ...]
    finish: str | None


@dataclass
class Seconds:
    """Wall time of a generation, in seconds.

    Attributes:
        prefill: until the first token.
        decode: all rounds after it.
        draft: of these, the drafting.
        target: of these, the base's forward passes. On an accelerator draft and target are told apart only when asked
            (`time_parts`), since each mark waits for the device.
    """

    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0
    target: float = 0.0


@dataclass
class Generation:
    """A finished generation.

    Attributes:
        tokens: the new tokens, end token included.
        rounds: the prefill, then every verification.
        draft_length: γ.
        seconds: where the time went.
    """

    draft_length: int
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def finish(self) -> str:
        """ "stop" or "length"."""
        return self.rounds[-1].finish

    @property
    def counted(self) -> list[Round]:
        """The rounds that acceptance is measured over: neither the prefill nor the last round, whose end is no matter
        of acceptance, nor rounds that the base's last position made shorter."""
        return [r for r in self.rounds[1:-1] if r.drafted == self.draft_length]

    @property
    def accepted(self) -> float | None:
        """E[accepted]: accepted drafts per counted round, None without one."""
        counted = self.counted
        return sum(r.accepted for r in counted) / len(counted) if counted else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time of the rounds, None if there was no round."""
        return (len(self.tokens) - 1) / self.seconds.decode if len(self.rounds) > 1 else None


def wait_and_read() -> float:
    """The time once the accelerator has done all that it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


class _Decoding:
    """One generation's state: the target's cache, the newest token, and the hidden state before it."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        policy: SamplingPolicy,
        generator: torch.Generator,
        *,
        time_parts: bool,
    ) -> None:
        self.target, self.drafter, self.policy, self.generator = target, drafter, policy, generator
        self.device = target.base.device
        self.seconds = Seconds()
        self.clock = wait_and_read if time_parts and self.device.type != "cpu" else time.perf_counter

    def _uniforms(self, count: int) -> Tensor | None:
        if self.policy.greedy:
            return None
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> int:
        """Read the prompt; the first token."""
        self.hidden, logits = self.target.read(prompt, last_only=True)
        if self.policy.greedy:
            self.token = logits.argmax(-1)
        else:
            self.token = draw(self.policy.probabilities(logits), self._uniforms(1))
        return int(self.token)

    @torch.inference_mode()
    def advance(self, count: int) -> tuple[list[int], int, tuple[float, ...]]:
        """A round with `count` drafts: the tokens it gives, how many are drafts, and the overlaps."""
        begin, clock = self.target.length, self.clock
        uniforms = self._uniforms(2 * count + 1)
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
        return [*tokens[:accepted], last], accepted, overlap


class GenerationStream(Iterator[Round]):
    """A generation under way: iterate for its rounds; `generation` holds what there is so far.

    Made by `speculative_stream`. Ends by itself; a stream that is left earlier is closed with `close`.
    """

    def __init__(
        self, decoding: _Decoding, prompt: Tensor, rule: StopRule, draft_length: int, limit: int | None
    ) -> None:
        self.generation = Generation(draft_length, seconds=decoding.seconds)
        self._rounds = self._run(decoding, prompt, rule, draft_length, limit)

    def _run(
        self, decoding: _Decoding, prompt: Tensor, rule: StopRule, draft_length: int, limit: int | None
    ) -> Iterator[Round]:
        seconds = decoding.seconds
        with decoding.target as target:
            start = time.perf_counter()
            emitted, accepted, overlap, count = [decoding.prefill(prompt)], 0, (), 0
            seconds.prefill = time.perf_counter() - start
            while True:
                tokens, finish = rule.cut(self.generation.tokens, emitted)
                self.generation.tokens += tokens
                self.generation.rounds.append(Round(tuple(tokens), count, accepted, overlap, finish))
                yield self.generation.rounds[-1]
                if finish:
                    return
                start = time.perf_counter()
                # The base reads the newest token and the drafts, and has positions up to its limit.
                count = draft_length if limit is None else min(draft_length, limit - target.length - 1)
                emitted, accepted, overlap = decoding.advance(count)
                seconds.decode += time.perf_counter() - start

    def __next__(self) -> Round:
        return next(self._rounds)

    def close(self) -> None:
        """Stop here and let go of the base."""
        self._rounds.close()


def speculative_stream(
    base: nn.Module,
    speculator: Speculator | None,
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    draft_length: int | None = None,
    sampled_drafts: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Any = None,
    time_parts: bool = False,
) -> GenerationStream:
    """Generate text for one prompt, a round at a time. Arguments and errors are those of `speculative_generate`."""
    policy = SamplingPolicy(temperature, top_p, top_k)
    draft_length = _check_draft_length(speculator, draft_length)
    if base.training:
        raise UserError("base: in training mode; expected a base in evaluation mode (base.eval())")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected a number ≥ 1")
    prompt, limit = _prompt_of(input_ids, base.device), position_limit(base)
    if limit is not None and len(prompt) >= limit:
        raise UserError(f"input_ids: {len(prompt)} tokens, the base has {limit} positions and needs one for the answer")
    ends = base.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    rule = StopRule(
        [ends] if isinstance(ends, int) else ends or (),
        [stop] if isinstance(stop, str) else stop,
        tokenizer,
        max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)),
    )
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    target, drafter = pair(base, speculator, policy, sampled=sampled_drafts)
    decoding = _Decoding(target, drafter, policy, generator, time_parts=time_parts)
    return GenerationStream(decoding, prompt, rule, draft_length, limit)


def speculative_generate(
    base: nn.Module,
    speculator: Speculator | None,
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    draft_length: int | None = None,
    sampled_drafts: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Any = None,
    time_parts: bool = False,
) -> Generation:
    """Generate text for one prompt: what the base alone would say, in fewer of its forward passes.

    At temperature 0 the tokens are those of `base.generate(do_sample=False)`; otherwise every token has the
    distribution that the base gives it under the policy (Leviathan et al. 2023). Two things can differ in finite
    precision only: a near-tie between two tokens, since one pass over several tokens rounds otherwise than several
    passes. Penalties of the base's own generation configuration are not applied.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        speculator: a trained speculator of the same width and vocabulary; None for the base alone.
        input_ids: [N] or [1, N] tokens of the prompt.
        max_new_tokens: the most tokens to add. The base's last position ends the text too.
        temperature: 0 for greedy.
        top_p: share of the probability that is kept, in (0, 1].
        top_k: number of tokens kept, 0 for all.
        seed: of the draws; None for another text each time.
        draft_length: γ, drafts per round, at most the speculator's `n_predict`, which is the default.
        sampled_drafts: at a temperature above 0, draw the drafts from the speculator's distribution; False drafts
            its most likely token. Both are lossless.
        eos_token_id: tokens that end the text; None for those of the base's generation configuration.
        stop: strings that end the text. The token that completes one is the last.
        tokenizer: needed for `stop`.
        time_parts: on an accelerator, tell drafting and the base's passes apart, at the price of waiting for both.

    Returns:
        The new tokens, every round and where the time went.

    Raises:
        UserError: for a setting out of range, a prompt that is empty or as long as the base's limit, or a base whose
            state cannot be rolled back.
    """
    stream = speculative_stream(
        base,
        speculator,
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        draft_length=draft_length,
        sampled_drafts=sampled_drafts,
        eos_token_id=eos_token_id,
        stop=stop,
        tokenizer=tokenizer,
        time_parts=time_parts,
    )
    for _ in stream:
        pass
    return stream.generation


def _check_draft_length(speculator: Speculator | None, draft_length: int | None) -> int:
    """γ, checked."""
    if speculator is None:
        if draft_length:
            raise UserError(f"draft_length={draft_length}: there is no speculator to draft with")
        return 0
    if draft_length is None:
        return speculator.n_predict
    if not 1 <= draft_length <= speculator.n_predict:
        raise UserError(
            f"draft_length={draft_length}: expected 1 to {speculator.n_predict}, the speculator's n_predict"
        )
    return draft_length


def _prompt_of(input_ids: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """[N] tokens on the base's device."""
    prompt = torch.as_tensor(input_ids, dtype=torch.long, device=device)
    if prompt.dim() == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.dim() != 1 or not len(prompt):
        raise UserError(f"input_ids: expected the tokens of one prompt, got a shape of {list(prompt.shape)}")
    return prompt
