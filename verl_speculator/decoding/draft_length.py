"""Draft length: how many tokens a round drafts, fixed or adaptive. Pure arithmetic; importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from verl_speculator.utils.errors import UserError
from verl_speculator.utils.options import Option

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


class FixedLength:
    """The same draft length in every round.

    Args:
        length: γ.
    """

    def __init__(self, length: int) -> None:
        self.most = length

    def choose(self) -> int:
        """Draft length of the next round."""
        return self.most

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from a round."""


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


def draft_length_policy(length: DraftLength, n_predict: int) -> FixedLength | AdaptiveLength:
    """The policy of a `draft_length` setting; None is n_predict."""
    return AdaptiveLength(n_predict) if length == AUTO else FixedLength(length or n_predict)
