"""From what a serving engine has at hand after a step to the next drafts of a whole batch: pure functions.

B requests in the engine's order, R rows of hidden states, K depths, D base width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.models import Speculator


@dataclass(frozen=True)
class Newest:
    """The newest state of every request that can be drafted for.

    Attributes:
        requests: which of the B requests.
        rows: which of the R rows holds the state that produced the newest token of each.
        tokens: the newest token of each; the base has not read it yet.
    """

    requests: list[int]
    rows: list[int]
    tokens: list[int]


def newest_rows(sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> Newest:
    """Find each request's newest token and the row of the state that produced it.

    A request that came with n drafts has n + 1 rows, one for each place where a token could be sampled. With m tokens
    out of it (m − 1 drafts accepted, and one more) the last of them was sampled from its row m − 1. A request has no
    token where its prompt is still being read (chunked prefill; a preempted one reads it anew): its row is passed by.

    Args:
        sampled: the tokens that each of the B requests got in this step, none or more.
        num_draft_tokens: how many drafts each of them came with; None where no request had any.

    Raises:
        ValueError: if a request got more tokens than it has rows, or the two do not speak of the same requests.
    """
    drafts = [0] * len(sampled) if num_draft_tokens is None else num_draft_tokens
    requests, rows, tokens, offset = [], [], [], 0
    for request, (one, count) in enumerate(zip(sampled, drafts, strict=True)):
        if len(one) > count + 1:
            raise ValueError(f"request {request} got {len(one)} tokens from {count} drafts")
        if one:
            requests.append(request)
            rows.append(offset + len(one) - 1)
            tokens.append(one[-1])
        offset += count + 1
    return Newest(requests, rows, tokens)


def greedy_drafts(speculator: Speculator, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The most likely token of every depth, each fed to the next.

    At any temperature: a target that samples accepts such a draft with probability p(argmax q), where the objectives
    `tv` and `lk` raise the acceptance Σ_v min(p, q) of a sampled draft.

    Args:
        speculator: any family that lives on one hidden state.
        hidden: [B, D] the base's states that produced `tokens`, in the speculator's type.
        tokens: [B] the newest tokens.

    Returns:
        [B, K]
    """
    state, drafts = speculator.start(hidden), []
    for depth in range(speculator.n_predict):
        state = speculator.step(state, tokens)
        tokens = speculator.logits(depth, state.output).argmax(-1)
        drafts.append(tokens)
    return torch.stack(drafts, dim=1)


def draft_batch(
    draft: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    sampled: Sequence[Sequence[int]],
    num_draft_tokens: Sequence[int] | None,
) -> list[list[int]]:
    """Drafts for every request of a step, none where a request has no token.

    Args:
        draft: from states [n, D] and tokens [n] to drafts [n, K].
        hidden: [R, D] the states that this step's tokens were sampled from.
        sampled: as in `newest_rows`.
        num_draft_tokens: as in `newest_rows`.
    """
    newest = newest_rows(sampled, num_draft_tokens)
    found: list[list[int]] = [[] for _ in sampled]
    if newest.requests:
        rows, tokens = (torch.tensor(values, device=hidden.device) for values in (newest.rows, newest.tokens))
        for request, drafts in zip(newest.requests, draft(hidden[rows], tokens).tolist(), strict=True):
            found[request] = drafts
    return found
