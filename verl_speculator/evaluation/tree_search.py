"""Search for a draft tree: at which ranks a speculator drafts the tokens of the base model's own answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from verl_speculator.decoding import DraftTree, speculative_generate
from verl_speculator.decoding.target import position_limit
from verl_speculator.decoding.tree import most_frequent, prefix_counts
from verl_speculator.evaluation.metrics import Document
from verl_speculator.evaluation.prompts import Prompt, prompt_ids
from verl_speculator.models import Speculator
from verl_speculator.utils.process import evenly_spaced, progress_bar
from verl_speculator.utils.settings import UserError

# Ranks with a column of their own in the report; the others share one.
SHOWN_RANKS = 4


@dataclass(frozen=True)
class RankSample:
    """Ranks of the K tokens of the base model's answers behind each position at which all depths are valid."""

    answers: int
    paths: list[tuple[int, ...]]

    def tau(self, tree: DraftTree) -> float:
        """Expected acceptance length: 1 + Σ over the nodes of the share of paths that begin with the node's ranks.

        All positions count alike. In decoding, rounds begin where the last one ended, so that its τ differs a little.
        """
        counts = prefix_counts(self.paths)
        return 1 + sum(counts.get(path, 0) for path in tree.paths) / len(self.paths)

    def chosen(self, nodes: int) -> tuple[DraftTree, dict[str, Any]]:
        """The tree of `nodes` nodes with the largest τ, and the figures that led to it."""
        tree = most_frequent(self.paths, nodes)
        depths = zip(*self.paths, strict=True)
        return tree, {
            "answers": self.answers,
            "positions": len(self.paths),
            "rank_shares": [[round(ranks.count(i) / len(ranks), 4) for i in range(SHOWN_RANKS)] for ranks in depths],
            "tau_chain": round(self.tau(DraftTree.chain(len(self.paths[0]))), 4),
            "tau_tree": round(self.tau(tree), 4),
        }


def sample_ranks(
    base: nn.Module,
    tokenizer: Any,
    speculator: Speculator,
    prompts: Sequence[Prompt],
    *,
    ends: Collection[int],
    num_prompts: int,
    max_new_tokens: int,
) -> RankSample:
    """Let the base model, in evaluation mode, answer greedily, and rank the tokens of its answers in the speculator's
    drafts. Every turn of `num_prompts` prompts (0 for all) is answered, up to one that exceeds the base's positions.
    Raises UserError if no answer is long enough for all depths."""
    limit, paths, answers = position_limit(base), [], 0
    with progress_bar() as progress:
        for index in progress.track(evenly_spaced(len(prompts), num_prompts), description="answers"):
            replies: list[str] = []
            for _ in range(prompts[index].num_turns):
                ids = prompt_ids(prompts[index], tokenizer, replies)
                if limit is not None and len(ids) >= limit:
                    break
                options = {"max_new_tokens": max_new_tokens, "eos_token_id": tuple(ends)}
                answer = speculative_generate(base, speculator, ids, **options).tokens
                replies.append(tokenizer.decode(answer, skip_special_tokens=True))
                answers += 1
                document = Document(base, ids + answer, [0] * len(ids) + [1] * len(answer))
                paths += map(tuple, document.ranks(speculator, ends).tolist())
    if not paths:
        length = f"{speculator.n_predict} tokens, the speculator's n_predict"
        raise UserError(f"prompts: none of {answers} answers has more than {length}; expected longer ones")
    return RankSample(answers, paths)
