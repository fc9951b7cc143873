"""The definitions of the losses, one value a row. Every faster version must give these values and gradients.

Shapes: R rows, V vocabulary, V′ draft vocabulary, K depths. Logits [R, V′] are in float32 or wider. A teacher's logits
[R, V] are the base model's for the same token, and never carry a gradient. `vocabulary` [V′] are the ids of a draft
vocabulary; None means all, V′ = V.

With a draft vocabulary q is 0 outside of it. α = Σ_v min(p, q) is the probability that a draft token sampled from q is
accepted, so it takes p as it is; kl would be infinite, so it takes p restricted to the draft vocabulary and normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.config.objective import Objective


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[R] −log q(target), from logits [R, V′] and rows of the head [R] (`Speculator.rows_of`)."""
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None]).squeeze(-1)


def kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0, vocabulary: Tensor | None = None) -> Tensor:
    """[R] T²·KL(p ‖ q) at temperature T. The factor keeps the size of the gradient (Hinton et al. 2015, arXiv
    1503.02531)."""
    teacher = teacher if vocabulary is None else teacher[..., vocabulary]
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def acceptance(logits: Tensor, teacher: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """[R] α = Σ_v min(p, q)."""
    return torch.minimum(_log_p(teacher, vocabulary).exp(), logits.softmax(-1)).sum(-1)


def tv(logits: Tensor, teacher: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """[R] total variation ½ Σ_v |p − q| = 1 − α."""
    return 1 - acceptance(logits, teacher, vocabulary)


def lk_pure(logits: Tensor, teacher: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """[R] −log α (LK losses, arXiv 2602.23881), from log p and log q: α underflows where they hardly overlap."""
    return -torch.minimum(_log_p(teacher, vocabulary), logits.log_softmax(-1)).logsumexp(-1)


def lk(logits: Tensor, teacher: Tensor, eta: float, vocabulary: Tensor | None = None) -> Tensor:
    """[R] λ·KL + (1 − λ)·TV with λ = exp(−η·α), α without a gradient (LK losses, arXiv 2602.23881): KL where the
    acceptance is low, TV where it is high."""
    kl_share = torch.exp(-eta * acceptance(logits, teacher, vocabulary).detach())
    divergence = kl(logits, teacher, vocabulary=vocabulary)
    return kl_share * divergence + (1 - kl_share) * tv(logits, teacher, vocabulary)


def _log_p(teacher: Tensor, vocabulary: Tensor | None) -> Tensor:
    """[..., V′] log p of the tokens of the draft vocabulary, normalised over all V."""
    log_p = teacher.detach().log_softmax(-1)
    return log_p if vocabulary is None else log_p[..., vocabulary]


def drafted_pairs(valid: Tensor, covered: Tensor) -> Tensor:
    """[K, R] bool, the pairs that can be reached in drafting: no draft continues a token that cannot be drafted.

    Args:
        valid: [K, R] bool, as `alignment.DraftRows.valid`.
        covered: [K, R] bool, whether the target is in the draft vocabulary.
    """
    before = torch.cat([torch.ones_like(covered[:1]), covered[:-1]])
    return valid & before.cummin(0).values


def pair_weights(
    objective: Objective,
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    valid: Tensor,
    vocabulary: Tensor | None = None,
) -> Tensor:
    """[K, R] the factor of each pair's loss, besides its depth's weight. It never carries a gradient.

    Args:
        logits: [K, R, V′]
        targets: [K, R] rows of the head, −1 for a target outside of the draft vocabulary, which no draft can be.
        teacher: [K, R, V]; None if the objective does not compare with the base model: α is then q(target).
        valid: [K, R] bool, of `drafted_pairs`; α of a pair that is not valid is 0.
        vocabulary: [V′]
    """
    if objective.pair_weights is None:
        return torch.ones_like(logits[..., 0])
    if objective.needs_teacher:
        alpha = torch.stack([acceptance(z, t, vocabulary) for z, t in zip(logits, teacher, strict=True)])
    else:
        alpha = logits.softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets >= 0)
    alpha = (alpha * valid).detach()
    if objective.pair_weights == "reach":
        return torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]]).cumprod(0)
    with torch.enable_grad():
        alpha.requires_grad_()
        accepted = sum(alpha[: k + 1].prod(0) for k in range(len(alpha)))
        return torch.autograd.grad(accepted.sum(), alpha)[0]


def row_losses(
    objective: Objective,
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[R] each: the weighted cross-entropy with the targets, and the weighted sum of the losses that compare with the
    base model. Differentiable by autograd.

    The two are averaged over pairs of their own: cross-entropy over those whose target is in the draft vocabulary, the
    others over all. `targets` [R] are rows of the head; the first value means nothing where one is −1.
    """
    losses = {
        "kl": lambda: kl(logits, teacher, objective.kl_temperature, vocabulary),
        "tv": lambda: tv(logits, teacher, vocabulary),
        "lk": lambda: lk(logits, teacher, objective.lk_eta, vocabulary),
        "lk_pure": lambda: lk_pure(logits, teacher, vocabulary),
    }
    weights, none = dict(objective.weights), logits.new_zeros(logits.shape[0])
    ce = weights.pop("ce") * cross_entropy(logits, targets.clamp(min=0)) if "ce" in weights else none
    return ce, sum((weight * losses[name]() for name, weight in weights.items()), none)
