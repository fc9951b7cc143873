"""From counts to figures: acceptance, quality, speed, and their bootstrap intervals over prompts. Pure functions.

Shapes: P prompts (or documents), γ draft length, B bootstrap samples; `...` is nothing, or B.
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
from verl_speculator.models import Speculator

LEVEL = 0.95
SAMPLES = 1000

Figures = dict[str, np.ndarray]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, nan where there is nothing below."""
    below = np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def acceptance(
    histogram: np.ndarray, overlap: np.ndarray, drafted: np.ndarray | None = None, judged: np.ndarray | None = None
) -> Figures:
    """What pooled verification rounds say (math: "Lossless verification").

    Args:
        histogram: [..., γ+1] number of rounds in which exactly j drafts were accepted.
        overlap: [..., γ] sums of Σ_v min(p, q) over the rounds that reached the depth.
        drafted: [..., γ+1] number of rounds that drafted j tokens ahead; None where all drafted γ.
        judged: [..., γ] number of rounds that reached the depth with a draft there; None where all drafted γ.

    Returns:
        `accepted` = E[accepted drafts per round], `tau` = accepted + 1, `target_calls_per_token` = 1/τ, `accept_rate` =
        accepted/drafted, `accept_depth_k` = rounds that accepted depth k / rounds that reached it, `overlap` over all
        depths reached, `tv` = 1 − overlap.
    """
    histogram, overlap = np.asarray(histogram, dtype=float), np.asarray(overlap, dtype=float)
    length = histogram.shape[-1] - 1
    rounds = histogram.sum(-1)
    # [..., γ+1]: rounds in which at least j drafts were accepted, so those that reached depth j.
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
    """Token-weighted means, over all depths and per depth.

    Args:
        pairs: [..., K] valid (position, depth) pairs.
        sums: for each of `ce`, `kl`, `kl_training_temperature`, `top1`, `top5`: [..., K] sums over those pairs.
    """
    figures: Figures = {}
    for name, values in sums.items():
        figures[name] = _ratio(values.sum(-1), pairs.sum(-1))
        figures |= {f"{name}_depth_{k}": _ratio(values[..., k], pairs[..., k]) for k in range(pairs.shape[-1])}
    return figures | {name.replace("ce", "perplexity", 1): np.exp(figures[name]) for name in figures if name == "ce"}


def bootstrap(
    count: int, figures: Callable[[np.ndarray], Figures], *, seed: int, samples: int = SAMPLES
) -> dict[str, float]:
    """`NAME_lo` and `NAME_hi` of every figure: the percentile interval over resampled prompts.

    Args:
        count: P.
        figures: from [B, P], how often each prompt is in each sample, to [B] of each figure.
        seed: of the resampling.
        samples: B.
    """
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    edges = {"lo": (1 - LEVEL) / 2, "hi": (1 + LEVEL) / 2}
    found = {}
    for name, values in figures(weights).items():
        values = values[~np.isnan(values)]
        found |= {
            f"{name}_{edge}": float(np.quantile(values, at)) if len(values) else np.nan for edge, at in edges.items()
        }
    return found


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B] medians of values [N], each as often in a sample as weights [B, N] say; nan is left out."""
    kept = ~np.isnan(values)
    values, weights = values[kept], weights[..., kept]
    if not len(values):
        return np.full(weights.shape[:-1], np.nan)
    order = np.argsort(values)
    cumulative = weights[..., order].cumsum(-1)
    total = cumulative[..., -1:]
    # The values around the middle: their mean is the median, of an even number too.
    low = (cumulative >= total / 2).argmax(-1)
    high = (cumulative > total / 2).argmax(-1)
    return np.where(total[..., 0] > 0, (values[order][low] + values[order][high]) / 2, np.nan)


def speed(alone: np.ndarray, own: np.ndarray, weights: np.ndarray) -> Figures:
    """Medians over pairs of runs, one without and one with a speculator, in turn.

    Args:
        alone: [P, R] tokens per second of the base alone, R trials.
        own: [P, R] tokens per second.
        weights: [..., P] how often each prompt counts.
    """
    weights = np.repeat(weights, alone.shape[-1], axis=-1)
    return {
        "vanilla_tokens_per_s": weighted_median(alone.ravel(), weights),
        "speculative_tokens_per_s": weighted_median(own.ravel(), weights),
        "speedup": weighted_median((own / alone).ravel(), weights),
    }


MEASURES = ("ce", "kl", "kl_training_temperature", "top1", "top5")


class Document:
    """One document as the base reads it; every speculator is then measured on the same states and logits.

    Shapes: T tokens, K depths.

    Args:
        base: in evaluation mode.
        tokens: [T]
        mask: [T] 1 where the assistant produced the token.
    """

    def __init__(self, base: nn.Module, tokens: list[int], mask: list[int]) -> None:
        self.base = base
        self.tokens, self.mask = (torch.tensor(x, device=base.device) for x in (tokens, mask))
        self.taken: dict[str, Any] = {}

    def _read(self, hidden_state_source: str) -> Any:
        """What a speculator that `hidden_state_source` this takes of the base; it runs once for each."""
        if hidden_state_source not in self.taken:
            with HiddenStateHook(self.base, hidden_state_source) as tap:
                self.logits = self.base(input_ids=self.tokens.unsqueeze(0), use_cache=False).logits[0]
                self.taken[hidden_state_source] = tap.take()
        return self.taken[hidden_state_source]

    @torch.inference_mode()
    def measure(
        self, speculator: Speculator, end_token_ids: Collection[int], temperature: float
    ) -> dict[str, list[float]]:
        """Sums per depth over the valid pairs.

        Args:
            speculator: of this base.
            end_token_ids: tokens that end a turn.
            temperature: the one that `kl_training_temperature` softens both distributions with.

        Returns:
            `pairs` and, for each of MEASURES, [K] sums: cross-entropy against the text, KL(p ‖ q) to the base at
            temperature 1 and at the given one (nats, without the factor T² of a loss), and whether the text's token is
            the most likely one, or among the five.
        """
        rows, states = self._unroll(speculator, end_token_ids)
        sums: dict[str, list[float]] = {name: [] for name in ("pairs", *MEASURES)}
        for k, state in enumerate(states):
            valid = rows.valid[k]
            target = rows.targets[k][valid]
            draft = speculator.logits(k, state[valid]).float()
            teacher = self.logits[rows.teachers[k][valid]].float()
            best = draft.topk(min(5, draft.shape[-1])).indices == target[:, None]
            values = {
                "pairs": valid,
                "ce": F.cross_entropy(draft, target, reduction="none"),
                "kl": divergence(teacher, draft),
                "kl_training_temperature": divergence(teacher / temperature, draft / temperature),
                "top1": best[:, :1],
                "top5": best,
            }
            for name, value in values.items():
                sums[name].append(float(value.sum()))
        return sums

    @torch.inference_mode()
    def ranks(self, speculator: Speculator, end_token_ids: Collection[int]) -> Tensor:
        """[R, K] how many tokens each depth's draft holds for more likely than the document's own, given the document
        before it. Of the rows that have all depths.

        Args:
            speculator: of this base.
            end_token_ids: tokens that end a turn.
        """
        rows, states = self._unroll(speculator, end_token_ids)
        whole = rows.valid.all(0)
        found = []
        for k, state in enumerate(states):
            draft = speculator.logits(k, state[whole])
            own = draft.gather(-1, rows.targets[k][whole][:, None])
            found.append((draft > own).sum(-1))
        return torch.stack(found, dim=1)

    def _unroll(self, speculator: Speculator, end_token_ids: Collection[int]) -> tuple[DraftRows, Tensor]:
        """The document's rows, and the states [K, R, E] of all depths."""
        speculator.attach(self.base)
        taken = self._read(speculator.hidden_state_source)
        return align_and_unroll(speculator, taken, self.tokens, self.mask, end_token_ids)


def align_and_unroll(
    speculator: Speculator,
    taken: Any,
    tokens: Tensor,
    mask: Tensor,
    end_token_ids: Collection[int],
    *,
    token_shift: int = 0,
    target_shift: int = 0,
) -> tuple[DraftRows, Tensor]:
    """The rows of one document, and the states [K, R, E] of all depths.

    Args:
        speculator: attached to the base model.
        taken: what `HiddenStateHook` took while the base model read the document.
        tokens: [T]
        mask: [T] 1 where the assistant produced the token.
        end_token_ids: tokens that end a turn.
        token_shift, target_shift: as in `misaligned`, for diagnosis.
    """
    first_offset = speculator.config.first_offset
    borders = torch.tensor([0, len(tokens)])
    rows = align(tokens, mask, borders, speculator.depths, end_token_ids, first_offset=first_offset)
    if token_shift or target_shift:
        shifts = {"token_shift": token_shift, "target_shift": target_shift}
        rows = misaligned(rows, tokens, first_offset=first_offset, **shifts)
    hidden = speculator.prepare_hidden_states(taken)[0][rows.positions]
    return rows, speculator.unroll(hidden.to(speculator.head(0).dtype), rows.tokens)


def divergence(teacher: Tensor, draft: Tensor) -> Tensor:
    """[R] KL(p ‖ q) in nats, from logits [R, V]."""
    return F.kl_div(draft.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
