"""How many tokens are drafted: what pays, and the base's own text whatever that is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.drafters import Oracle, alone, load_base
from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.decoding import SamplingPolicy, speculative_generate
from verl_speculator.decoding.draft_length import AdaptiveLength, FixedLength, draft_length_policy, read_length
from verl_speculator.utils.errors import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]
COUNT = 40

# DraftAndVerify by the number of drafts that would be accepted if there were as many.
histories = st.lists(st.integers(0, 8), max_size=40)


def after(most: int, history: list[int]) -> AdaptiveLength:
    lengths = AdaptiveLength(most)
    for agreeing in history:
        drafted = lengths.choose()
        lengths.observe(drafted, min(drafted, agreeing))
    return lengths


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_between_one_and_n_predict_and_no_chance_involved(most, history):
    lengths = after(most, history)
    assert 1 <= lengths.choose() <= most
    assert lengths.choose() == lengths.choose() == after(most, history).choose()
    assert all(0 <= chance <= 1 for chance in lengths.chances())


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_the_length_is_the_best_for_its_cost(most, history):
    """By trying all of them; equally good ones count as one."""
    lengths = after(most, history)

    def worth(length: int) -> float:
        tokens, reach = 1.0, 1.0
        for chance in lengths.chances()[:length]:
            reach *= chance
            tokens += reach
        return tokens / (1 + 0.1 * length)

    assert worth(lengths.choose()) == pytest.approx(max(worth(length) for length in range(1, most + 1)))


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_it_rises_and_falls_with_what_is_accepted(most, history):
    """Wherever it stands: all the way down while nothing is accepted, and up again, deep ones never tried included."""
    assert after(most, history + [0] * 40).choose() == 1
    assert after(most, history + [0] * 40 + [8] * 40).choose() == most


@given(st.integers(1, 8), histories, st.integers(1, 8))
@settings(deadline=None)
def test_nothing_is_better_than_all_accepted(most, history, drafted):
    drafted = min(drafted, most)
    outcomes = []
    for accepted in range(drafted + 1):
        lengths = after(most, history)
        lengths.observe(drafted, accepted)
        outcomes.append((lengths.choose(), lengths.chances()))
    longest, highest = outcomes[-1]
    for length, chances in outcomes:
        assert length <= longest and all(a <= b + 1e-12 for a, b in zip(chances, highest, strict=True))


def test_names():
    assert isinstance(draft_length_policy(None, 5), FixedLength) and draft_length_policy(None, 5).choose() == 5
    assert draft_length_policy(2, 5).choose() == 2 and isinstance(draft_length_policy("auto", 5), AdaptiveLength)
    assert (read_length(None), read_length("auto"), read_length("3")) == (None, "auto", 3)
    with pytest.raises(UserError, match="draft_length=many: expected a whole number ≥ 1, or auto"):
        read_length("many")


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


def test_greedy_text_is_the_bases_own(model):
    text = alone(model, PROMPT, COUNT, eos_token_id=None)
    settings = {"max_new_tokens": COUNT, "eos_token_id": (), "draft_length": "auto"}
    for agrees, last in (([True] * 5, 5), ([False] * 5, 1), ([True, True, False, True, True], 2)):
        result = speculative_generate(model, Oracle(model, PROMPT + text, agrees), PROMPT, **settings)
        assert result.tokens == text and result.draft_length == 5
        drafted = [r.drafted for r in result.rounds[1:]]
        assert drafted[0] == 4 and (drafted[-2] == last or last == 2) and len(set(drafted)) > 1
        assert len(result.counted) == len(result.rounds) - 2 and result.nodes == result.drafted
        assert result.accepted <= result.drafted < 5


def test_the_last_position_is_no_choice(model):
    """DraftAndVerify that the base's last position shortens do not count."""
    limit = model.config.max_position_embeddings
    prompt = [(7 * i) % 300 for i in range(limit - 9)]
    text = alone(model, prompt, 9, eos_token_id=None)
    speculator = Oracle(model, prompt + text, [False] * 5)
    result = speculative_generate(model, speculator, prompt, max_new_tokens=50, eos_token_id=(), draft_length="auto")
    assert result.tokens == text
    assert all(r in result.counted for r in result.rounds[1:-1] if r.drafted > 1)


def test_sampled_text_is_seeded_and_has_the_bases_distribution(model):
    """Chi-square of the third token, drafted with a length that changes on the way. Seeded."""
    policy = SamplingPolicy(1.3, top_k=3)
    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16)
    vocab, width = model.get_output_embeddings().weight.shape
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=3, dtype=torch.float64)
    with torch.no_grad():
        first = policy.probabilities(model(torch.tensor([PROMPT])).logits[0, -1])
        exact = torch.zeros_like(first)
        for one in first.nonzero().flatten().tolist():
            second = policy.probabilities(model(torch.tensor([[*PROMPT, one]])).logits[0, -1])
            ways = second.nonzero().flatten()
            batch = torch.tensor([[*PROMPT, one, two] for two in ways.tolist()])
            exact += first[one] * (second[ways, None] * policy.probabilities(model(batch).logits[:, -1])).sum(0)
    settings = {"eos_token_id": (), "temperature": 1.3, "top_k": 3, "draft_length": "auto"}
    draws, counts = 400, torch.zeros_like(exact)
    for seed in range(draws):
        counts[speculative_generate(model, speculator, PROMPT, max_new_tokens=3, seed=seed, **settings).tokens[2]] += 1
    assert counts[exact == 0].sum() == 0
    expected = exact * draws
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    kept = expected > 0
    statistic, freedom = float(((observed - expected) ** 2 / expected)[kept].sum()), int(kept.sum()) - 1
    # The 99.9 % quantile of chi-square, by Wilson and Hilferty.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    again = [speculative_generate(model, speculator, PROMPT, max_new_tokens=30, seed=7, **settings) for _ in range(2)]
    assert again[0].tokens == again[1].tokens and again[0].rounds == again[1].rounds
    assert len({r.drafted for r in again[0].rounds[1:]}) > 1
