"""What a checkpoint's own folder tells of its training: whether the last steps still changed anything."""

from __future__ import annotations

import pickle

import torch

from verl_speculator.checkpoint import (
    STATE_DIRECTORY,
    STEP_DIRECTORY,
    CheckpointInfo,
    read_checkpoint_info,
    read_weights,
)
from verl_speculator.errors import UserError


def learning_rate(info: CheckpointInfo) -> tuple[bool | None, str]:
    """Whether training stood still, None where that is not known, and the evidence."""
    training = info.provenance.get("training", {})
    step, total = training.get("step"), training.get("total_steps")
    if training.get("lr") == 0:
        return True, "optim.lr was 0"
    before = _before(info)
    if before is not None:
        mine, theirs = read_weights(info), read_weights(before)
        if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
            return (
                True,
                f"{before.directory.name} and {info.directory.name} hold the same weights: no step between moved one",
            )
    rate = _last_rate(info)
    if rate is None:
        told = f", step {step} of {total}" if step is not None else ""
        return None, f"no {STATE_DIRECTORY} beside it{told}"
    evidence = f"the learning rate was {rate:.1e} at step {step} of {total}"
    return rate == 0 and step is not None and total is not None and step < total, evidence


def _before(info: CheckpointInfo) -> CheckpointInfo | None:
    """The run's checkpoint before this one."""
    match = STEP_DIRECTORY.match(info.directory.resolve().name)
    if match is None:
        return None
    steps = {
        int(found[1]): path
        for path in info.directory.resolve().parent.iterdir()
        if (found := STEP_DIRECTORY.match(path.name)) and int(found[1]) < int(match[1])
    }
    try:
        return read_checkpoint_info(steps[max(steps)]) if steps else None
    except UserError:
        return None


def _last_rate(info: CheckpointInfo) -> float | None:
    try:
        state = torch.load(info.directory / STATE_DIRECTORY / "lr_scheduler.pt", weights_only=True)
        return max(float(rate) for rate in state["_last_lr"])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError):
        return None
