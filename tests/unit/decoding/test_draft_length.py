"""Draft lengths: the adaptive choice, and the base model's own text at any length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.drafters import (
    Oracle,
    alone,
    assert_third_token_has_base_distribution,
    load_base,
    untrained_speculator,
)
from verl_speculator.decoding import DraftTree, SamplingPolicy, speculative_generate
from verl_speculator.decoding.options import AdaptiveLength, most_drafts, read_length
from verl_speculator.utils.settings import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]
COUNT = 40

# Rounds, each as the number of drafts that would be accepted if there were as many.
histories = st.lists(st.integers(0, 8), max_size=40)


def observed(most: int, history: list[int]) -> AdaptiveLength:
    lengths = AdaptiveLength(most)
    for agreeing in history:
        drafted = lengths.choose()
        lengths.observe(drafted, min(drafted, agreeing))
    return lengths


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_adaptive_length_is_bounded_and_deterministic(most, history):
    lengths = observed(most, history)
    assert 1 <= lengths.choose() <= most
    assert lengths.choose() == lengths.choose() == observed(most, history).choose()
    assert all(0 <= chance <= 1 for chance in lengths.chances())


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_adaptive_length_maximises_tokens_per_cost(most, history):
    """By trying all of them; equally good ones count as one."""
    lengths = observed(most, history)

    def worth(length: int) -> float:
        tokens, reach = 1.0, 1.0
        for chance in lengths.chances()[:length]:
            reach *= chance
            tokens += reach
        return tokens / (1 + 0.1 * length)

    assert worth(lengths.choose()) == pytest.approx(max(worth(length) for length in range(1, most + 1)))


@given(st.integers(1, 8), histories)
@settings(deadline=None)
def test_adaptive_length_follows_acceptance_down_and_up(most, history):
    """From any state: down to 1 while nothing is accepted, and up to n_predict again, with depths never tried."""
    assert observed(most, history + [0] * 40).choose() == 1
    assert observed(most, history + [0] * 40 + [8] * 40).choose() == most


@given(st.integers(1, 8), histories, st.integers(1, 8))
@settings(deadline=None)
def test_adaptive_length_is_monotone_in_acceptance(most, history, drafted):
    drafted = min(drafted, most)
    outcomes = []
    for accepted in range(drafted + 1):
        lengths = observed(most, history)
        lengths.observe(drafted, accepted)
        outcomes.append((lengths.choose(), lengths.chances()))
    longest, highest = outcomes[-1]
    for length, chances in outcomes:
        assert length <= longest and all(a <= b + 1e-12 for a, b in zip(chances, highest, strict=True))


def test_most_drafts_and_read_length_of_each_setting():
    assert (most_drafts(None, 5), most_drafts(2, 5), most_drafts("auto", 5), most_drafts(None, 0)) == (5, 2, 5, 0)
    assert most_drafts(None, 5, DraftTree(((0,), (1,), (0, 0)))) == 2
    assert (read_length(None), read_length("auto"), read_length("3")) == (None, "auto", 3)
    with pytest.raises(UserError, match="draft_length=many: expected a whole number ≥ 1, or auto"):
        read_length("many")


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


def test_generate_auto_length_greedy_text_is_the_base_models(model):
    text = alone(model, PROMPT, COUNT, eos_token_id=None)
    settings = {"max_new_tokens": COUNT, "eos_token_id": (), "draft_length": "auto"}
    for agrees, last in (([True] * 5, 5), ([False] * 5, 1), ([True, True, False, True, True], 2)):
        result = speculative_generate(model, Oracle(model, PROMPT + text, agrees), PROMPT, **settings)
        assert result.tokens == text and result.draft_length == 5
        drafted = [r.drafted for r in result.rounds[1:]]
        assert drafted[0] == 4 and (drafted[-2] == last or last == 2) and len(set(drafted)) > 1
        assert len(result.counted) == len(result.rounds) - 2 and all(r.nodes == r.drafted for r in result.counted)
        assert result.accepted <= result.drafted < 5


def test_generate_auto_length_ignores_rounds_cut_by_the_position_limit(model):
    """Rounds that the position limit shortens do not count."""
    limit = model.config.max_position_embeddings
    prompt = [(7 * i) % 300 for i in range(limit - 9)]
    text = alone(model, prompt, 9, eos_token_id=None)
    speculator = Oracle(model, prompt + text, [False] * 5)
    result = speculative_generate(model, speculator, prompt, max_new_tokens=50, eos_token_id=(), draft_length="auto")
    assert result.tokens == text
    assert all(r in result.counted for r in result.rounds[1:-1] if r.drafted > 1)


def test_generate_auto_length_sampled_text_has_the_base_models_distribution(model):
    policy, speculator = SamplingPolicy(1.3, top_k=3), untrained_speculator(model, 2)
    assert_third_token_has_base_distribution(model, speculator, PROMPT, policy, draws=400, draft_length="auto")


def test_generate_auto_length_seed_reproduces_text_and_rounds(model):
    settings = {"eos_token_id": (), "temperature": 1.3, "top_k": 3, "draft_length": "auto", "seed": 7}
    speculator = untrained_speculator(model, 2)
    first, second = (speculative_generate(model, speculator, PROMPT, max_new_tokens=30, **settings) for _ in range(2))
    assert first.tokens == second.tokens and first.rounds == second.rounds
    assert len({r.drafted for r in first.rounds[1:]}) > 1
