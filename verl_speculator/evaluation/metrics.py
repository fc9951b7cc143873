"""Acceptance, quality and speed with their bootstrap intervals, and the texts that quality is measured on.

Shapes: P prompts or texts, γ draft length, B bootstrap samples, T tokens, R rows, K depths, V vocabulary, E speculator
width. `...` is nothing, or B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import HiddenStateHook
from verl_speculator.data.alignment import DraftRows, align, misaligned
from verl_speculator.losses.reference import drafted_pairs
from verl_speculator.models import Speculator
from verl_speculator.models.speculator import TokenBatch

LEVEL = 0.95
SAMPLES = 1000
QUALITY_METRICS = ("ce", "kl", "kl_training_temperature", "top1", "top5", "coverage")

Figures = dict[str, np.ndarray]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=float)
    ratio = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=ratio, where=denominator > 0)


def acceptance(
    histogram: np.ndarray, overlap: np.ndarray, drafted: np.ndarray | None = None, judged: np.ndarray | None = None
) -> Figures:
    """Acceptance figures of pooled verification rounds (Leviathan et al. 2023, section 3.1).

    Args:
        histogram: [..., γ+1] number of rounds that accepted exactly j draft tokens.
        overlap: [..., γ] sums of Σ_v min(p, q) over the rounds that reached the depth.
        drafted: [..., γ+1] number of rounds that drafted j tokens; None if all drafted γ.
        judged: [..., γ] number of rounds that reached the depth with a draft token there; None if all drafted γ.

    Returns:
        `accepted` = E[accepted tokens per round], `tau` = accepted + 1, `target_calls_per_token` = 1/τ, `accept_rate` =
        accepted/drafted, `accept_depth_k` = rounds that accepted depth k / rounds that reached it, `overlap` over all
        depths reached, `tv` = 1 − overlap.
    """
    histogram, overlap = np.asarray(histogram, dtype=float), np.asarray(overlap, dtype=float)
    length = histogram.shape[-1] - 1
    rounds = histogram.sum(-1)
    # [..., γ+1]: rounds that accepted at least j draft tokens, so those that reached depth j.
    reached = histogram[..., ::-1].cumsum(-1)[..., ::-1]
    judged = reached[..., :length] if judged is None else np.asarray(judged, dtype=float)
    accepted_sum = (histogram * np.arange(length + 1)).sum(-1)
    drafted_sum = rounds * length if drafted is None else (drafted * np.arange(length + 1)).sum(-1)
    accepted = _ratio(accepted_sum, rounds)
    figures = {"accepted": accepted, "tau": accepted + 1, "target_calls_per_token": 1 / (accepted + 1)}
    if length:
        figures["accept_rate"] = _ratio(accepted_sum, drafted_sum)
        figures |= {f"accept_depth_{k}": _ratio(reached[..., k + 1], judged[..., k]) for k in range(length)}
        figures["overlap"] = _ratio(overlap.sum(-1), judged.sum(-1))
        figures["tv"] = 1 - figures["overlap"]
    return figures


def quality(pairs: np.ndarray, sums: Mapping[str, np.ndarray]) -> Figures:
    """Means over the [..., K] pairs of `Document.measure`, over all depths and for each depth, from the [..., K] sums
    of each of QUALITY_METRICS; of the cross-entropy over those whose token can be drafted."""
    figures: Figures = {}
    for name, values in sums.items():
        count = sums.get("coverage", pairs) if name == "ce" else pairs
        figures[name] = _ratio(values.sum(-1), count.sum(-1))
        figures |= {f"{name}_depth_{k}": _ratio(values[..., k], count[..., k]) for k in range(pairs.shape[-1])}
    return figures | {"perplexity": np.exp(figures["ce"])}


def bootstrap(count: int, figures: Callable[[np.ndarray], Figures], *, seed: int) -> dict[str, float]:
    """Percentile intervals over B = SAMPLES samples of P = `count` prompts, as `NAME_lo` and `NAME_hi` of every figure.

    `figures` maps [B, P], how often each prompt is in each sample, to [B] of each figure.
    """
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=SAMPLES)
    bounds = {}
    for name, values in figures(weights).items():
        values = values[~np.isnan(values)]
        for end, share in (("lo", (1 - LEVEL) / 2), ("hi", (1 + LEVEL) / 2)):
            bounds[f"{name}_{end}"] = float(np.quantile(values, share)) if len(values) else np.nan
    return bounds


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B] medians of values [N], each repeated as often as weights [B, N] say; NaN values are left out."""
    is_number = ~np.isnan(values)
    values, weights = values[is_number], weights[..., is_number]
    if not len(values):
        return np.full(weights.shape[:-1], np.nan)
    order = np.argsort(values)
    cumulative = weights[..., order].cumsum(-1)
    total = cumulative[..., -1:]
    # The median is the mean of the two values around the middle, which are the same value for an odd total.
    low = (cumulative >= total / 2).argmax(-1)
    high = (cumulative > total / 2).argmax(-1)
    return np.where(total[..., 0] > 0, (values[order][low] + values[order][high]) / 2, np.nan)


def speed(vanilla: np.ndarray, speculative: np.ndarray, weights: np.ndarray) -> Figures:
    """Medians over pairs of runs, from tokens per second [P, N] of the base model alone and of a method in N trials.

    Each prompt counts as often as `weights` [..., P] say.
    """
    weights = np.repeat(weights, vanilla.shape[-1], axis=-1)
    return {
        "vanilla_tokens_per_s": weighted_median(vanilla.ravel(), weights),
        "speculative_tokens_per_s": weighted_median(speculative.ravel(), weights),
        "speedup": weighted_median((speculative / vanilla).ravel(), weights),
    }


def verdict(tau: float, speedup: float, data_share: float | None = None) -> str:
    """In words, whether a speculator pays.

    A round takes τ / speedup times as long as a step of the base model alone, so that is the τ from which it pays.

    Args:
        tau: tokens per pass of the base model.
        speedup: over the base model alone, in the same runs.
        data_share: of the training rows that training has seen.
    """
    faster = "times as fast as" if speedup >= 1 else "times as fast, so slower than"
    text = f"{speedup:.2f} {faster} the base model alone: τ {tau:.2f}, break-even here {tau / speedup:.2f}"
    if speedup >= 1 or data_share is None or data_share >= 1:
        return text
    return f"{text}; trained on {data_share:.0%} of its data"


class Document:
    """A text with the base model's logits and hidden states, on which every speculator is measured.

    The base model, in evaluation mode, runs once for each kind of hidden state that the speculators read. `loss_mask`
    [T] is 1 where the assistant produced the token, and `ends` are the tokens that end a turn.
    """

    def __init__(self, base: nn.Module, tokens: list[int], loss_mask: list[int]) -> None:
        self.base = base
        self.tokens, self.loss_mask = torch.tensor([tokens, loss_mask], device=base.device)
        self._hidden_states: dict[str, Any] = {}

    def unroll(self, speculator: Speculator, ends: Collection[int]) -> tuple[DraftRows, Tensor]:
        """The rows of the text, and the speculator's states [K, R, E] at all depths."""
        source = speculator.hidden_state_source
        if source not in self._hidden_states:
            with HiddenStateHook(self.base, source) as hook:
                self.logits = self.base(input_ids=self.tokens.unsqueeze(0), use_cache=False).logits[0]
                self._hidden_states[source] = hook.take()
        speculator.attach(self.base)
        return align_and_unroll(speculator, self._hidden_states[source], self.tokens, self.loss_mask, ends)

    @torch.inference_mode()
    def measure(self, speculator: Speculator, ends: Collection[int], temperature: float) -> dict[str, list[float]]:
        """[K] sums over the valid pairs that drafting can reach: `pairs`, their number, and for each name of
        QUALITY_METRICS cross-entropy with the text, KL(base ‖ draft) at temperature 1 and at `temperature` (nats,
        without the factor T² of a distillation loss), whether the text's token is the draft's most likely one, or among
        its five most likely ones, and whether it can be drafted.

        With a draft vocabulary the divergences are those within it, as in training, and the cross-entropy, which would
        be infinite, counts the texts' tokens that can be drafted only: divide its sum by that of `coverage`."""
        rows, states = self.unroll(speculator, ends)
        targets, vocabulary = speculator.rows_of(rows.targets), speculator.draft_tokens
        reached = drafted_pairs(rows.valid, targets >= 0)
        sums: dict[str, list[float]] = {}
        for k, state in enumerate(states):
            valid = reached[k]
            target = targets[k][valid]
            draft = speculator.draft_logits(k, state[valid]).float()
            teacher = self.logits[rows.teachers[k][valid]].float()
            teacher = teacher if vocabulary is None else teacher[:, vocabulary]
            is_target = draft.topk(min(5, draft.shape[-1])).indices == target[:, None]
            values = {
                "pairs": valid,
                "ce": F.cross_entropy(draft, target, reduction="none", ignore_index=-1),
                "kl": _kl_divergence(teacher, draft),
                "kl_training_temperature": _kl_divergence(teacher / temperature, draft / temperature),
                "top1": is_target[:, :1],
                "top5": is_target,
                "coverage": target >= 0,
            }
            for name, value in values.items():
                sums.setdefault(name, []).append(float(value.sum()))
        return sums

    @torch.inference_mode()
    def ranks(self, speculator: Speculator, ends: Collection[int]) -> Tensor:
        """[R, K] rank of the text's own token among the draft tokens of each depth, 0 for the most likely one, in rows
        in which all depths are valid. The draft is given the text before the token."""
        rows, states = self.unroll(speculator, ends)
        is_complete = rows.valid.all(0)
        drafts = [speculator.logits(k, state) for k, state in enumerate(states[:, is_complete])]
        targets = rows.targets[:, is_complete, None]
        ranks = [(d > d.gather(-1, t)).sum(-1) for d, t in zip(drafts, targets, strict=True)]
        return torch.stack(ranks, dim=1)  # of a token that cannot be drafted, whose logit is −inf: V′, past every draft


def align_and_unroll(
    speculator: Speculator, hidden_states: Any, tokens: Tensor, loss_mask: Tensor, ends: Collection[int], **shifts: int
) -> tuple[DraftRows, Tensor]:
    """The rows of one text, and the speculator's states [K, R, E] at all depths.

    Args:
        speculator: attached to the base model.
        hidden_states: what `HiddenStateHook` took while the base model read the text.
        tokens: [T]
        loss_mask: [T] 1 where the assistant produced the token.
        ends: tokens that end a turn.
        shifts: `token_shift` and `target_shift` of `alignment.misaligned`, for diagnosis.
    """
    borders, offset = torch.tensor([0, len(tokens)]), speculator.config.first_offset
    rows = align(tokens, loss_mask, borders, speculator.depths, ends, first_offset=offset)
    if any(shifts.values()):
        rows = misaligned(rows, tokens, first_offset=offset, **shifts)
    batch = TokenBatch(tokens, torch.tensor([[0, len(tokens)]], device=tokens.device), rows.positions)
    hidden = speculator.draft_states(hidden_states, rows.tokens, batch)
    return rows, speculator.unroll(hidden.to(speculator.head(0).dtype), rows.tokens)


def _kl_divergence(teacher: Tensor, draft: Tensor) -> Tensor:
    """[R] KL(teacher ‖ draft) in nats, from logits [R, V]."""
    return F.kl_div(draft.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
