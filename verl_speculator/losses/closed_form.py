"""The same losses with their gradients in closed form, on one block of logits that is overwritten.

Shapes: R rows, V vocabulary. With q = softmax(z) and the base's p:

    ce     ∂/∂z = q − onehot(target)
    kl     ∂/∂z = T (q_T − p_T)
    α      ∂/∂z = q ⊙ (1[q < p] − Σ_v q 1[q < p]),   tv = 1 − α
    lk     λ · kl + (1 − λ) · tv with λ as a constant
    lk_pure = −log α   ∂/∂z = q Σ_v r − r,   r = q 1[q < p] / α

So every mix is  a ⊙ q − b ⊙ p + s ⊙ (q 1[q < p]) − c onehot(target) − d ⊙ r  with numbers a, b, s of each row. log α
and r are taken from log p and log q: where two distributions hardly overlap, α itself underflows.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from verl_speculator.config.objective import Objective

logger = logging.getLogger(__name__)


class Distribution(NamedTuple):
    """What the base says.

    Attributes:
        p: [R, V] probabilities.
        negentropy: [R] Σ_v p log p.
        log_p: [R, V] kept for objectives with `lk_pure` alone.
    """

    p: Tensor
    negentropy: Tensor
    log_p: Tensor | None = None

    def rows(self, index: Tensor) -> Distribution:
        """Some of its rows."""
        log_p = None if self.log_p is None else self.log_p[index]
        return Distribution(self.p[index], self.negentropy[index], log_p)


Teacher = Mapping[float, Distribution]


class Block(NamedTuple):
    """What comes of a block of logits.

    Attributes:
        loss: [R]
        gradient: [R, V] in the place of the logits; None where it was not asked for.
        acceptance: [R] α, if the objective weighs pairs by it.
    """

    loss: Tensor
    gradient: Tensor | None
    acceptance: Tensor | None


def teacher_distribution(logits: Tensor, objective: Objective) -> Teacher:
    """The base's distribution at each temperature that the objective asks for.

    Args:
        logits: [R, V] the base's, in float32 or wider.
        objective: what is minimised.
    """
    found = {}
    for temperature in sorted(objective.temperatures, reverse=True):
        log_p = logits.div(temperature).log_softmax(-1) if temperature != 1 else logits.log_softmax(-1)
        p = log_p.exp()
        kept = log_p if temperature == 1 and "lk_pure" in dict(objective.weights) else None
        found[temperature] = Distribution(p, _dot(p, log_p), kept)
    return found


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, teacher: Teacher, objective: Objective, needs_gradient: bool = True
) -> Block:
    """The loss of each row and its gradient.

    Args:
        logits: [R, V] in float32 or wider; overwritten.
        targets: [R] token ids.
        teacher: what `teacher_distribution` gives for the same rows; empty for an objective that does not compare with
            the base model.
        objective: what is minimised.
        needs_gradient: False computes the loss alone, as validation wants it.
    """
    weights = dict(objective.weights)
    loss = logits.new_zeros(logits.shape[0])
    extra = None  # [R, V] of the gradient what is not made of q, p and q 1[q < p]
    if objective.kl_temperature != 1 and "kl" in weights:
        value, extra = _softened_kl(logits, teacher[objective.kl_temperature], objective.kl_temperature, needs_gradient)
        weight = weights.pop("kl")
        loss, extra = loss + weight * value, None if extra is None else extra.mul_(weight)

    ce, column = weights.pop("ce", 0.0), targets.unsqueeze(-1)
    pure = weights.pop("lk_pure", 0.0)
    compares = bool(weights.keys() - {"kl"} or (objective.pair_weights and teacher))
    normaliser = logits.logsumexp(-1, keepdim=True)
    log_target = (logits.gather(-1, column) - normaliser).squeeze(-1)
    if ce:
        loss = loss - ce * log_target
    if weights:
        p, negentropy, _ = teacher[1.0]
        divergence = negentropy - _dot(p, logits) + normaliser.squeeze(-1)
    if needs_gradient or compares or pure:
        logits = logits.sub_(normaliser)  # log q
    of_q = torch.full_like(loss, ce)
    if pure:
        value, ratio = _log_acceptance(logits, teacher[1.0].log_p, needs_gradient)
        loss = loss - pure * value
        if ratio is not None:
            of_q = of_q + pure * ratio.sum(-1)
            extra = ratio.mul_(-pure) if extra is None else extra.sub_(ratio, alpha=pure)
    if needs_gradient or compares:
        logits = logits.exp_()  # q
    alpha = None
    if compares:
        alpha = torch.minimum(teacher[1.0].p, logits).sum(-1)
    elif objective.pair_weights:
        alpha = log_target.exp()
    if weights:
        share = torch.full_like(loss, weights.get("kl", 0.0))
        slope = None
        if weights.keys() - {"kl"}:
            added, share, slope = _acceptance(alpha, weights, objective.lk_eta, share)
            loss = loss + added
        loss = loss + share * divergence
    acceptance = alpha if objective.pair_weights else None
    if not needs_gradient:
        return Block(loss, None, acceptance)
    rising = None
    if weights:
        of_q = of_q + share
        if slope is not None:
            rising = torch.where(logits < p, logits, 0)
            of_q = of_q - slope * rising.sum(-1)
    gradient = logits if ce == 1 and not weights and not pure else logits.mul_(of_q.unsqueeze(-1))
    if weights:
        gradient.addcmul_(p, share.unsqueeze(-1), value=-1)
    if rising is not None:
        gradient.addcmul_(rising, slope.unsqueeze(-1))
    if ce:
        gradient.scatter_add_(-1, column, gradient.new_full(column.shape, -ce))
    return Block(loss, gradient if extra is None else gradient.add_(extra), acceptance)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[R] the product of each row with its own, without a block of products."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _softened_kl(
    logits: Tensor, teacher: Distribution, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """[R] T²·KL of the distributions at temperature T, and its gradient [R, V]."""
    z = logits / temperature
    normaliser = z.logsumexp(-1, keepdim=True)
    value = temperature**2 * (teacher.negentropy - _dot(teacher.p, z) + normaliser.squeeze(-1))
    if not needs_gradient:
        return value, None
    return value, z.sub_(normaliser).exp_().sub_(teacher.p).mul_(temperature)


def _log_acceptance(log_q: Tensor, log_p: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """[R] log α = log Σ_v min(p, q), and [R, V] the part q 1[q < p] / α of each token; their sum is at most 1."""
    value = torch.minimum(log_q, log_p).logsumexp(-1)
    if not needs_gradient:
        return value, None
    return value, torch.where(log_q < log_p, log_q - value.unsqueeze(-1), -torch.inf).exp_()


def _acceptance(
    alpha: Tensor, weights: Mapping[str, float], eta: float, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[R] the part of tv and lk that is no divergence; each row's weight of the divergence, `share` and what lk adds to
    it; and ∂loss/∂α."""
    loss, slope = torch.zeros_like(alpha), torch.zeros_like(alpha)
    if weight := weights.get("tv"):
        loss = loss + weight * (1 - alpha)
        slope = slope - weight
    if weight := weights.get("lk"):
        part = torch.exp(-eta * alpha)
        share = share + weight * part
        loss = loss + weight * (1 - part) * (1 - alpha)
        slope = slope - weight * (1 - part)
    return loss, share, slope


Kernel = Callable[[Tensor, Tensor, Teacher, Objective, bool], Block]
ROUNDS = 5


@cache
def choose_kernel(objective: Objective, rows: int, vocab_size: int, device: str, compiled: bool) -> Kernel:
    """The fastest kernel for blocks of this size, measured once.

    Args:
        objective: what is minimised.
        rows: of a block.
        vocab_size: V
        device: type of the device.
        compiled: whether the closed forms go through torch.compile.
    """
    own = compile_once(loss_and_gradient_) if compiled else loss_and_gradient_
    others = {name: kernel for name, kernel in OTHERS.items() if device != "cpu" and _takes(name, objective)}
    if not others:
        return own
    candidates = {"closed form": own} | others
    times = {name: _measure(kernel, objective, rows, vocab_size, device) for name, kernel in candidates.items()}
    best = min(times, key=times.__getitem__)
    logger.info("%s is taken of %s", best, ", ".join(f"{name} ({time:.2f} ms)" for name, time in times.items()))
    return candidates[best]


@cache
def compile_once(function: Callable) -> Callable:
    """torch.compile, for any number of rows."""
    return torch.compile(function, dynamic=True)


def liger_cross_entropy_(
    logits: Tensor, targets: Tensor, teacher: Teacher, objective: Objective, needs_gradient: bool = True
) -> Block:
    """Liger-Kernel's cross-entropy, which writes the gradient over the logits in one Triton kernel."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    with torch.no_grad():
        losses, *_ = cross_entropy_forward(
            logits.requires_grad_(needs_gradient),  # it makes a gradient for those only
            targets,
            weight=None,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="none",
            softcap=None,
            return_z_loss=False,
        )
    gradient = logits.detach() if needs_gradient else None
    return Block(losses, gradient, losses.neg().exp() if objective.pair_weights else None)


OTHERS: dict[str, Kernel] = {"liger_kernel": liger_cross_entropy_}


def _takes(name: str, objective: Objective) -> bool:
    """Whether a library is installed and knows the objective: plain cross-entropy."""
    return objective.weights == (("ce", 1.0),) and importlib.util.find_spec(name) is not None


def _measure(kernel: Kernel, objective: Objective, rows: int, vocab_size: int, device: str) -> float:
    """Median milliseconds for one block; infinite where the kernel cannot run."""
    logits = torch.randn(rows, vocab_size, device=device)
    targets = torch.zeros(rows, dtype=torch.long, device=device)
    found = []
    for _ in range(ROUNDS + 2):
        block = logits.clone()
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        try:
            start.record()
            kernel(block, targets, {}, objective, True)
            end.record()
        except Exception as error:  # a library of another version, or without support for this device
            logger.warning("%s cannot be used: %s", getattr(kernel, "__name__", kernel), " ".join(str(error).split()))
            return float("inf")
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found[2:])
