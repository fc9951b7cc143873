"""What a generation gave, round by round, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Round:
    """One call of the target and what came of it. The first of a generation is the prefill, which verifies nothing.

    Attributes:
        tokens: what is emitted: the accepted drafts and the token after them, cut where the text ends.
        drafted: number of drafts that could be accepted: the length of a chain, the depth of a tree.
        accepted: how many of them the target accepted, before anything was cut.
        overlap: Σ_v min(p, q) at the drafts up to the first rejected one.
        finish: why the text ends with this round: "stop" (end token or stop string), "length", or None.
        nodes: number of drafts that the target read: more than `drafted` in a tree.
        whole: whether as much was drafted as was meant to be; the base's last position may leave less room.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    overlap: tuple[float, ...]
    finish: str | None
    nodes: int
    whole: bool


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
        draft_length: γ, the most that a round accepts: for a length that adapts its bound, for a tree its depth.
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
        return [r for r in self.rounds[1:-1] if r.whole]

    @property
    def accepted(self) -> float | None:
        """E[accepted]: accepted drafts per counted round, None without one."""
        return self._mean([r.accepted for r in self.counted])

    @property
    def drafted(self) -> float | None:
        """Drafts per counted round, a tree's by its depth; None without a round."""
        return self._mean([r.drafted for r in self.counted])

    @property
    def nodes(self) -> float | None:
        """Drafts that the base read per counted round, None without one."""
        return self._mean([r.nodes for r in self.counted])

    @staticmethod
    def _mean(numbers: list[int]) -> float | None:
        return sum(numbers) / len(numbers) if numbers else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time of the rounds, None if there was no round."""
        return (len(self.tokens) - 1) / self.seconds.decode if len(self.rounds) > 1 else None
