"""The definitions: one row, one loss. Whatever is faster must give these values and gradients.

Shapes: R rows, V vocabulary. Logits are in float32 or wider. A teacher's logits are the base's own for the same token,
and never carry a gradient. α = Σ_v min(p, q) is the probability with which a draft drawn from q is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.config.objective import Objective


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log q(target) of each row.

    Args:
        logits: [R, V]
        targets: [R] token ids.

    Returns:
        [R]
    """
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    return torch.logsumexp(logits, -1) - picked


def kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """[R] T²·KL(p ‖ q), both softened by the temperature T. The factor keeps the size of the gradient (Hinton et al.
    2015, arXiv 1503.02531)."""
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
    """[R] −log α (LK losses, arXiv 2602.23881), from log p and log q: α itself underflows where they hardly overlap."""
    return -torch.minimum(teacher.detach().log_softmax(-1), logits.log_softmax(-1)).logsumexp(-1)


def lk(logits: Tensor, teacher: Tensor, eta: float) -> Tensor:
    """[R] the hybrid λ·KL + (1 − λ)·TV with λ = exp(−η·α), α without a gradient (LK losses, arXiv 2602.23881): KL where
    hardly anything is accepted yet, TV where much is."""
    weight = torch.exp(-eta * acceptance(logits, teacher).detach())
    return weight * kl(logits, teacher) + (1 - weight) * tv(logits, teacher)


def pair_weights(
    objective: Objective, logits: Tensor, targets: Tensor, teacher: Tensor | None, valid: Tensor
) -> Tensor:
    """[K, R] what each pair's loss is multiplied with besides its depth's weight; never carries a gradient.

    Args:
        logits: [K, R, V]
        targets: [K, R]
        teacher: [K, R, V]; α is the probability of the target where the objective does not compare with the base.
        valid: [K, R] bool; nothing is drafted behind a pair that is not valid.
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
    """[R] the mix of an objective, differentiable by autograd."""
    found = {
        "ce": lambda: cross_entropy(logits, targets),
        "kl": lambda: kl(logits, teacher, objective.kl_temperature),
        "tv": lambda: tv(logits, teacher),
        "lk": lambda: lk(logits, teacher, objective.lk_eta),
        "lk_pure": lambda: lk_pure(logits, teacher),
    }
    return sum(weight * found[name]() for name, weight in objective.weights)
