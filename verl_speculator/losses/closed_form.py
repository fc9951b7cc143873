"""The losses of `reference` with their gradients in closed form, on one block of logits that is overwritten.

Shapes: R rows, V vocabulary, V′ draft vocabulary (V without one). z are logits [R, V′], q = softmax(z), p is the base
model's distribution of these tokens, y the target, sg(·) the stop-gradient. kl takes p̃ = p / Σ p, which is p without a
draft vocabulary. With ∂q_v/∂z_w = q_v (1[v = w] − q_w) and m = q ⊙ 1[q < p], the part of q that still raises α:

    ce       −log q_y                         ∂/∂z = q − onehot(y)
    kl       T²·KL(p̃_T ‖ q_T)                 ∂/∂z = T (q_T − p̃_T)               (Hinton et al. 2015, arXiv 1503.02531)
    α        Σ_v min(p_v, q_v)                ∂/∂z = m − q Σ_v m_v
    tv       1 − α
    lk       λ·kl + (1 − λ)·tv                λ = exp(−η·sg(α)) is a constant    (LK losses, arXiv 2602.23881)
    lk_pure  −log α                           ∂/∂z = q Σ_v r_v − r,  r = m / α   (LK losses, arXiv 2602.23881)

The gradient of every mix is one sum of blocks, a ⊙ q − b ⊙ p̃ + s ⊙ m − c onehot(y) − d ⊙ r, with factors of each row
or of the mix, so a mix costs hardly more than its most expensive loss. log α and r come from log p and log q,
since α underflows where the two distributions hardly overlap.
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
    """The base model's distribution at one temperature, of the tokens of the draft vocabulary.

    Attributes:
        p: [R, V′] probabilities among these tokens, p̃.
        negentropy: [R] Σ_v p̃ log p̃.
        log_p: [R, V′] logarithms of the probabilities among all V tokens, for objectives with `lk_pure` only.
        mass: [R] the probability of all these tokens together; None without a draft vocabulary, where it is 1.
    """

    p: Tensor
    negentropy: Tensor
    log_p: Tensor | None = None
    mass: Tensor | None = None

    @property
    def whole_p(self) -> Tensor:
        """[R, V′] probabilities among all V tokens."""
        return self.p if self.mass is None else self.p * self.mass.unsqueeze(-1)

    def rows(self, index: Tensor) -> Distribution:
        """The distributions of some rows."""
        return Distribution(*(None if tensor is None else tensor[index] for tensor in self))


Teacher = Mapping[float, Distribution]  # by temperature


class BlockLoss(NamedTuple):
    """The loss of a block of logits, in the two parts of `reference.row_losses`.

    Attributes:
        ce: [R] weighted cross-entropy.
        compared: [R] weighted sum of the losses that compare with the base model.
        gradient: [R, V′] of ce_factor · ce + compared, in the memory of the logits; None if it was not asked for.
        acceptance: [R] α, if the objective weighs pairs by it.
    """

    ce: Tensor
    compared: Tensor
    gradient: Tensor | None
    acceptance: Tensor | None


Kernel = Callable[[Tensor, Tensor, Teacher, Objective, bool, Tensor | None], BlockLoss]


def teacher_distribution(logits: Tensor, objective: Objective, vocabulary: Tensor | None = None) -> Teacher:
    """The base model's distribution at each temperature of the objective.

    Args:
        logits: [R, V] its logits, in float32 or wider.
        objective: what is minimised.
        vocabulary: [V′] the ids of the draft vocabulary; None for all.
    """
    mass = None
    if vocabulary is not None:
        normaliser = logits.logsumexp(-1) if 1.0 in objective.temperatures else None
        logits = logits[:, vocabulary]
        mass = None if normaliser is None else (logits.logsumexp(-1) - normaliser).exp()
    teacher = {}
    for temperature in sorted(objective.temperatures, reverse=True):
        log_p = logits.div(temperature).log_softmax(-1) if temperature != 1 else logits.log_softmax(-1)
        p = log_p.exp()
        negentropy = _dot(p, log_p)
        if temperature != 1:
            teacher[temperature] = Distribution(p, negentropy)
            continue
        if "lk_pure" not in dict(objective.weights):
            log_p = None
        elif mass is not None:
            log_p = log_p.add_(mass.log().unsqueeze(-1))
        teacher[temperature] = Distribution(p, negentropy, log_p, mass)
    return teacher


def loss_and_gradient_(
    logits: Tensor,
    targets: Tensor,
    teacher: Teacher,
    objective: Objective,
    needs_gradient: bool = True,
    ce_factor: Tensor | None = None,
) -> BlockLoss:
    """The loss of each row and its gradient.

    Args:
        logits: [R, V′] in float32 or wider; overwritten.
        targets: [R] rows of the head.
        teacher: `teacher_distribution` of the same rows; empty if the objective does not compare with the base model.
        objective: what is minimised.
        needs_gradient: False computes the loss alone, as validation needs it.
        ce_factor: [R] factor of the gradient of the cross-entropy; None for 1.
    """
    weights = dict(objective.weights)
    loss = logits.new_zeros(logits.shape[0])
    added_gradient = None  # [R, V′] what is no multiple of q, p̃ or m: d ⊙ r, and kl at a temperature other than 1
    if objective.kl_temperature != 1 and "kl" in weights:
        temperature, weight = objective.kl_temperature, weights.pop("kl")
        value, added_gradient = _softened_kl(logits, teacher[temperature], temperature, needs_gradient)
        loss, added_gradient = loss + weight * value, None if added_gradient is None else added_gradient.mul_(weight)

    ce, lk_pure = weights.pop("ce", 0.0), weights.pop("lk_pure", 0.0)  # `weights` keeps kl, tv and lk
    uses_alpha = bool(weights.keys() - {"kl"} or (objective.pair_weights and teacher))
    column = targets.unsqueeze(-1)
    normaliser = logits.logsumexp(-1, keepdim=True)
    log_target = (logits.gather(-1, column) - normaliser).squeeze(-1)
    ce_loss = -ce * log_target if ce else torch.zeros_like(loss)
    if weights:
        p, negentropy, *_ = teacher[1.0]
        divergence = negentropy - _dot(p, logits) + normaliser.squeeze(-1)

    # From here on the block holds log q, then q, then the gradient. It stays as it is where none of them is needed.
    if needs_gradient or uses_alpha or lk_pure:
        logits = logits.sub_(normaliser)
    ce_gradient = torch.full_like(loss, ce) if ce_factor is None else ce * ce_factor  # c
    q_factor = ce_gradient  # a
    if lk_pure:
        log_p = teacher[1.0].log_p
        log_alpha = torch.minimum(logits, log_p).logsumexp(-1)
        loss = loss - lk_pure * log_alpha
        if needs_gradient:
            ratio = torch.where(logits < log_p, logits - log_alpha.unsqueeze(-1), -torch.inf).exp_()  # r
            q_factor = q_factor + lk_pure * ratio.sum(-1)
            added_gradient = (
                ratio.mul_(-lk_pure) if added_gradient is None else added_gradient.sub_(ratio, alpha=lk_pure)
            )
    if needs_gradient or uses_alpha:
        logits = logits.exp_()
    alpha = None
    if uses_alpha:
        whole_p = teacher[1.0].whole_p
        alpha = torch.minimum(whole_p, logits).sum(-1)
    elif objective.pair_weights:
        alpha = log_target.exp()
    alpha_slope = None  # s
    if weights:
        kl_weight = torch.full_like(loss, weights.get("kl", 0.0))  # b
        if weights.keys() - {"kl"}:
            value, kl_weight, alpha_slope = _tv_and_lk(alpha, weights, objective.lk_eta, kl_weight)
            loss = loss + value
        loss = loss + kl_weight * divergence
    acceptance = alpha if objective.pair_weights else None
    if not needs_gradient:
        return BlockLoss(ce_loss, loss, None, acceptance)

    if weights:
        q_factor = q_factor + kl_weight
    if alpha_slope is not None:
        below_base = torch.where(logits < whole_p, logits, 0)  # m
        q_factor = q_factor - alpha_slope * below_base.sum(-1)
    is_q = ce == 1 and ce_factor is None and not weights and not lk_pure
    gradient = logits if is_q else logits.mul_(q_factor.unsqueeze(-1))
    if weights:
        gradient.addcmul_(p, kl_weight.unsqueeze(-1), value=-1)
    if alpha_slope is not None:
        gradient.addcmul_(below_base, alpha_slope.unsqueeze(-1))
    if ce:
        gradient.scatter_add_(-1, column, -ce_gradient.unsqueeze(-1))
    return BlockLoss(ce_loss, loss, gradient if added_gradient is None else gradient.add_(added_gradient), acceptance)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[R] Σ_v a_v b_v of each row, without a block of products."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _softened_kl(
    logits: Tensor, teacher: Distribution, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """[R] T²·KL(p̃_T ‖ q_T), and its gradient [R, V′]."""
    z = logits / temperature
    normaliser = z.logsumexp(-1, keepdim=True)
    value = temperature**2 * (teacher.negentropy - _dot(teacher.p, z) + normaliser.squeeze(-1))
    return value, z.sub_(normaliser).exp_().sub_(teacher.p).mul_(temperature) if needs_gradient else None


def _tv_and_lk(
    alpha: Tensor, weights: Mapping[str, float], eta: float, kl_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[R] each: the part of tv and lk that is no divergence, the weight of the divergence, and s = ∂loss/∂α."""
    loss, alpha_slope = torch.zeros_like(alpha), torch.zeros_like(alpha)
    if weight := weights.get("tv"):
        loss = loss + weight * (1 - alpha)
        alpha_slope = alpha_slope - weight
    if weight := weights.get("lk"):
        kl_share = torch.exp(-eta * alpha)  # λ
        kl_weight = kl_weight + weight * kl_share
        loss = loss + weight * (1 - kl_share) * (1 - alpha)
        alpha_slope = alpha_slope - weight * (1 - kl_share)
    return loss, kl_weight, alpha_slope


def liger_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    teacher: Teacher,
    objective: Objective,
    needs_gradient: bool = True,
    ce_factor: Tensor | None = None,
) -> BlockLoss:
    """`loss_and_gradient_` for plain cross-entropy, in Liger-Kernel's one Triton kernel."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    with torch.no_grad():
        losses, *_ = cross_entropy_forward(
            logits.requires_grad_(needs_gradient),  # the kernel writes a gradient only for a tensor that requires one
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
    if gradient is not None and ce_factor is not None:
        gradient.mul_(ce_factor.unsqueeze(-1))
    return BlockLoss(losses, torch.zeros_like(losses), gradient, losses.neg().exp() if objective.pair_weights else None)


@cache
def choose_kernel(objective: Objective, rows: int, vocab_size: int, device: str, compiled: bool) -> Kernel:
    """The fastest kernel for blocks of logits [rows, vocab_size], measured once per process.

    Args:
        objective: what is minimised.
        rows: R
        vocab_size: V
        device: type of the device.
        compiled: whether the closed forms run through torch.compile.
    """
    closed_form = compile_once(loss_and_gradient_) if compiled else loss_and_gradient_
    is_plain_ce = objective.weights == (("ce", 1.0),)
    if device == "cpu" or not is_plain_ce or importlib.util.find_spec("liger_kernel") is None:
        return closed_form
    kernels = {"closed form": closed_form, "liger_kernel": liger_cross_entropy_}
    times = {name: _measure(kernel, objective, rows, vocab_size, device) for name, kernel in kernels.items()}
    fastest = min(times, key=times.__getitem__)
    timings = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
    logger.info("cross-entropy kernel: %s (%s)", fastest, timings)
    return kernels[fastest]


@cache
def compile_once(function: Callable) -> Callable:
    """torch.compile, for any number of rows."""
    return torch.compile(function, dynamic=True)


WARM_UP_ROUNDS, TIMED_ROUNDS = 2, 5


def _measure(kernel: Kernel, objective: Objective, rows: int, vocab_size: int, device: str) -> float:
    """Median milliseconds for one block; infinite if the kernel cannot run."""
    logits = torch.randn(rows, vocab_size, device=device)
    targets = torch.zeros(rows, dtype=torch.long, device=device)
    times = []
    for _ in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        block = logits.clone()
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        try:
            start.record()
            kernel(block, targets, {}, objective, True)
            end.record()
        except Exception as error:  # another version of the library, or a device that it does not support
            logger.warning("%s cannot be used: %s", getattr(kernel, "__name__", kernel), " ".join(str(error).split()))
            return float("inf")
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP_ROUNDS:])
