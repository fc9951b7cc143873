"""Whether a base keeps the documents of a packed row apart. Asked of the base itself, before it trains.

Documents are packed without a mask: their borders are where `position_ids` start again. Some architectures make their
mask from the row's length alone, some run a state through the whole row, and some cut attention at multiples of a
length that they count from the row's start. There every document would depend on those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The first document has an odd length, about half a block of 16 and of 32: blocks that a base counts from the row's
# start then fall elsewhere in the second than they do in it alone, and for more than half of its tokens.
LENGTH, LONG = 23, 32
# Far above what rounding gives in bf16 (about 0.01), far below what another document does (above 0.1 everywhere).
TOLERANCE = 5e-2
TEXT = "The cat sat on the mat. Two and two are 4, isn't it? A river runs; it has 10 bends - all of them deep."


def probe_documents(tokenizer: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Two documents of token ids that show, packed, whether the second one depends on the first.

    Args:
        tokenizer: of the base.
        config: the base's text configuration. With chunks of attention the second document has their border inside.
    """
    known = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    chunk = getattr(config, "attention_chunk_size", None)
    first_length = LENGTH if chunk is None else chunk - min(LENGTH // 2, chunk // 4)
    random = torch.Generator().manual_seed(0)
    first, second = (known[torch.randint(len(known), (length,), generator=random)] for length in (first_length, LONG))
    return first, second


@torch.no_grad()
def packing_error(run: Callable[[Sequence[Tensor]], Tensor], documents: Sequence[Tensor]) -> float:
    """How far the states of packed documents are from those of each alone, as a share of those.

    Of each document it is the median over its tokens or, if that is larger, what both of its first two tokens have: a
    state that runs on is soon forgotten, and rounding that sends a token to another expert is no dependence.

    Args:
        run: gives the states [T, D] of documents in one packed row.
        documents: token ids, [t] each.
    """
    packed = run(documents).split([len(document) for document in documents])
    worst = []
    for together, document in zip(packed, documents, strict=True):
        alone = run([document]).float()
        errors = (together.float() - alone).norm(dim=-1) / alone.norm(dim=-1)
        worst += [errors[:2].min(), errors.median()]
    return torch.stack(worst).max().item()
