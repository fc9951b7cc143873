"""THE shift: which token each (position, depth) pair reads and which one it predicts. Nothing else shifts anything.

Shapes: T positions of a packed row, R of them with something to draft, K depths.

Depth k (0-based) at position t sees the base model's hidden state h_t and the tokens x_{t+1} … x_{t+1+k}, and predicts
x_{t+2+k}: at inference the base model has just sampled x_{t+1}, and the draft continues from there. One document,
K = 2, the response c d e f after the prompt a b:

    t   x_t  mask   depth 0: sees → predicts    depth 1: sees → predicts
    0   a    0      –                           –
    1   b    0      h_b, c → d                  h_b, c d → e
    2   c    1      h_c, d → e                  h_c, d e → f
    3   d    1      h_d, e → f                  –
    4   e    1      –                           –
    5   f    1      –                           –
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftRows:
    """The rows of a packed batch that have at least one valid (position, depth) pair.

    Attributes:
        positions: [R] index t into the packed row, ascending.
        tokens: [R, K] the tokens x_{t+1} … x_{t+K}; past the end of the row the last token is repeated, and never read
            by a valid pair.
        targets: [K, R] the token x_{t+2+k} that depth k predicts.
        teachers: [K, R] the position before the target, at which the base model predicts the same token.
        valid: [K, R] bool, whether the pair counts. A pair is valid only if all earlier depths of its row are.
    """

    positions: Tensor
    tokens: Tensor
    targets: Tensor
    teachers: Tensor
    valid: Tensor


def align(
    tokens: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    n_predict: int,
    end_token_ids: Collection[int],
    *,
    first_offset: int = 2,
) -> DraftRows:
    """Rows, inputs, targets and validity of every draft in a packed row of documents.

    A pair (t, k) is valid when position t is in the same document as its target, x_{t+1} … x_{t+2+k} were all produced
    by the assistant in one turn, and none of them before the target ends that turn: exactly the situations in which a
    draft is made at inference. What a chat template writes after the end-of-turn token is never a target, whatever the
    mask says, since nothing is generated there.

    Args:
        tokens: [T] token ids of all documents, one after the other.
        loss_mask: [T] 1 where the assistant produced the token, 0 elsewhere.
        cu_seqlens: [B + 1] the borders of the documents, from 0 to T.
        n_predict: K.
        end_token_ids: tokens that end an assistant's turn. Empty for plain text, where every token is a target.
        first_offset: how many tokens after its hidden state the first depth predicts. 2 where the draft starts from a
            state whose next token is known; 1 where depth k at position t predicts x_{t+1+k}.
    """
    length, device = tokens.numel(), tokens.device
    index = torch.arange(length, device=device)
    doc_start = _document_starts(cu_seqlens, length, device)

    assistant = loss_mask.bool()
    # A turn starts where the assistant begins: at the first token of a document, or after a token that is not its own.
    is_start = assistant & ((index == doc_start) | ~assistant.roll(1))
    turn_start = torch.where(is_start, index, 0).cummax(0).values
    ends = assistant & torch.isin(tokens, torch.tensor(sorted(end_token_ids), dtype=tokens.dtype, device=device))
    ends_before = ends.long().cumsum(0) - ends.long()
    produced = assistant & (ends_before == ends_before[turn_start])

    depth = torch.arange(n_predict, device=device)[:, None]
    target = index + first_offset + depth  # [K, T]
    inside = target < length
    target = target.clamp(max=length - 1)
    # x_{t+1} must belong to the target's turn, and t to its document.
    first = torch.maximum(turn_start - 1, doc_start)
    valid = inside & produced[target] & (first[target] <= index)

    positions = valid[0].nonzero().squeeze(-1)
    seen = (positions[:, None] + 1 + depth.T).clamp(max=length - 1)
    return DraftRows(
        positions=positions,
        tokens=tokens[seen],
        targets=tokens[target[:, positions]],
        teachers=(positions[:, None] + first_offset - 1 + depth.T).clamp(max=length - 1).T,
        valid=valid[:, positions],
    )


def misaligned(
    rows: DraftRows, tokens: Tensor, *, token_shift: int, target_shift: int, first_offset: int = 2
) -> DraftRows:
    """The same rows with deliberately misaligned tokens or targets, for diagnosis alone.

    Args:
        rows: of `align`.
        tokens: [T] the packed row they come from.
        token_shift: the tokens read become x_{t+1+s} … x_{t+K+s}.
        target_shift: the targets become x_{t+first_offset+k+s}.
        first_offset: as in `align`.

    Returns:
        Rows in which pairs outside of the packed row are not valid.
    """
    depth = torch.arange(len(rows.targets), device=tokens.device)[:, None]
    seen = rows.positions + 1 + depth + token_shift
    target = rows.positions + first_offset + depth + target_shift
    last = tokens.numel() - 1
    inside = (seen >= 0) & (seen <= last) & (target >= 0) & (target <= last)
    return DraftRows(
        positions=rows.positions,
        tokens=tokens[seen.clamp(0, last)].T,
        targets=tokens[target.clamp(0, last)],
        teachers=(target - 1).clamp(0, last),
        valid=rows.valid & inside.cumprod(0).bool(),
    )


def states_read(loss_mask: Tensor, cu_seqlens: Tensor, *, whole: bool = False) -> Tensor:
    """[S] every position, ascending, whose hidden state a draft of any depth may start from or be compared with: those
    before a token of the assistant's in the same document. Arguments as those of `align`; `whole` for a family that
    reads the sequence: all positions.
    """
    if whole:
        return torch.arange(loss_mask.numel(), device=loss_mask.device)
    starts = _document_starts(cu_seqlens, loss_mask.numel(), loss_mask.device)
    before_assistant = loss_mask.bool()[1:] & (starts[1:] == starts[:-1])
    return before_assistant.nonzero().squeeze(-1)


def _document_starts(cu_seqlens: Tensor, length: int, device: torch.device) -> Tensor:
    """[T] where each position's document begins."""
    starts = torch.zeros(length, dtype=torch.long, device=device)
    borders = cu_seqlens.to(device=device, dtype=torch.long)[:-1]
    borders = borders[borders < length]
    starts[borders] = borders
    return starts.cummax(0).values


def padded_positions(positions: Tensor, cu_seqlens: Tensor, width: int) -> Tensor:
    """Positions [R] of a packed row as positions in the flattened [B · width] padded batch of the same documents."""
    cu_seqlens = cu_seqlens.to(positions.device)
    document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    return positions - cu_seqlens[document] + document * width
