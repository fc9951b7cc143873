"""What an actor's update needs beyond SFT: which tokens the policy wrote, and updates that do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights, write_checkpoint
from verl_speculator.checkpoint.provenance import git_commit, versions
from verl_speculator.utils.atomic_io import atomic_directory
from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    from verl_speculator.training.engine import SpeculatorEngine


def response_mask(batch: TensorDict) -> Tensor:
    """[T] which of the flattened batch's tokens the policy wrote itself: no prompt, no tool's answer, no padding.

    Args:
        batch: verl's: `input_ids` nested, `prompts` and `response_mask` nested, or padded beside an `attention_mask`.
            A row is its prompt and, up to its end, the response.
    """
    prompts, responses, offsets = batch["prompts"], batch["response_mask"], batch["input_ids"].offsets()
    nested = prompts.is_nested
    begins = prompts.offsets().diff() if nested else batch["attention_mask"][:, : prompts.shape[1]].sum(1)
    written = torch.zeros_like(batch["input_ids"].values())
    for begin, row, (start, end) in zip(begins, responses.unbind(), offsets.unfold(0, 2, 1), strict=True):
        written[start + begin : end] = row[: end - start - begin].to(written)
    return written


@contextmanager
def gradients_hidden(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While it lasts, clipping and optimizer see no gradient of these parameters."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    yield
    for parameter, gradient in kept:
        parameter.grad = gradient


DIRECTORY = "speculator"
PREFIX = "speculator."


def save_companion(engine: SpeculatorEngine, folder: str, step: int) -> None:
    """Write the speculator beside the policy; every rank calls it, rank 0 writes."""
    state = get_model_state_dict(engine.draft, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model = engine.model_config
        with atomic_directory(Path(folder) / DIRECTORY) as target:
            write_checkpoint(
                target,
                model.speculator_config,
                {name.removeprefix(PREFIX): tensor for name, tensor in state.items()},
                hidden_size=engine.speculator.hidden_size,
                vocab_size=engine.speculator.vocab_size,
                logit_cap=engine.speculator.logit_cap,
                base_architectures=model.architectures,
                provenance={
                    "base": {"name": model.path, "trained_jointly": True, "weights_fingerprint": None},
                    "training": {"step": step, "speculator_loss_coeff": model.speculator_loss_coeff},
                    "versions": versions(),
                    "git_commit": git_commit(),
                },
            )
    dist.barrier()


def load_companion(engine: SpeculatorEngine, folder: str) -> None:
    """Read it back; a folder without one (the speculator did not learn then) leaves the speculator as it is.

    Raises:
        UserError: for a speculator of another shape.
    """
    weights, refused = {}, [None]
    found = [(Path(folder) / DIRECTORY).is_dir()] if dist.get_rank() == 0 else [None]
    if found[0]:
        info = read_checkpoint_info(Path(folder) / DIRECTORY)
        if differing := info.differences(engine.speculator.config, engine.speculator.logit_cap):
            refused = [f"cannot resume from {info.directory}: {', '.join(differing)}"]
        else:
            weights = {PREFIX + name: tensor for name, tensor in read_weights(info).items()}
    answer = [*found, *refused]
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise UserError(answer[1])
    if answer[0]:
        send = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(engine.draft, weights, options=send)
