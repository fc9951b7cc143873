"""How many tokens a round drafts: always as many, or as many as pay. Pure arithmetic; importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from verl_speculator.utils.errors import UserError
from verl_speculator.utils.options import Option

AUTO = "auto"
DraftLength = int | Literal["auto"] | None

# What one more draft costs, its step and its place in the target's pass, as a share of a pass without it. A step reads
# little more than the speculator's head: for 128k tokens and a width of 4,096 a fifteenth of what a base of 8 billion
# parameters reads. A constant, since a clock would make sampled texts depend on the machine.
STEP_COST = 0.1
# What a round leaves of the weight of those before it: the last ten count for two thirds.
DECAY = 0.9
# The first depth's chance before anything is known, and how many rounds' worth a depth is assumed to be like the one
# before it.
FIRST_CHANCE, ASSUMED = 0.7, 1.0


class Lengths(Protocol):
    """What a round's draft length is asked of."""

    most: int

    def choose(self) -> int:
        """Drafts of the next round."""
        ...

    def observe(self, drafted: int, accepted: int) -> None:
        """What the last round came to."""
        ...


class FixedLength:
    """Always as many.

    Args:
        length: γ.
    """

    def __init__(self, length: int) -> None:
        self.most = length

    def choose(self) -> int:
        """`Lengths.choose`"""
        return self.most

    def observe(self, drafted: int, accepted: int) -> None:
        """`Lengths.observe`: nothing to learn."""


class AdaptiveLength:
    """As many as give the most tokens for their cost, by what was accepted lately.

    The chance a_k that the draft at depth k is accepted once all before it were is estimated from the rounds that got
    there, older ones weighing less. A depth that no round has reached lately is taken to be like the one before it, so
    that a length that was lowered can rise again. With P_k = a_0 ⋯ a_k a round of γ drafts is expected to give
    1 + P_0 + … + P_{γ−1} tokens for the cost 1 + STEP_COST·γ. The P_k fall, so that the best γ is where one more draft
    no longer raises the ratio.

    It is a function of the rounds before, and of no clock: a seeded text stays the same, and a length that does not
    know the draws to come changes no distribution.

    Args:
        most: the speculator's n_predict.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.reached = [0.0] * most
        self.accepted = [0.0] * most

    def chances(self) -> list[float]:
        """a_0 … a_{most−1}"""
        found, before = [], FIRST_CHANCE
        for accepted, reached in zip(self.accepted, self.reached, strict=True):
            before = (accepted + ASSUMED * before) / (reached + ASSUMED)
            found.append(before)
        return found

    def choose(self) -> int:
        """`Lengths.choose`: 1 at least."""
        tokens, reach, length = 1.0, 1.0, 0
        for chance in self.chances():
            reach *= chance
            if length and reach * (1 + STEP_COST * length) <= STEP_COST * tokens:
                break
            tokens, length = tokens + reach, length + 1
        return length

    def observe(self, drafted: int, accepted: int) -> None:
        """`Lengths.observe`"""
        for depth in range(self.most):
            self.reached[depth] *= DECAY
            self.accepted[depth] *= DECAY
        for depth in range(min(drafted, accepted + 1)):
            self.reached[depth] += 1
            self.accepted[depth] += depth < accepted


def read_length(text: str | None) -> DraftLength:
    """A draft length as it stands on a command line.

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
    """Whether a speculator drafts so many.

    Raises:
        UserError: if it does not.
    """
    if length not in (None, AUTO) and (not isinstance(length, int) or not 1 <= length <= n_predict):
        raise UserError(f"draft_length={length}: expected 1 to {n_predict}, the speculator's n_predict")


def draft_length_policy(length: DraftLength, n_predict: int) -> Lengths:
    """The policy that a draft length names; None is n_predict."""
    return AdaptiveLength(n_predict) if length == AUTO else FixedLength(length or n_predict)
