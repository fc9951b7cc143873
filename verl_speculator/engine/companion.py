"""A policy's speculator on disk: a checkpoint of its own inside verl's checkpoint of the policy.

    <verl's actor folder>/model_world_size_*.pt, optim_*.pt, extra_state_*.pt, huggingface/    the policy, by verl
    <verl's actor folder>/speculator/pytorch_model.bin, config.json                            the speculator

verl's part has the policy's own names, so that verl's merger turns it into a Hugging Face folder as ever. The state of
both optimizers lies there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from verl_speculator.checkpoint import read_checkpoint_info, read_weights, write_checkpoint
from verl_speculator.errors import UserError
from verl_speculator.files import atomic_directory
from verl_speculator.provenance import git_commit, versions

if TYPE_CHECKING:
    from verl_speculator.engine.engine import SpeculatorEngine

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
