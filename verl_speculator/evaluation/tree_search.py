"""Choosing a draft tree: which of the draft's guesses the base's own tokens are, on a sample of its answers."""

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
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import progress_bar, spread

# Ranks that are told one by one; all others are one column.
SHOWN = 4


@dataclass(frozen=True)
class RankSample:
    """What was seen on the base's answers.

    Attributes:
        answers: how many there were.
        paths: for each position of theirs that has all depths, the ranks of the tokens that follow.
    """

    answers: int
    paths: list[tuple[int, ...]]

    def tau(self, tree: DraftTree) -> float:
        """E[accepted] + 1 of a tree, from every position alike: each node adds the share of paths that begin with it.

        DraftAndVerify of a text begin where the one before ended, so what decoding measures differs a little.
        """
        counts = prefix_counts(self.paths)
        return 1 + sum(counts.get(path, 0) for path in tree.paths) / len(self.paths)

    def shares(self) -> list[list[float]]:
        """For each depth, the share of the ranks 0 … SHOWN − 1: what each of a head's guesses is worth."""
        depths = zip(*self.paths, strict=True)
        return [[ranks.count(rank) / len(ranks) for rank in range(SHOWN)] for ranks in depths]

    def chosen(self, nodes: int) -> tuple[DraftTree, dict[str, Any]]:
        """The best tree of so many nodes, and the figures that say so."""
        tree, depths = most_frequent(self.paths, nodes), len(self.paths[0])
        return tree, {
            "answers": self.answers,
            "positions": len(self.paths),
            "rank_shares": [[round(share, 4) for share in shares] for shares in self.shares()],
            "tau_chain": round(self.tau(DraftTree.chain(depths)), 4),
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
    """Have the base answer greedily, and see under which ranks the speculator would have guessed it.

    Args:
        base: in evaluation mode.
        tokenizer: of the base.
        speculator: of this base; it also makes the answers quicker.
        prompts: all turns of each are answered; those that do not fit into the base's positions are left out.
        ends: tokens that end an answer.
        num_prompts: of the sample, at even distances; 0 for all.
        max_new_tokens: the most tokens of an answer.

    Raises:
        UserError: if no answer is long enough for all depths.
    """
    limit, paths, answers = position_limit(base), [], 0
    with progress_bar() as progress:
        for index in progress.track(spread(len(prompts), num_prompts), description="answers"):
            replies: list[str] = []
            for _ in range(prompts[index].num_turns):
                ids = prompt_ids(prompts[index], tokenizer, replies)
                if limit is not None and len(ids) >= limit:
                    break
                done = speculative_generate(
                    base, speculator, ids, max_new_tokens=max_new_tokens, eos_token_id=tuple(ends)
                )
                replies.append(tokenizer.decode(done.tokens, skip_special_tokens=True))
                answers += 1
                document = Document(base, ids + done.tokens, [0] * len(ids) + [1] * len(done.tokens))
                paths += map(tuple, document.ranks(speculator, ends).tolist())
    if not paths:
        raise UserError(
            f"prompts: none of {answers} answers has more than {speculator.n_predict} tokens, the speculator's "
            "n_predict; expected longer ones"
        )
    return RankSample(answers, paths)
