"""Lossless verification (Leviathan et al. 2023, arXiv 2211.17192): pure functions of p, q and the uniforms.

Shapes: K draft tokens, V vocabulary. p_k is the target's distribution of the token at draft position k, given all
drafts before it; p_K is that of the token after the last draft. q_k is the distribution that draft k was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Verdict(NamedTuple):
    """Result of a verification.

    Attributes:
        accepted: [] number of accepted drafts, 0 … K.
        token: [] the token after them: from the residual after a rejection, from p_K if all were accepted.
        overlap: [K] Σ_v min(p_k, q_k), the probability with which a draft from q_k is accepted.
    """

    accepted: Tensor
    token: Tensor
    overlap: Tensor


def verify(target: Tensor, draft: Tensor | None, tokens: Tensor, uniforms: Tensor) -> Verdict:
    """Accept draft k with probability min(1, p_k(y_k)/q_k(y_k)); at the first rejection draw from max(p_k − q_k, 0).

    Args:
        target: [K+1, V] the probabilities p_0 … p_K.
        draft: [K, V] the probabilities q_0 … q_{K−1}; None for greedy drafts, whose q_k is a point mass on the token.
        tokens: [K] the drafts y_0 … y_{K−1}.
        uniforms: [K+1] in [0, 1), the last of them for the token after the accepted drafts.
    """
    count, vocab = tokens.shape[0], target.shape[-1]
    if draft is None:
        draft = F.one_hot(tokens, vocab).to(target.dtype)
    column = tokens.unsqueeze(-1)
    p, q = target[:count].gather(-1, column).squeeze(-1), draft.gather(-1, column).squeeze(-1)
    # u·q < p has probability min(1, p/q), is never true for p = 0, and needs no division.
    accepted = (uniforms[:count] * q < p).long().cumprod(0).sum()
    # After K acceptances nothing is subtracted: the token comes from p_K itself.
    residual = (target[accepted] - F.pad(draft, (0, 0, 0, 1))[accepted]).clamp(min=0)
    # The residual is zero everywhere only by rounding; p and q are then equal.
    residual = torch.where(residual.sum() > 0, residual, target[accepted])
    return Verdict(accepted, draw(residual, uniforms[count]), torch.minimum(target[:count], draft).sum(-1))


def verify_greedy(target: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """`verify` for one-hot p_k: drafts are accepted as long as they are the target's most likely tokens.

    Args:
        target: K+1 tokens, the most likely ones of p_0 … p_K.
        tokens: K drafts.

    Returns:
        The number of accepted drafts and the token after them.
    """
    path, last = verify_tree(range(len(tokens)), target, tokens)
    return len(path), last


def verify_tree(parents: Sequence[int], target: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], int]:
    """`verify_greedy` for a draft tree: walk from the root to the child that is the target's most likely token, as long
    as there is one. Siblings have different tokens, so there is at most one.

    Args:
        parents: of the nodes 1 … N, each smaller than its node; 0 is the root.
        target: N+1 tokens, the most likely ones after the root and after every node.
        tokens: of the nodes 1 … N.

    Returns:
        The accepted nodes from the root on, and the token after them.
    """
    place, accepted = 0, []
    for node, parent in enumerate(parents, 1):
        if parent == place and tokens[node - 1] == target[place]:
            place = node
            accepted.append(node)
    return accepted, target[place]


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token by the inverse of the cumulative distribution.

    Args:
        weights: [..., V] probabilities up to a factor, not all zero.
        uniform: [...] in [0, 1).

    Returns:
        [...] token ids, never one of weight zero.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[..., -1:]
    # A product that rounds up to the total would select a token after the last one.
    threshold = torch.minimum(uniform.double().unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
