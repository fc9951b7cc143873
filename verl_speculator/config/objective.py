"""What is minimised: a weighted mix of losses, and a weight for each depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_speculator.utils.errors import UserError, nearest

LOSSES = ("ce", "kl", "tv", "lk", "lk_pure")
# η of the hybrid for speculators that read tokens (arXiv 2602.23881).
LK_ETA = 3.0
# How a pair may be weighed by α, the chance of each draft of its row to be accepted.
PAIR_WEIGHTS = ("reach", "gain")


@dataclass(frozen=True)
class Objective:
    """A mix of losses.

    Attributes:
        weights: of each loss that takes part; none negative, not all zero.
        kl_temperature: T of `kl`.
        lk_eta: η of `lk`; what a family has by default is in its row of `FAMILIES`.
        depth_weights: of each depth; None weighs all alike.
        pair_weights: weigh each pair besides by the row's α, taken as constants: "reach" by the probability that a
            drafter gets to it, Π_{j<k} α_j; "gain" by what its α adds to the row's expected accepted length,
            ∂/∂α_k Σ_i Π_{j≤i} α_j = Π_{j<k} α_j · (1 + α_{k+1} + α_{k+1} α_{k+2} + …). α is Σ_v min(p, q) where the
            loss compares with the base, and q(target) where it does not.

    Raises:
        UserError: naming the setting.
    """

    weights: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    kl_temperature: float = 1.0
    lk_eta: float = LK_ETA
    depth_weights: tuple[float, ...] | None = None
    pair_weights: str | None = None

    @classmethod
    def parse(cls, loss: str | Mapping[str, Any] = "ce", *, prefix: str = "", **more: Any) -> Objective:
        """From `loss` as it is written in a configuration: a name, or weights by name.

        Args:
            loss: such as "kl" or {"ce": 0.1, "kl": 1.0}.
            prefix: of the settings' names in errors.
            more: the other attributes; `depth_weights` may also be one of `PAIR_WEIGHTS`.
        """
        named = {loss: 1.0} if isinstance(loss, str) else loss
        if not isinstance(named, Mapping) or not named:
            raise UserError(
                f"{prefix}loss={loss}: expected one of {', '.join(LOSSES)}, or weights such as {{ce: 0.1, kl: 1}}"
            )
        for name, weight in named.items():
            if name not in LOSSES:
                raise UserError(
                    f"{prefix}loss={loss}: {name} is no loss{nearest(str(name), LOSSES)}; expected one of "
                    f"{', '.join(LOSSES)}, or weights such as {{ce: 0.1, kl: 1}}"
                )
            if not is_number(weight) or weight < 0:
                raise UserError(f"{prefix}loss.{name}={weight}: expected a weight ≥ 0")
        if not any(named.values()):
            raise UserError(f"{prefix}loss={dict(named)}: all weights are 0, expected one above")
        weights = tuple((name, float(weight)) for name, weight in named.items() if weight)
        made = {name: value for name, value in more.items() if value is not None}
        for name in ("kl_temperature", "lk_eta"):
            if name in made and not (is_number(made[name]) and made[name] > 0):
                raise UserError(f"{prefix}{name}={made[name]}: expected a number > 0")
        if made.get("depth_weights") in PAIR_WEIGHTS:
            made["pair_weights"] = made.pop("depth_weights")
        elif (depths := made.get("depth_weights")) is not None:
            if isinstance(depths, str) or not all(is_number(w) and w >= 0 for w in depths) or not any(depths):
                raise UserError(
                    f"{prefix}depth_weights={depths}: expected numbers ≥ 0, one of them above, or "
                    + " or ".join(PAIR_WEIGHTS)
                )
            made["depth_weights"] = tuple(map(float, depths))
        return cls(weights, **made)

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the base's distribution."""
        return bool(self.temperatures)

    @property
    def temperatures(self) -> frozenset[float]:
        """Temperatures at which it asks for the base's distribution."""
        found = {self.kl_temperature if name == "kl" else 1.0 for name, _ in self.weights if name != "ce"}
        return frozenset(found | {1.0} if found and self.pair_weights else found)

    @property
    def weights_of_depths(self) -> str | list[float]:
        """The depth weights as a checkpoint records them: "equal", a name of `PAIR_WEIGHTS`, or the numbers."""
        if self.pair_weights:
            return self.pair_weights
        return "equal" if self.depth_weights is None else list(self.depth_weights)

    def depths(self, count: int, *, prefix: str = "") -> Sequence[float]:
        """The weight of each of `count` depths.

        Raises:
            UserError: if there are weights for another number of depths.
        """
        if self.depth_weights is None:
            return (1.0,) * count
        if len(self.depth_weights) != count:
            raise UserError(
                f"{prefix}depth_weights={list(self.depth_weights)}: expected {count} numbers, one for each depth"
            )
        return self.depth_weights


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
