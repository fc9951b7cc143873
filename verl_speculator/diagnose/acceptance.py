"""Greedy acceptance on fixed texts, as trained and as somebody has it who feeds the wrong thing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import HiddenStateHook
from verl_speculator.data.alignment import align, misaligned
from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.target import position_limit
from verl_speculator.evaluation.metrics import acceptance
from verl_speculator.models import Speculator


@dataclass(frozen=True)
class Acceptance:
    """How many drafts in a row are the text's own tokens, over every place of the texts.

    Attributes:
        rows: places that were counted.
        accepted: drafts per place.
        rate: of all drafts; 0 where nothing was counted.
        depths: [K] for each depth, the share accepted of what reached it; nan where nothing did.
    """

    rows: int
    accepted: float
    rate: float
    depths: tuple[float, ...]


Text = tuple[list[int], list[int]]  # tokens, and 1 where the assistant produced them


def answers(base: nn.Module, prompts: Sequence[list[int]], count: int, ends: Collection[int]) -> list[Text]:
    """Prompts with the base's own greedy answers of at most `count` tokens; those without room for one are left out."""
    limit, found = position_limit(base), []
    for ids in prompts:
        if limit is None or len(ids) + 2 <= limit:
            new = speculative_generate(base, None, ids, max_new_tokens=count, eos_token_id=tuple(ends)).tokens
            found.append(([*ids, *new], [0] * len(ids) + [1] * len(new)))
    return found


class AlignedTexts:
    """Texts with the base's states, which are computed once for each kind.

    Args:
        base: in evaluation mode.
        texts: what the drafts should be.
        ends: tokens that end a turn.
    """

    def __init__(self, base: nn.Module, texts: Sequence[Text], ends: Collection[int]) -> None:
        limit = position_limit(base)
        self.base, self.ends = base, ends
        self.texts = [(tokens[:limit], mask[:limit]) for tokens, mask in texts]
        self._states: dict[str, list[Any]] = {}

    @torch.inference_mode()
    def states(self, hidden_state_source: str) -> list[Any]:
        """What a speculator reads of every text: states [1, T, D], or the call of a block with them."""
        if hidden_state_source not in self._states:
            found = []
            for tokens, _ in self.texts:
                with HiddenStateHook(self.base, hidden_state_source) as tap:
                    self.base(input_ids=torch.tensor([tokens], device=self.base.device), use_cache=False)
                    found.append(tap.take())
            self._states[hidden_state_source] = found
        return self._states[hidden_state_source]

    @torch.inference_mode()
    def measure(
        self,
        speculator: Speculator,
        *,
        hidden_state_source: str | None = None,
        token_shift: int = 0,
        target_shift: int = 0,
    ) -> Acceptance:
        """Greedy acceptance at every place at which all depths have a target.

        Args:
            speculator: of this base.
            reads: which state it is fed; its own by default.
            token_shift, target_shift: as in `alignment.misaligned`.
        """
        depths, ahead = speculator.n_predict, speculator.config.first_offset
        histogram = np.zeros(depths + 1)
        speculator.attach(self.base)
        dtype = speculator.head(0).dtype
        for (tokens, mask), taken in zip(
            self.texts, self.states(hidden_state_source or speculator.hidden_state_source), strict=True
        ):
            states = speculator.prepare_hidden_states(taken)[0]
            ids, produced = (torch.tensor(x, device=states.device) for x in (tokens, mask))
            rows = align(ids, produced, torch.tensor([0, len(ids)]), speculator.depths, self.ends, first_offset=ahead)
            if token_shift or target_shift:
                rows = misaligned(rows, ids, token_shift=token_shift, target_shift=target_shift, first_offset=ahead)
            if not len(rows.positions):
                continue
            outputs = speculator.unroll(states[rows.positions].to(dtype), rows.tokens)
            drafts = torch.stack([speculator.logits(k, o).argmax(-1) for k, o in enumerate(outputs)])
            right, whole = drafts == rows.targets, rows.valid.all(0)
            if speculator.depths < depths:
                right, whole = _chained(right[0], whole, rows.positions, depths)
            accepted = right.long().cumprod(0).sum(0)[whole]
            histogram += np.bincount(accepted.cpu().numpy(), minlength=depths + 1)
        figures = acceptance(histogram, np.zeros(depths))
        rate = float(figures["accept_rate"]) if histogram.sum() else 0.0
        each = tuple(float(figures[f"accept_depth_{k}"]) for k in range(depths))
        return Acceptance(int(histogram.sum()), rate * depths, rate, each)


def _chained(right: Tensor, valid: Tensor, positions: Tensor, depths: int) -> tuple[Tensor, Tensor]:
    """For a draft whose every depth is its first one at the next token: [K, R'] whether the draft is right at each row
    and at those that follow it, and [R'] whether they do follow, all of them valid.

    Args:
        right, valid, positions: [R] of its one depth.
        depths: K.
    """
    count = len(right) - depths + 1
    if count < 1:
        return right.new_zeros(depths, 0), valid.new_zeros(0)
    follow = positions[depths - 1 :] - positions[:count] == depths - 1
    return right.unfold(0, depths, 1).T, valid.unfold(0, depths, 1).all(-1) & follow
