"""Speculators for the tests: one quickly trained, and ones that know the text and agree or disagree on purpose."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.base_model import loading
from verl_speculator.data.alignment import align
from verl_speculator.decoding import SamplingPolicy, speculative_generate
from verl_speculator.models import DraftState, Speculator
from verl_speculator.models.layers import block_shapes


@functools.cache
def load_base(folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A base in evaluation mode."""
    return loading.load_base(folder, device="cpu", dtype=dtype)


def alone(base: nn.Module, prompt: list[int], count: int, **settings) -> list[int]:
    """What Hugging Face's generate says after a prompt, greedily."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | settings
    return base.generate(ids, max_new_tokens=count, **settings)[0, len(prompt) :].tolist()


@torch.no_grad()
def states_of(base: nn.Module, tokens: list[int]) -> torch.Tensor:
    """[T, D] the base's states after its final norm."""
    return base.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def untrained_speculator(base: nn.Module, n_predict: int, **settings) -> Speculator:
    """A speculator of random weights in float64."""
    vocab, width = base.get_output_embeddings().weight.shape
    config = SpeculatorConfig(**({"n_predict": n_predict, "inner_dim": 16, "emb_dim": 16, "proj_dim": 16} | settings))
    shape = {"hidden_size": width, "vocab_size": vocab, "draft_tokens": every_other(config.draft_vocab_size)}
    return build_speculator(config, **shape, block_shapes=block_shapes(base, config), seed=3, dtype=torch.float64)


def every_other(size: int | None) -> list[int] | None:
    """A draft vocabulary whose ids are not those of the rows."""
    return None if size is None else [2 * i + 1 for i in range(size)]


def assert_third_token_has_base_distribution(
    base: nn.Module, speculator: Speculator, prompt: list[int], policy: SamplingPolicy, *, draws: int, **settings
) -> None:
    """Chi-square test of the third token, whose exact distribution sums over all first and second ones. Seeded."""
    with torch.no_grad():
        first = policy.probabilities(base(torch.tensor([prompt])).logits[0, -1])
        exact = torch.zeros_like(first)
        for token in first.nonzero().flatten().tolist():
            second = policy.probabilities(base(torch.tensor([[*prompt, token]])).logits[0, -1])
            following = second.nonzero().flatten()
            batch = torch.tensor([[*prompt, token, other] for other in following.tolist()])
            third = policy.probabilities(base(batch).logits[:, -1])
            exact += first[token] * (second[following, None] * third).sum(0)
    counts = torch.zeros_like(exact)
    settings = {"temperature": policy.temperature, "top_k": policy.top_k, "eos_token_id": ()} | settings
    for seed in range(draws):
        result = speculative_generate(base, speculator, prompt, max_new_tokens=3, seed=seed, **settings)
        counts[result.tokens[2]] += 1
    assert counts[exact == 0].sum() == 0
    expected = exact * draws
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    possible = expected > 0
    statistic, freedom = float(((observed - expected) ** 2 / expected)[possible].sum()), int(possible.sum()) - 1
    # The 99.9 % quantile of chi-square, by Wilson and Hilferty.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def train_quickly(base: nn.Module, texts: list[list[int]], *, steps: int = 60, **settings) -> Speculator:
    """A speculator that has learnt these texts by heart, more or less."""
    config = SpeculatorConfig(**({"n_predict": 3, "inner_dim": 32, "emb_dim": 32, "proj_dim": 32} | settings))
    vocab, width = base.get_output_embeddings().weight.shape
    dtype = next(base.parameters()).dtype
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0, dtype=dtype)
    hidden = torch.cat([states_of(base, text) for text in texts])
    borders = torch.tensor([0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()])
    tokens = torch.tensor([token for text in texts for token in text])
    rows = align(tokens, torch.ones_like(tokens), borders, config.n_predict, ())
    optimizer = torch.optim.Adam(speculator.parameters(), lr=1e-2)
    for _ in range(steps):
        states = speculator.unroll(hidden[rows.positions], rows.tokens)
        loss = sum(
            F.cross_entropy((states[k] @ speculator.head(k).T)[rows.valid[k]], rows.targets[k][rows.valid[k]])
            for k in range(config.n_predict)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return speculator.eval()


class Oracle(Speculator):
    """Knows the text: finds its place by the hidden state, and drafts what comes, or something else on purpose.

    Args:
        base: whose text it is.
        text: prompt and answer.
        agrees: for each depth, whether the draft is the text's own token.
    """

    method = "oracle"

    def __init__(self, base: nn.Module, text: list[int], agrees: list[bool]) -> None:
        vocab, width = base.get_output_embeddings().weight.shape
        super().__init__(SpeculatorConfig(n_predict=len(agrees)), hidden_size=width, vocab_size=vocab)
        self.states, self.text, self.agrees = states_of(base, text), text, agrees
        self.eye = nn.Parameter(torch.eye(vocab, dtype=self.states.dtype), requires_grad=False)

    def start(self, hidden: torch.Tensor) -> DraftState:
        distance = (self.states - hidden).abs().amax(-1)
        assert distance.min() < 1e-9, "the hidden state is none of the text's"
        return DraftState(hidden, distance.argmin(), 0)

    def step(self, state: DraftState, token: torch.Tensor) -> DraftState:
        place = int(state.cell) + 2 + state.depth
        following = self.text[place] if place < len(self.text) else 0
        if not self.agrees[state.depth]:
            following = (following + 1) % self.vocab_size
        return DraftState(self.eye[following][None], state.cell, state.depth + 1)

    def head(self, depth: int) -> torch.Tensor:
        return self.eye


class Ranked(Speculator):
    """Knows the text and drafts what comes as its token of some rank, behind tokens that are all wrong.

    Unlike `Oracle` it takes several rows, as trees do. What follows a wrong token is drafted as if it had been right.

    Args:
        base: whose text it is.
        text: prompt and answer.
        ranks: for each depth, the ranks of the text's own token, by its place in the text in turn.
    """

    method = "ranked"

    def __init__(self, base: nn.Module, text: list[int], ranks: list[list[int]]) -> None:
        vocab, width = base.get_output_embeddings().weight.shape
        super().__init__(SpeculatorConfig(n_predict=len(ranks)), hidden_size=width, vocab_size=vocab)
        self.states, self.text, self.ranks = states_of(base, text), text, ranks
        self.eye = nn.Parameter(torch.eye(vocab, dtype=self.states.dtype), requires_grad=False)

    def start(self, hidden: torch.Tensor) -> DraftState:
        distance = (self.states - hidden).abs().amax(-1)
        # Eager attention takes its softmax in float32.
        assert distance.min() < 1e-4, "the hidden state is none of the text's"
        return DraftState(hidden, distance.argmin().view(1, 1), 0)

    def step(self, state: DraftState, token: torch.Tensor) -> DraftState:
        scores = torch.zeros(len(token), self.vocab_size, dtype=self.eye.dtype)
        for row, (place,) in enumerate((state.cell + 2 + state.depth).tolist()):
            following = self.text[place] if place < len(self.text) else 0
            ranks = self.ranks[state.depth]
            order = [(following + 1 + i) % self.vocab_size for i in range(10)]
            order.insert(ranks[place % len(ranks)], following)
            scores[row, order] = torch.arange(len(order), 0, -1, dtype=scores.dtype)
        return DraftState(scores, state.cell, state.depth + 1)

    def head(self, depth: int) -> torch.Tensor:
        return self.eye
