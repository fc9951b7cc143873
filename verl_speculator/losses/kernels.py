"""Who computes the loss and gradient of a block of logits: the closed forms, or a library that measures faster here.

A kernel has the signature of `closed_form.loss_and_gradient_`, and computes no gradient where none is asked for. Only
what is installed takes part, and only on an accelerator; on a CPU it is always the closed forms.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from verl_speculator.losses.closed_form import Block, Teacher, loss_and_gradient_
from verl_speculator.objective import Objective

logger = logging.getLogger(__name__)

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
