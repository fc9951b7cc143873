"""The same losses with their gradients in closed form, on one block of logits that is overwritten.

Shapes: R rows, V vocabulary. With q = softmax(z):

    ce     ∂/∂z = q − onehot(target)
    kl     ∂/∂z = T (q_T − p_T)
    α      ∂/∂z = q ⊙ (1[q < p] − Σ_v q 1[q < p]),   tv = 1 − α,  lk_pure = −log α
    lk     λ · kl + (1 − λ) · tv with λ as a constant
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.objective import Objective


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, teacher: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient.

    Args:
        logits: [R, V] in float32 or wider; overwritten.
        targets: [R] token ids.
        teacher: [R, V] the base's logits, if the objective compares with them; overwritten.
        objective: what is minimised.

    Returns:
        [R] losses and [R, V] gradients in the place of the logits.
    """
    weights = dict(objective.weights)
    column = targets.unsqueeze(-1)
    if set(weights) == {"ce"}:
        normaliser = logits.logsumexp(-1, keepdim=True)
        loss = (normaliser - logits.gather(-1, column)).squeeze(-1) * weights["ce"]
        gradient = logits.sub_(normaliser).exp_()
        gradient.scatter_add_(-1, column, gradient.new_full(column.shape, -1.0))
        return loss, gradient if weights["ce"] == 1 else gradient.mul_(weights["ce"])

    loss = logits.new_zeros(logits.shape[0])
    gradient = torch.zeros_like(logits)
    softened = weights.pop("kl", 0.0)
    temperature = objective.kl_temperature
    if softened and temperature != 1:
        loss += softened * _add_kl(gradient, logits / temperature, teacher / temperature, softened, temperature)
        softened = 0.0
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    if ce := weights.pop("ce", 0.0):
        loss -= ce * log_q.gather(-1, column).squeeze(-1)
        gradient.add_(log_q.exp(), alpha=ce)
        gradient.scatter_add_(-1, column, gradient.new_full(column.shape, -ce))
    if softened:
        loss += softened * _add_kl(gradient, log_q, log_p, softened, 1.0)
    if weights:
        loss += _add_acceptance(gradient, log_q, log_p, weights, objective.lk_eta)
    return loss, logits.copy_(gradient)


def _add_kl(gradient: Tensor, z: Tensor, t: Tensor, weight: Tensor | float, temperature: float) -> Tensor:
    """Add weight · ∂(T²·KL)/∂logits, with z and t already divided by T; [R] T²·KL."""
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    p = log_p.exp()
    value = temperature**2 * (p * (log_p - log_q)).sum(-1)
    gradient.add_((log_q.exp_() - p).mul_(temperature).mul_(weight))
    return value


def _add_acceptance(gradient: Tensor, log_q: Tensor, log_p: Tensor, weights: dict[str, float], eta: float) -> Tensor:
    """Add the gradients of tv, lk and lk_pure; [R] their weighted sum."""
    q, p = log_q.exp(), log_p.exp()
    alpha = torch.minimum(p, q).sum(-1)
    loss, slope = torch.zeros_like(alpha), torch.zeros_like(alpha)
    if weight := weights.get("tv"):
        loss += weight * (1 - alpha)
        slope -= weight
    if weight := weights.get("lk_pure"):
        loss -= weight * alpha.log()
        slope -= weight / alpha
    if weight := weights.get("lk"):
        share = torch.exp(-eta * alpha)
        loss += weight * share * _add_kl(gradient, log_q, log_p, weight * share.unsqueeze(-1), 1.0)
        loss += weight * (1 - share) * (1 - alpha)
        slope -= weight * (1 - share)
    rising = torch.where(q < p, q, 0)
    gradient.add_((rising - q * rising.sum(-1, keepdim=True)).mul_(slope.unsqueeze(-1)))
    return loss
