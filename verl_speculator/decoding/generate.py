"""The loop: prefill, then round after round until the text ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.decoding.draft_and_verify import (
    ChainDraftAndVerify,
    DraftAndVerify,
    Outcome,
    TreeDraftAndVerify,
    make_target_and_drafter,
)
from verl_speculator.decoding.draft_length import DraftLength, FixedLength, Lengths, check_length, draft_length_policy
from verl_speculator.decoding.outputs import Generation, Round
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.target import Target, position_limit
from verl_speculator.decoding.tree import DraftTree, check_beside
from verl_speculator.models import Speculator
from verl_speculator.utils.errors import UserError

# Tokens that a stop string may begin before: enough for byte-level tokens that only together make one character.
MARGIN = 8


class StopRule:
    """Cuts new tokens where the text ends.

    Args:
        eos_token_ids: tokens that end the text; they are its last token.
        strings: texts that end it; the token that completes one is its last.
        tokenizer: needed for strings.
        limit: number of tokens at which it ends anyway.

    Raises:
        UserError: for strings without a tokenizer, or an empty string.
    """

    def __init__(self, eos_token_ids: Sequence[int], strings: Sequence[str], tokenizer: Any, limit: int) -> None:
        if strings and tokenizer is None:
            raise UserError("stop: stop strings need a tokenizer")
        if not all(strings):
            raise UserError("stop='': expected a text of at least one character")
        self.ends = frozenset(eos_token_ids)
        self.strings, self.tokenizer, self.limit = tuple(strings), tokenizer, limit
        self.window = max((len(s.encode()) for s in strings), default=0) + MARGIN

    def cut(self, before: Sequence[int], new: Sequence[int]) -> tuple[list[int], str | None]:
        """Those of the `new` tokens that belong to the text after the `before` ones, and why it ends there: "stop",
        "length", or None if it goes on."""
        for i, token in enumerate(new):
            if token in self.ends or (self.strings and self._completes(before, new[: i + 1])):
                return list(new[: i + 1]), "stop"
            if len(before) + i + 1 >= self.limit:
                return list(new[: i + 1]), "length"
        return list(new), None

    def _completes(self, before: Sequence[int], new: Sequence[int]) -> bool:
        text = self.tokenizer.decode([*before[-self.window :], *new])
        return any(string in text for string in self.strings)


class GenerationStream(Iterator[Round]):
    """A generation under way: iterate for its rounds; `generation` holds what there is so far.

    Made by `speculative_stream`. Ends by itself; a stream that is left earlier is closed with `close`.
    """

    def __init__(
        self, rounds: DraftAndVerify, prompt: Tensor, rule: StopRule, lengths: Lengths, limit: int | None
    ) -> None:
        self.generation = Generation(lengths.most, seconds=rounds.seconds)
        self._rounds = self._run(rounds, prompt, rule, lengths, limit)

    def _run(
        self, rounds: DraftAndVerify, prompt: Tensor, rule: StopRule, lengths: Lengths, limit: int | None
    ) -> Iterator[Round]:
        done, seconds = self.generation, rounds.seconds
        with rounds.target as target:
            start = time.perf_counter()
            outcome, meant, count = Outcome([rounds.prefill(prompt)], 0, (), 0), 0, 0
            seconds.prefill = time.perf_counter() - start
            while True:
                tokens, finish = rule.cut(done.tokens, outcome.tokens)
                done.tokens += tokens
                facts = (count, outcome.accepted, outcome.overlap, finish, outcome.nodes, count == meant)
                done.rounds.append(Round(tuple(tokens), *facts))
                yield done.rounds[-1]
                if finish:
                    return
                start = time.perf_counter()
                meant = lengths.choose()
                # The base reads the newest token and the drafts, and has positions up to its limit.
                count = meant if limit is None else min(meant, limit - target.length - 1)
                outcome = rounds.advance(count)
                lengths.observe(count, outcome.accepted)
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
    draft_length: DraftLength = None,
    draft_tree: DraftTree | None = None,
    sampled_drafts: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Any = None,
    time_parts: bool = False,
) -> GenerationStream:
    """Generate text for one prompt, a round at a time. Arguments and errors are those of `speculative_generate`."""
    policy = SamplingPolicy(temperature, top_p, top_k)
    _check_drafts(speculator, policy, draft_length, draft_tree)
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
    if draft_tree is not None:
        rounds = TreeDraftAndVerify(
            Target(base, speculator.hidden_state_source), speculator, draft_tree, generator, time_parts=time_parts
        )
        return GenerationStream(rounds, prompt, rule, FixedLength(draft_tree.depth), limit)
    target, drafter = make_target_and_drafter(base, speculator, policy, sampled=sampled_drafts)
    lengths = FixedLength(0) if speculator is None else draft_length_policy(draft_length, speculator.n_predict)
    rounds = ChainDraftAndVerify(target, drafter, policy, generator, time_parts=time_parts)
    return GenerationStream(rounds, prompt, rule, lengths, limit)


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
    draft_length: DraftLength = None,
    draft_tree: DraftTree | None = None,
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
        draft_length: γ, drafts per round, at most the speculator's `n_predict`, which is the default; "auto" for as
            many as pay, by what was accepted in the rounds before.
        draft_tree: draft a tree (`decoding.tree.read_tree`) instead of a chain. At temperature 0 alone.
        sampled_drafts: at a temperature above 0, draw the drafts from the speculator's distribution; False drafts
            its most likely token. Both are lossless.
        eos_token_id: tokens that end the text; None for those of the base's generation configuration.
        stop: strings that end the text. The token that completes one is the last.
        tokenizer: needed for `stop`.
        time_parts: on an accelerator, tell drafting and the base's passes apart, at the price of waiting for both.

    Returns:
        The new tokens, every round and where the time went.

    Raises:
        UserError: for a setting out of range, a prompt that is empty or as long as the base's limit, a base whose state
            cannot be rolled back, or a tree with a base that cannot read one.
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
        draft_tree=draft_tree,
        sampled_drafts=sampled_drafts,
        eos_token_id=eos_token_id,
        stop=stop,
        tokenizer=tokenizer,
        time_parts=time_parts,
    )
    for _ in stream:
        pass
    return stream.generation


def _check_drafts(
    speculator: Speculator | None, policy: SamplingPolicy, draft_length: DraftLength, draft_tree: DraftTree | None
) -> None:
    """Whether there is something to draft with, and what is asked for goes together."""
    if draft_tree is not None:
        check_beside(draft_length, policy.temperature)
    if speculator is None:
        asked = f"draft_length={draft_length}" if draft_length else "draft_tree"
        if draft_length or draft_tree is not None:
            raise UserError(f"{asked}: there is no speculator to draft with")
        return
    check_length(draft_length, speculator.n_predict)
    if draft_tree is not None:
        draft_tree.check(speculator.config, speculator.vocab_size)


def _prompt_of(input_ids: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """[N] tokens on the base's device."""
    prompt = torch.as_tensor(input_ids, dtype=torch.long, device=device)
    if prompt.dim() == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.dim() != 1 or not len(prompt):
        raise UserError(f"input_ids: expected the tokens of one prompt, got a shape of {list(prompt.shape)}")
    return prompt


@contextmanager
def generation_settings(base: nn.Module, policy: SamplingPolicy, **settings: Any) -> Iterator[None]:
    """While the block lasts `base.generate` follows these settings alone.

    `generate` takes what a call leaves open from the base's own configuration, which may hold penalties: another
    distribution. So that is replaced, and put back.

    Args:
        base: a Hugging Face causal language model.
        policy: of sampling.
        settings: of `GenerationConfig`.
    """
    from transformers import GenerationConfig

    if not policy.greedy:
        settings |= {"do_sample": True, "temperature": policy.temperature}
        settings |= {"top_p": policy.top_p, "top_k": policy.top_k}
    own, base.generation_config = base.generation_config, GenerationConfig(**settings)
    try:
        yield
    finally:
        base.generation_config = own
