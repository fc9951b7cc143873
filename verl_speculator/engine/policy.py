"""What an actor's update needs beyond SFT: which tokens the policy wrote, and updates that do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from tensordict import TensorDict
from torch import Tensor


def written_tokens(batch: TensorDict) -> Tensor:
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
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While it lasts, clipping and optimizer see no gradient of these parameters."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    yield
    for parameter, gradient in kept:
        parameter.grad = gradient
