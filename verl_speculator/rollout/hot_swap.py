"""New values for a speculator that is being served: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from verl_speculator.checkpoint import read_checkpoint_info, read_weights
from verl_speculator.errors import UserError
from verl_speculator.models import Speculator


def check_shapes(speculator: Speculator, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse parameters that are another speculator's, before a value is copied.

    Args:
        speculator: the served one.
        shapes: of every parameter that is to come, under the module's names.

    Raises:
        UserError: for a missing or unknown name, or another shape.
    """
    parameters = dict(speculator.named_parameters())
    faults = [f"missing {name}" for name in parameters if name not in shapes]
    faults += [f"unexpected {name}" for name in shapes if name not in parameters]
    faults += [
        f"{name} is {list(shapes[name])}, served is {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in shapes and list(shapes[name]) != list(parameter.shape)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"update_speculator: the tensors are another speculator's: {'; '.join(faults[:5])}{more}")


@torch.no_grad()
def copy_parameters(speculator: Speculator, tensors: Mapping[str, Tensor]) -> None:
    """Copy into the parameters where they lie, so that whatever was compiled or captured over them stays good.

    Args:
        speculator: on any device, in any type.
        tensors: every parameter, under the module's names.

    Raises:
        UserError: for a missing or unknown name, or another shape; then nothing has changed.
    """
    check_shapes(speculator, {name: tensor.shape for name, tensor in tensors.items()})
    for name, parameter in speculator.named_parameters():
        parameter.copy_(tensors[name])


class StreamedUpdate:
    """A served speculator's new values, copied as they arrive. What will arrive is announced, and checked, first.

    The sender waits for every bucket of tensors to be taken, so nothing is raised before the last one: what is
    refused is let through without a copy, and `finish` says why.

    Args:
        speculator: the served one; None in a worker that does not draft, which lets everything through.
        shapes: of every parameter that is to come, under the module's names.
    """

    def __init__(self, speculator: Speculator | None, shapes: Mapping[str, Sequence[int]]) -> None:
        self._refusal: UserError | None = None
        self._awaited: dict[str, Tensor] = {}
        if speculator is None:
            return
        try:
            check_shapes(speculator, shapes)
            self._awaited = dict(speculator.named_parameters())
        except UserError as error:
            self._refusal = error

    @torch.no_grad()
    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over a bucket; none of its tensors is kept."""
        for name, tensor in tensors:
            parameter = self._awaited.get(name)
            if parameter is not None and parameter.shape == tensor.shape:
                parameter.copy_(tensor)
                del self._awaited[name]

    def finish(self) -> None:
        """Behind the last bucket.

        Raises:
            UserError: for announced parameters that are another speculator's; the served one is as it was.
            RuntimeError: if not all that was announced has come; the served one is then partly new.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._awaited:
            raise RuntimeError(f"update_speculator: announced and not sent: {', '.join(self._awaited)}")


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
