"""The definitions of the losses, one value a row. Every faster version must give these values and gradients.

Shapes: R rows, V vocabulary. Logits are in float32 or wider. A teacher's logits are the base model's for the same
token, and never carry a gradient. α = Σ_v min(p, q) is the probability that a draft token sampled from q is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.config.objective import Objective


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[R] −log q(target), from logits [R, V] and token ids [R]."""
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None]).squeeze(-1)


def kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """[R] T²·KL(p ‖ q) at temperature T. The factor keeps the size of the gradient (Hinton et al. 2015, arXiv
    1503.02531)."""
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def acceptance(logits: Tensor, teacher: Tensor) -> Tensor:
    """[R] α = Σ_v min(p, q)."""
    return torch.minimum(teacher.detach().softmax(-1), logits.softmax(-1)).sum(-1)


def tv(logits: Tensor, teacher: Tensor) -> Tensor:
    """[R] total variation ½ Σ_v |p − q| = 1 − α."""
    return 1 - acceptance(logits, teacher)


def lk_pure(logits: Tensor, teacher: Tensor) -> Tensor:
    """[R] −log α (LK losses, arXiv 2602.23881), from log p and log q: α underflows where they hardly overlap."""
    return -torch.minimum(teacher.detach().log_softmax(-1), logits.log_softmax(-1)).logsumexp(-1)


def lk(logits: Tensor, teacher: Tensor, eta: float) -> Tensor:
    """[R] λ·KL + (1 − λ)·TV with λ = exp(−η·α), α without a gradient (LK losses, arXiv 2602.23881): KL where the
    acceptance is low, TV where it is high."""
    kl_share = torch.exp(-eta * acceptance(logits, teacher).detach())
    return kl_share * kl(logits, teacher) + (1 - kl_share) * tv(logits, teacher)


def pair_weights(
    objective: Objective, logits: Tensor, targets: Tensor, teacher: Tensor | None, valid: Tensor
) -> Tensor:
    """[K, R] the factor of each pair's loss, besides its depth's weight. It never carries a gradient.

    Args:
        logits: [K, R, V]
        targets: [K, R]
        teacher: [K, R, V]; None if the objective does not compare with the base model: α is then q(target).
        valid: [K, R] bool; α of a pair that is not valid is 0.
    """
    if objective.pair_weights is None:
        return torch.ones_like(logits[..., 0])
    if objective.needs_teacher:
        alpha = torch.stack([acceptance(z, t) for z, t in zip(logits, teacher, strict=True)])
    else:
        alpha = logits.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    alpha = (alpha * valid).detach()
    if objective.pair_weights == "reach":
        return torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]]).cumprod(0)
    with torch.enable_grad():
        alpha.requires_grad_()
        accepted = sum(alpha[: k + 1].prod(0) for k in range(len(alpha)))
        return torch.autograd.grad(accepted.sum(), alpha)[0]


def row_losses(objective: Objective, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
    """[R] the weighted sum of an objective's losses, differentiable by autograd."""
    losses = {
        "ce": lambda: cross_entropy(logits, targets),
        "kl": lambda: kl(logits, teacher, objective.kl_temperature),
        "tv": lambda: tv(logits, teacher),
        "lk": lambda: lk(logits, teacher, objective.lk_eta),
        "lk_pure": lambda: lk_pure(logits, teacher),
    }
    return sum(weight * losses[name]() for name, weight in objective.weights)
