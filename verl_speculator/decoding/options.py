"""Options of a generation: sampling policy, draft length or draft tree, and the end. Importing it loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from verl_speculator.decoding.tree import DraftTree, check_tree_settings
from verl_speculator.utils.settings import Option, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from verl_speculator.models import Speculator


AUTO = "auto"
DraftLength = int | Literal["auto"] | None

# Cost of one more draft token, its step and its row in the target's pass, relative to a pass without it. A step reads
# little more than the speculator's head: at 128k tokens and width 4,096 one fifteenth of what an 8B base model reads.
# A constant, because measured times would make sampled texts depend on the machine.
STEP_COST = 0.1
# Weight of a round relative to the next one: the last ten rounds hold two thirds of the weight.
DECAY = 0.9
# Acceptance rate of the first depth before any round, and the weight, in rounds, of the assumption that a depth is
# accepted as often as the one before it.
FIRST_RATE, PRIOR_WEIGHT = 0.7, 1.0
# Below it, logits over temperature overflow float32, and only the most likely token is ever drawn.
LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class SamplingPolicy:
    """Temperature, then top-k, then top-p: the order of Hugging Face's `generate` and of vLLM.

    Attributes:
        temperature: 0 is greedy: always the most likely token.
        top_p: keep the most likely tokens whose probabilities together reach this; 1 keeps all.
        top_k: keep this many most likely tokens, and those that tie with the last; 0 keeps all.

    Raises:
        UserError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature}: expected a number ≥ 0")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy), or at least {LEAST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected a number in (0, 1]")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: expected a whole number ≥ 0 (0 keeps all tokens)")

    @property
    def greedy(self) -> bool:
        """Whether the temperature is 0."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] probabilities of logits [..., V], in float32 at least; one-hot for a greedy policy."""
        import torch

        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(stable=True)
            below = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            below[..., -1] = False  # rounding must not take the most likely token
            logits = logits.masked_fill(below.scatter(-1, order, below), -torch.inf)
        return logits.softmax(-1)


class AdaptiveLength:
    """The draft length that maximises the expected tokens per cost, estimated from past rounds.

    a_k is the rate at which depth k is accepted in rounds that reach it; older rounds weigh less, and a depth without
    recent rounds is assumed to be like the one before it, so a lowered length can rise again. With P_k = a_0 ⋯ a_k a
    round of γ drafts yields 1 + P_0 + … + P_{γ−1} expected tokens at the cost 1 + STEP_COST·γ. P_k decreases, so the
    best γ is the first at which one more draft does not raise the ratio.

    It depends on past rounds only: seeded texts are reproducible, and no distribution changes, because the length is
    independent of the draws to come.

    Args:
        most: the speculator's n_predict.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.reached = [0.0] * most
        self.accepted = [0.0] * most

    def chances(self) -> list[float]:
        """a_0 … a_{most−1}"""
        rates, rate = [], FIRST_RATE
        for accepted, reached in zip(self.accepted, self.reached, strict=True):
            rate = (accepted + PRIOR_WEIGHT * rate) / (reached + PRIOR_WEIGHT)
            rates.append(rate)
        return rates

    def choose(self) -> int:
        """Draft length of the next round, at least 1."""
        tokens, reach, length = 1.0, 1.0, 0
        for rate in self.chances():
            reach *= rate
            if length and reach * (1 + STEP_COST * length) <= STEP_COST * tokens:
                break
            tokens, length = tokens + reach, length + 1
        return length

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from a round."""
        for depth in range(self.most):
            reached = depth < min(drafted, accepted + 1)
            self.reached[depth] = self.reached[depth] * DECAY + reached
            self.accepted[depth] = self.accepted[depth] * DECAY + (reached and depth < accepted)


def read_length(text: str | None) -> DraftLength:
    """Parse a draft length of the command line.

    Raises:
        UserError: if it is neither a number nor `auto`.
    """
    if text is None or text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"draft_length={text}: expected a whole number ≥ 1, or {AUTO}") from None


DraftLengthOption = Annotated[
    DraftLength, Option("drafts per round, at most n_predict, or auto [n_predict]", parse=read_length)
]


def check_length(length: DraftLength, n_predict: int) -> None:
    """Raise a UserError if a speculator with this `n_predict` cannot draft so many tokens."""
    if length not in (None, AUTO) and (not isinstance(length, int) or not 1 <= length <= n_predict):
        raise UserError(f"draft_length={length}: expected 1 to {n_predict}, the speculator's n_predict")


def most_drafts(length: DraftLength, n_predict: int, tree: DraftTree | None = None) -> int:
    """The most drafts that a round can accept: of a tree, or of a `draft_length` setting; `n_predict` is the
    speculator's, 0 without one."""
    if tree is not None:
        return tree.depth
    return n_predict if length in (None, AUTO) else length


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingPolicy):
    """How a text is generated: the sampling policy, and

    Attributes:
        max_new_tokens: the most tokens to add. The base model's position limit ends the text too.
        seed: of the draws; None for a random one.
        draft_length: γ, drafts per round, up to the speculator's `n_predict`, the default; "auto" adapts it to the
            acceptance in the rounds before.
        draft_tree: draft a tree (`decoding.tree.read_tree`) instead of a chain. Temperature 0 only.
        sampled_drafts: above temperature 0, draw the drafts from the speculator's distribution; False takes its most
            likely tokens. Both are lossless.
        eos_token_id: tokens that end the text; None for those of the base model's generation configuration.
        stop: strings that end the text. The token that completes one is the last.
        tokenizer: needed for `stop`.
        time_parts: on an accelerator, measure drafting and the target's passes separately, which waits for both.

    Raises:
        UserError: for a value out of range.
    """

    max_new_tokens: int
    seed: int | None = None
    draft_length: DraftLength = None
    draft_tree: DraftTree | None = None
    sampled_drafts: bool = True
    eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str] = ()
    tokenizer: Any = None
    time_parts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_tree is not None:
            check_tree_settings(self.draft_length, self.temperature)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected a number ≥ 1")

    def check_speculator(self, speculator: Speculator | None) -> None:
        """Raise a UserError if the speculator, or the lack of one, does not fit the draft settings."""
        if speculator is None:
            if self.draft_length or self.draft_tree is not None:
                setting = f"draft_length={self.draft_length}" if self.draft_length else "draft_tree"
                raise UserError(f"{setting}: there is no speculator to draft with")
            return
        check_length(self.draft_length, speculator.n_predict)
        if self.draft_tree is not None:
            self.draft_tree.check(speculator.config, speculator.vocab_size)
