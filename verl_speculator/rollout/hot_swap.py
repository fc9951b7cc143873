"""New values for a speculator that is being served: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from verl_speculator.checkpoint import read_checkpoint_info, read_weights
from verl_speculator.errors import UserError
from verl_speculator.models import Speculator


@torch.no_grad()
def copy_parameters(speculator: Speculator, tensors: Mapping[str, Tensor]) -> None:
    """Copy into the parameters where they lie, so that whatever was compiled or captured over them stays good.

    Args:
        speculator: on any device, in any type.
        tensors: every parameter, under the module's names.

    Raises:
        UserError: for a missing or unknown name, or another shape; then nothing has changed.
    """
    parameters = dict(speculator.named_parameters())
    faults = [f"missing {name}" for name in parameters if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in parameters]
    faults += [
        f"{name} is {list(tensors[name].shape)}, served is {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"update_speculator: the tensors are another speculator's: {'; '.join(faults[:5])}{more}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def read_parameters(path: str, speculator: Speculator) -> dict[str, Tensor]:
    """The parameters of a checkpoint that is to take a served speculator's place.

    Raises:
        UserError: if it is of another family or shape, or for another base.
    """
    info = read_checkpoint_info(path)
    differ = speculator.config.differences(info.config)
    if differ:
        raise UserError(f"update_speculator: {info.directory} differs from what is served: {', '.join(differ)}")
    info.check_base(speculator.hidden_size, speculator.vocab_size)
    return read_weights(info)
