"""Generation: prefill, then round after round until the text ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.decoding.draft_and_verify import DraftAndVerify, Round, Seconds
from verl_speculator.decoding.drafters import SpeculatorDrafter, TreeDrafter
from verl_speculator.decoding.options import AUTO, AdaptiveLength, GenerationOptions, SamplingPolicy, most_drafts
from verl_speculator.decoding.self_speculative import SelfSpeculativeTarget
from verl_speculator.decoding.target import Target, position_limit
from verl_speculator.models import Speculator
from verl_speculator.utils.settings import UserError

# Tokens decoded before a stop string's own length: byte-level tokens may form a character only together.
MARGIN = 8


@dataclass
class Generation:
    """A generation, finished or under way.

    Attributes:
        draft_length: the most drafts that a round can accept: γ, the bound of an adaptive length, the depth of a tree.
        tokens: the new tokens, end token included.
        rounds: the prefill, then every verification.
        seconds: wall time.
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
        """The rounds over which acceptance is measured: not the prefill, the last round, whose end the text decides, or
        rounds that the position limit shortened."""
        return [r for r in self.rounds[1:-1] if r.full_length]

    def _mean(self, name: str) -> float | None:
        values = [getattr(r, name) for r in self.counted]
        return sum(values) / len(values) if values else None

    @property
    def accepted(self) -> float | None:
        """E[accepted]: accepted drafts per counted round, None without one."""
        return self._mean("accepted")

    @property
    def drafted(self) -> float | None:
        """Drafts per counted round, a tree's depth; None without a round."""
        return self._mean("drafted")

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time of the rounds, None if there was no round."""
        return (len(self.tokens) - 1) / self.seconds.decode if len(self.rounds) > 1 else None


class Difference(NamedTuple):
    """Where two texts part.

    Attributes:
        position: index of the first token that differs.
        gap: between the logits of the two tokens, as the base model computes them in one pass. Where it is within the
            rounding of the dtype, the two are a tie that rounding decides.
    """

    position: int
    gap: float


@torch.inference_mode()
def first_difference(
    base: nn.Module, prompt: Sequence[int], left: Sequence[int], right: Sequence[int]
) -> Difference | None:
    """Where two greedy texts after the same prompt part, None if they are equal.

    Args:
        base: the base model of both.
        prompt: its tokens.
        left, right: the new tokens of each.
    """
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            ids = torch.tensor([[*prompt, *left[:position]]], device=base.device)
            logits = base(input_ids=ids, use_cache=False).logits[0, -1].float()
            return Difference(position, float((logits[a] - logits[b]).abs()))
    return None if len(left) == len(right) else Difference(min(len(left), len(right)), float("nan"))


class StopRule:
    """Cuts new tokens where the text ends.

    Args:
        eos_token_ids: tokens that end the text and are its last token.
        strings: strings that end the text; the token that completes one is the last.
        tokenizer: needed for strings.
        limit: the most tokens of the text.

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
        """The `new` tokens that belong to the text after the tokens `before`, and why it ends there: "stop", "length",
        or None if it continues."""
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
    """A generation under way: iterate for its rounds; `generation` holds the result so far.

    Close a stream that is not iterated to its end.

    Args:
        base, speculator, input_ids: as in `speculative_generate`.
        options: of the generation.

    Raises:
        UserError: as `speculative_generate`.
    """

    def __init__(
        self,
        base: nn.Module,
        speculator: Speculator | None,
        input_ids: Tensor | Sequence[int],
        options: GenerationOptions,
    ) -> None:
        options.check_speculator(speculator)
        if base.training:
            raise UserError("base: in training mode; expected a base in evaluation mode (base.eval())")
        prompt, limit, count = _prompt_tokens(input_ids, base.device), position_limit(base), options.max_new_tokens
        if limit is not None and len(prompt) >= limit:
            raise UserError(
                f"input_ids: {len(prompt)} tokens, the base has {limit} positions and needs one for the answer"
            )
        ends = base.generation_config.eos_token_id if options.eos_token_id is None else options.eos_token_id
        rule = StopRule(
            [ends] if isinstance(ends, int) else ends or (),
            [options.stop] if isinstance(options.stop, str) else options.stop,
            options.tokenizer,
            count if limit is None else min(count, limit - len(prompt)),
        )
        decoder = make_decoder(base, speculator, options)
        n_predict = 0 if speculator is None else speculator.n_predict
        most = most_drafts(options.draft_length, n_predict, options.draft_tree)
        lengths = AdaptiveLength(most) if options.draft_length == AUTO else None
        self.generation = Generation(most, seconds=decoder.seconds)
        self._rounds = self._run(decoder, prompt, rule, lengths, limit)

    def _run(
        self, decoder: DraftAndVerify, prompt: Tensor, rule: StopRule, lengths: AdaptiveLength | None, limit: int | None
    ) -> Iterator[Round]:
        generation, seconds = self.generation, decoder.seconds
        with decoder.target as target:
            start = time.perf_counter()
            result = decoder.prefill(prompt)
            seconds.prefill = time.perf_counter() - start
            while True:
                tokens, finish = rule.cut(generation.tokens, result.tokens)
                generation.tokens += tokens
                generation.rounds.append(replace(result, tokens=tuple(tokens), finish=finish))
                yield generation.rounds[-1]
                if finish:
                    return
                start = time.perf_counter()
                wanted = generation.draft_length if lengths is None else lengths.choose()
                # The target reads the newest token and the drafts; all of them need a position.
                count = wanted if limit is None else min(wanted, limit - target.length - 1)
                result = replace(decoder.advance(count), full_length=count == wanted)
                if lengths is not None:
                    lengths.observe(count, result.accepted)
                seconds.decode += time.perf_counter() - start

    def __next__(self) -> Round:
        return next(self._rounds)

    def close(self) -> None:
        """End the generation and remove the hooks from the base model."""
        self._rounds.close()


def make_decoder(base: nn.Module, speculator: Speculator | None, options: GenerationOptions) -> DraftAndVerify:
    """Target and drafter: the one place that knows that a draft may be a part of the target."""
    if speculator is None:
        return DraftAndVerify(Target(base), None, options)
    speculator.attach(base)
    if speculator.shared_layers is not None:
        shared = SelfSpeculativeTarget(base, speculator)
        drafter = SpeculatorDrafter(speculator, options, sampled=options.sampled_drafts, read=shared.read_ahead)
        return DraftAndVerify(shared, drafter, options)
    target = Target(base, speculator.hidden_state_source)
    if options.draft_tree is not None:
        return DraftAndVerify(target, TreeDrafter(speculator, options.draft_tree), options)
    return DraftAndVerify(target, SpeculatorDrafter(speculator, options, sampled=options.sampled_drafts), options)


def speculative_stream(
    base: nn.Module, speculator: Speculator | None, input_ids: Tensor | Sequence[int], **options: Any
) -> GenerationStream:
    """Generate text for one prompt, a round at a time. Arguments and errors are those of `speculative_generate`."""
    return GenerationStream(base, speculator, input_ids, GenerationOptions(**options))


def speculative_generate(
    base: nn.Module, speculator: Speculator | None, input_ids: Tensor | Sequence[int], **options: Any
) -> Generation:
    """Generate text for one prompt: the base model's own text in fewer of its forward passes.

    At temperature 0 the tokens are those of `base.generate(do_sample=False)`; above it every token has the
    distribution that the base model gives it under the sampling policy (Leviathan et al. 2023). Finite precision can
    change a near-tie between two tokens, because one pass over several tokens rounds differently from several passes.
    Penalties of the base model's generation configuration are not applied.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        speculator: trained for this base model; None for the base model alone.
        input_ids: [N] or [1, N] tokens of the prompt.
        options: the fields of `GenerationOptions`; `max_new_tokens` is required.

    Returns:
        The new tokens, every round, and the time spent.

    Raises:
        UserError: for an option out of range, a prompt that is empty or fills the position limit, a base model whose
            state cannot be rolled back, or a tree with a base model that cannot read one.
    """
    stream = speculative_stream(base, speculator, input_ids, **options)
    for _ in stream:
        pass
    return stream.generation


def _prompt_tokens(input_ids: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """[N] tokens on a device."""
    prompt = torch.as_tensor(input_ids, dtype=torch.long, device=device)
    if prompt.dim() == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.dim() != 1 or not len(prompt):
        raise UserError(f"input_ids: expected the tokens of one prompt, got a shape of {list(prompt.shape)}")
    return prompt


@contextmanager
def generation_settings(base: nn.Module, policy: SamplingPolicy, **settings: Any) -> Iterator[None]:
    """Make `base.generate` follow these settings only, within the context.

    `generate` takes what a call leaves open from the model's own generation configuration, which may hold penalties
    and so change the distribution. The configuration is replaced, and restored afterwards.

    Args:
        base: a Hugging Face causal language model.
        policy: of sampling.
        settings: of `GenerationConfig`.
    """
    from transformers import GenerationConfig

    if not policy.greedy:
        settings |= {"do_sample": True, **asdict(policy)}
    original, base.generation_config = base.generation_config, GenerationConfig(**settings)
    try:
        yield
    finally:
        base.generation_config = original
