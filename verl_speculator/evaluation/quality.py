"""How close the drafts' distributions are to the text and to the base, on held-out text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.alignment import DraftRows, align
from verl_speculator.models import Speculator
from verl_speculator.models.hidden_state import StateTap

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

    def _read(self, reads: str) -> Any:
        """What a speculator that `reads` this takes of the base; it runs once for each."""
        if reads not in self.taken:
            with StateTap(self.base, reads) as tap:
                self.logits = self.base(input_ids=self.tokens.unsqueeze(0), use_cache=False).logits[0]
                self.taken[reads] = tap.take()
        return self.taken[reads]

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
        borders = torch.tensor([0, len(self.tokens)])
        rows = align(self.tokens, self.mask, borders, speculator.depths, end_token_ids, ahead=speculator.config.ahead)
        speculator.attach(self.base)
        hidden = speculator.contextualise(self._read(speculator.reads))[0][rows.positions]
        return rows, speculator.unroll(hidden.to(speculator.head(0).dtype), rows.tokens)


def divergence(teacher: Tensor, draft: Tensor) -> Tensor:
    """[R] KL(p ‖ q) in nats, from logits [R, V]."""
    return F.kl_div(draft.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
