"""The training objective: a weighted sum of losses, and a weight for each depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_speculator.utils.settings import UserError, nearest

LOSSES = ("ce", "kl", "tv", "lk", "lk_pure")
LOSS_FORMS = f"one of {', '.join(LOSSES)}, or weights such as {{ce: 0.1, kl: 1}}"
# η of the hybrid for speculators that read tokens (arXiv 2602.23881).
LK_ETA = 3.0
# Weights of pairs that are computed from α, the acceptance probability of each draft token.
PAIR_WEIGHTS = ("reach", "gain")


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses.

    Attributes:
        weights: (loss, weight) of each loss with a weight above 0.
        kl_temperature: T of `kl`.
        lk_eta: η of `lk`. The default of each family is in `FAMILIES`.
        depth_weights: weight of each depth; None weighs all alike.
        pair_weights: weight of each pair of row and depth, computed from the row's α and treated as a constant:
            "reach" is the probability that drafting gets there, Π_{j<k} α_j; "gain" is the derivative of the expected
            number of accepted tokens, ∂/∂α_k Σ_i Π_{j≤i} α_j = Π_{j<k} α_j · (1 + α_{k+1} + α_{k+1} α_{k+2} + …).
            α is Σ_v min(p, q) if a loss compares with the base model's distribution, else q(target).
    """

    weights: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    kl_temperature: float = 1.0
    lk_eta: float = LK_ETA
    depth_weights: tuple[float, ...] | None = None
    pair_weights: str | None = None

    @classmethod
    def parse(
        cls,
        loss: str | Mapping[str, Any] = "ce",
        *,
        kl_temperature: float = 1.0,
        lk_eta: float | None = None,
        depth_weights: Sequence[float] | str | None = None,
        prefix: str = "",
    ) -> Objective:
        """Make an objective from values as they are written in a configuration.

        `loss` is a name such as "kl", or weights by name such as {"ce": 0.1, "kl": 1.0}; `lk_eta=None` is `LK_ETA`;
        `depth_weights` is a number for each depth, or one of `PAIR_WEIGHTS`.

        Raises:
            UserError: naming the setting, after `prefix`.
        """
        lk_eta = LK_ETA if lk_eta is None else lk_eta
        for name, value in (("kl_temperature", kl_temperature), ("lk_eta", lk_eta)):
            if not (_is_number(value) and value > 0):
                raise UserError(f"{prefix}{name}={value}: expected a number > 0")
        weights = _parse_weights(loss, prefix)
        if depth_weights in PAIR_WEIGHTS:
            return cls(weights, kl_temperature, lk_eta, pair_weights=depth_weights)
        if depth_weights is not None:
            is_list = isinstance(depth_weights, Sequence) and not isinstance(depth_weights, str)
            if not is_list or not all(_is_number(w) and w >= 0 for w in depth_weights) or not any(depth_weights):
                expected = f"numbers ≥ 0, one of them above, or {' or '.join(PAIR_WEIGHTS)}"
                raise UserError(f"{prefix}depth_weights={depth_weights}: expected {expected}")
            depth_weights = tuple(map(float, depth_weights))
        return cls(weights, kl_temperature, lk_eta, depth_weights)

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the base model's distribution."""
        return bool(self.temperatures)

    @property
    def temperatures(self) -> frozenset[float]:
        """Temperatures at which it needs the base model's distribution."""
        temperatures = {self.kl_temperature if name == "kl" else 1.0 for name, _ in self.weights if name != "ce"}
        return frozenset(temperatures | {1.0} if temperatures and self.pair_weights else temperatures)

    @property
    def weights_of_depths(self) -> str | list[float]:
        """The depth weights as a checkpoint records them: "equal", a name of `PAIR_WEIGHTS`, or the numbers."""
        if self.pair_weights:
            return self.pair_weights
        return "equal" if self.depth_weights is None else list(self.depth_weights)

    @property
    def provenance(self) -> dict[str, Any]:
        """The part of a checkpoint's provenance that describes it."""
        depth_weights = self.weights_of_depths
        return {"loss": dict(self.weights), "kl_temperature": self.kl_temperature, "depth_weights": depth_weights}

    def depths(self, count: int, *, prefix: str = "") -> Sequence[float]:
        """The weight of each of `count` depths.

        Raises:
            UserError: if there are weights for another number of depths.
        """
        if self.depth_weights is None:
            return (1.0,) * count
        if len(self.depth_weights) != count:
            expected = f"expected {count} numbers, one for each depth"
            raise UserError(f"{prefix}depth_weights={list(self.depth_weights)}: {expected}")
        return self.depth_weights


def _parse_weights(loss: Any, prefix: str) -> tuple[tuple[str, float], ...]:
    weights = {loss: 1.0} if isinstance(loss, str) else loss
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{prefix}loss={loss}: expected {LOSS_FORMS}")
    for name, weight in weights.items():
        if name not in LOSSES:
            hint = nearest(str(name), LOSSES)
            raise UserError(f"{prefix}loss={loss}: {name} is no loss{hint}; expected {LOSS_FORMS}")
        if not _is_number(weight) or weight < 0:
            raise UserError(f"{prefix}loss.{name}={weight}: expected a weight ≥ 0")
    if not any(weights.values()):
        raise UserError(f"{prefix}loss={dict(weights)}: all weights are 0, expected one above")
    return tuple((name, float(weight)) for name, weight in weights.items() if weight)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
