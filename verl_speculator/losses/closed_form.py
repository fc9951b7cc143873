"""The same losses with their gradients in closed form, on one block of logits that is overwritten.

Shapes: R rows, V vocabulary. With q = softmax(z) and the base's p:

    ce     ∂/∂z = q − onehot(target)
    kl     ∂/∂z = T (q_T − p_T)
    α      ∂/∂z = q ⊙ (1[q < p] − Σ_v q 1[q < p]),   tv = 1 − α,  lk_pure = −log α
    lk     λ · kl + (1 − λ) · tv with λ as a constant

So every mix is  a ⊙ q − b ⊙ p + s ⊙ (q 1[q < p]) − c onehot(target)  with numbers a, b, s of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from verl_speculator.objective import Objective


class Distribution(NamedTuple):
    """What the base says.

    Attributes:
        p: [R, V] probabilities.
        negentropy: [R] Σ_v p log p.
    """

    p: Tensor
    negentropy: Tensor

    def rows(self, index: Tensor) -> Distribution:
        """Some of its rows."""
        return Distribution(self.p[index], self.negentropy[index])


Teacher = Mapping[float, Distribution]


class Block(NamedTuple):
    """What comes of a block of logits.

    Attributes:
        loss: [R]
        gradient: [R, V] in the place of the logits.
        acceptance: [R] α, if the objective weighs pairs by it.
    """

    loss: Tensor
    gradient: Tensor
    acceptance: Tensor | None


def teach(logits: Tensor, objective: Objective) -> Teacher:
    """The base's distribution at each temperature that the objective asks for.

    Args:
        logits: [R, V] the base's, in float32 or wider.
        objective: what is minimised.
    """
    found = {}
    for temperature in sorted(objective.temperatures, reverse=True):
        log_p = logits.div(temperature).log_softmax(-1) if temperature != 1 else logits.log_softmax(-1)
        p = log_p.exp()
        found[temperature] = Distribution(p, _dot(p, log_p))
    return found


def loss_and_gradient_(logits: Tensor, targets: Tensor, teacher: Teacher, objective: Objective) -> Block:
    """The loss of each row and its gradient.

    Args:
        logits: [R, V] in float32 or wider; overwritten.
        targets: [R] token ids.
        teacher: what `teach` gives for the same rows; empty for an objective that does not compare with the base.
        objective: what is minimised.
    """
    weights = dict(objective.weights)
    loss = logits.new_zeros(logits.shape[0])
    softened = None
    if objective.kl_temperature != 1 and "kl" in weights:
        value, softened = _softened_kl(logits, teacher[objective.kl_temperature], objective.kl_temperature)
        weight = weights.pop("kl")
        loss, softened = loss + weight * value, softened.mul_(weight)

    ce, column = weights.pop("ce", 0.0), targets.unsqueeze(-1)
    normaliser = logits.logsumexp(-1, keepdim=True)
    if ce:
        loss = loss + ce * (normaliser - logits.gather(-1, column)).squeeze(-1)
    if weights:
        p, negentropy = teacher[1.0]
        divergence = negentropy - _dot(p, logits) + normaliser.squeeze(-1)
    gradient = logits.sub_(normaliser).exp_()  # q
    alpha = None
    if weights.keys() - {"kl"} or (objective.pair_weights and teacher):
        alpha = torch.minimum(teacher[1.0].p, gradient).sum(-1)
    elif objective.pair_weights:
        alpha = gradient.gather(-1, column).squeeze(-1)
    if not weights:
        gradient = gradient if ce == 1 else gradient.mul_(ce)
    else:
        share = torch.full_like(loss, weights.get("kl", 0.0))
        rising = slope = None
        if weights.keys() - {"kl"}:
            added, share, slope = _acceptance(alpha, weights, objective.lk_eta, share)
            loss = loss + added
            rising = torch.where(gradient < p, gradient, 0)
        loss = loss + share * divergence
        of_q = share + ce
        if rising is not None:
            of_q = of_q - slope * rising.sum(-1)
        gradient.mul_(of_q.unsqueeze(-1)).addcmul_(p, share.unsqueeze(-1), value=-1)
        if rising is not None:
            gradient.addcmul_(rising, slope.unsqueeze(-1))
    if ce:
        gradient.scatter_add_(-1, column, gradient.new_full(column.shape, -ce))
    gradient = gradient if softened is None else gradient.add_(softened)
    return Block(loss, gradient, alpha if objective.pair_weights else None)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[R] the product of each row with its own, without a block of products."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _softened_kl(logits: Tensor, teacher: Distribution, temperature: float) -> tuple[Tensor, Tensor]:
    """[R] T²·KL of the distributions at temperature T, and its gradient [R, V]."""
    z = logits / temperature
    normaliser = z.logsumexp(-1, keepdim=True)
    value = temperature**2 * (teacher.negentropy - _dot(teacher.p, z) + normaliser.squeeze(-1))
    return value, z.sub_(normaliser).exp_().sub_(teacher.p).mul_(temperature)


def _acceptance(
    alpha: Tensor, weights: Mapping[str, float], eta: float, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[R] the part of tv, lk and lk_pure that is no divergence; each row's weight of the divergence, `share` and what
    lk adds to it; and ∂loss/∂α."""
    loss, slope = torch.zeros_like(alpha), torch.zeros_like(alpha)
    if weight := weights.get("tv"):
        loss = loss + weight * (1 - alpha)
        slope = slope - weight
    if weight := weights.get("lk_pure"):
        loss = loss - weight * alpha.log()
        slope = slope - weight / alpha
    if weight := weights.get("lk"):
        part = torch.exp(-eta * alpha)
        share = share + weight * part
        loss = loss + weight * (1 - part) * (1 - alpha)
        slope = slope - weight * (1 - part)
    return loss, share, slope
