"""Verification is lossless: proved by enumerating every path, not sampled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from verl_speculator.decoding import SamplingPolicy, verify_greedy
from verl_speculator.decoding.verification import draw, verify
from verl_speculator.utils.settings import UserError

POLICIES = [
    SamplingPolicy(1.0),
    SamplingPolicy(0.6),
    SamplingPolicy(1.7, top_k=2),
    SamplingPolicy(0.9, top_p=0.7),
    SamplingPolicy(1.2, top_p=0.8, top_k=3),
    SamplingPolicy(0.0),
]


def pieces(function, uniforms, at):
    """The step function that `function` is of one uniform, the others fixed: (length, representative, value) of each
    piece. Found by bisection alone, so that nothing is taken from the code under test."""

    def value(u):
        return function([*uniforms[:at], u, *uniforms[at + 1 :]])

    def split(low, first, high, last):
        if first == last:
            return [(high - low, (low + high) / 2, first)]
        if high - low < 1e-12:
            return [(high - low, low, first)]
        middle = (low + high) / 2
        between = value(middle)
        return split(low, first, middle, between) + split(middle, between, high, last)

    merged, end = [], float(np.nextafter(1.0, 0))
    for length, where, result in split(0.0, value(0.0), end, value(end)):
        if merged and merged[-1][2] == result:
            merged[-1][0] += length
        else:
            merged.append([length, where, result])
    return merged


def rand_logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


class PrefixDistributions:
    """Target and draft distributions of every prefix, over a vocabulary of V."""

    def __init__(self, vocab, policy, seed):
        self.vocab, self.policy, self.seed = vocab, policy, seed
        self.rounds = {}

    def _distribution(self, prefix, which):
        place = sum((token + 1) * 7**i for i, token in enumerate(prefix)) + 100_003 * which + 1_000_003 * self.seed
        return self.policy.probabilities(rand_logits(self.vocab, seed=place))

    def target(self, prefix):
        return self._distribution(prefix, 0)

    def draft(self, prefix):
        return self._distribution(prefix, 1)


def round_distribution(prefixes, prefix, count, sampled):
    """Every outcome of one round after `prefix`, with its probability: {emitted tokens: probability}."""
    if prefix in prefixes.rounds:
        return prefixes.rounds[prefix]
    outcomes = prefixes.rounds[prefix] = {}
    vocab = prefixes.vocab
    for drafts in itertools.product(range(vocab), repeat=count):
        q = torch.stack([prefixes.draft(prefix + drafts[:k]) for k in range(count)])
        if sampled:
            chance = float(torch.stack([q[k, y] for k, y in enumerate(drafts)]).prod())
        else:
            chance = float(all(int(q[k].argmax()) == y for k, y in enumerate(drafts)))
        if not chance:
            continue
        p = torch.stack([prefixes.target(prefix + drafts[:k]) for k in range(count + 1)])
        arguments = (p, q if sampled else None, torch.tensor(drafts))

        def outcome(uniforms, arguments=arguments):
            verdict = verify(*arguments, torch.tensor(uniforms, dtype=torch.float64))
            return int(verdict.accepted), int(verdict.token)

        # The uniforms of the acceptances decide how many are accepted; then the last one picks the token.
        paths = [(1.0, [])]
        for at in range(count):
            longer = []
            for weight, fixed in paths:
                rest = [0.0] * (count + 1 - at)

                def number(uniforms, at=at):
                    return outcome(uniforms)[0] > at

                for length, where, _ in pieces(number, [*fixed, *rest], at):
                    longer.append((weight * length, [*fixed, where]))
            paths = longer
        for weight, fixed in paths:
            for length, _, (accepted, token) in pieces(outcome, [*fixed, 0.0], count):
                emitted = (*drafts[:accepted], token)
                outcomes[emitted] = outcomes.get(emitted, 0.0) + chance * weight * length
    return outcomes


def text_distribution(prefixes, length, count, sampled, prefix=()):
    """{tokens: probability} of the first `length` tokens, round after round."""
    if len(prefix) >= length:
        return {prefix[:length]: 1.0}
    outcomes = {}
    for emitted, chance in round_distribution(prefixes, prefix, count, sampled).items():
        for text, rest in text_distribution(prefixes, length, count, sampled, prefix + emitted).items():
            outcomes[text] = outcomes.get(text, 0.0) + chance * rest
    return outcomes


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("vocab", "count", "length"), [(3, 2, 3), (5, 1, 2)])
def test_verify_every_text_has_the_targets_probability(vocab, count, length, policy, sampled):
    prefixes = PrefixDistributions(vocab, policy, seed=vocab)
    outcomes = text_distribution(prefixes, length, count, sampled)
    assert sum(outcomes.values()) == pytest.approx(1, abs=1e-9)
    for text in itertools.product(range(vocab), repeat=length):
        expected = 1.0
        for i, token in enumerate(text):
            expected *= float(prefixes.target(text[:i])[token])
        assert outcomes.get(text, 0.0) == pytest.approx(expected, abs=1e-9), text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_verify_first_token_has_the_targets_probability_for_any_draft(count):
    """Also if p and q share no token, are equal, or q is a point mass."""
    uneven = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.25, 0.75])
    same = (torch.tensor([0.1, 0.2, 0.3, 0.4]),) * 2
    point = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1.0, 0, 0])
    for p, q in (uneven, same, point):
        prefixes = PrefixDistributions(4, POLICIES[0], 0)
        prefixes.target, prefixes.draft = lambda prefix, p=p: p.double(), lambda prefix, q=q: q.double()
        first = np.zeros(4)
        for emitted, chance in round_distribution(prefixes, (), count, True).items():
            first[emitted[0]] += chance
        np.testing.assert_allclose(first, p.numpy(), atol=1e-9)


def test_verify_overlap_is_the_acceptance_probability():
    prefixes = PrefixDistributions(5, POLICIES[1], 3)
    p = torch.stack([prefixes.target(()), prefixes.target((1,))])
    q = prefixes.draft(())[None]
    overlap = verify(p, q, torch.tensor([1]), torch.tensor([0.5, 0.5])).overlap
    accepted = sum(chance for emitted, chance in round_distribution(prefixes, (), 1, True).items() if len(emitted) == 2)
    assert float(overlap) == pytest.approx(accepted, abs=1e-9)
    assert float(overlap) == pytest.approx(float(torch.minimum(p[0], q[0]).sum()))


@given(st.lists(st.integers(0, 2), min_size=0, max_size=6), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_verify_greedy_equals_verify_with_one_hots(drafts, seed):
    target = torch.randint(3, (len(drafts) + 1,), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.nn.functional.one_hot(target, 3).double()
    uniforms = torch.rand(len(drafts) + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    verdict = verify(one_hot, None, torch.tensor(drafts, dtype=torch.long), uniforms)
    assert (int(verdict.accepted), int(verdict.token)) == verify_greedy(target.tolist(), drafts)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_draw_never_gives_a_token_of_weight_zero(weights, uniform):
    weights = torch.tensor(weights)
    if weights.sum() > 0:
        assert weights[draw(weights, torch.tensor(uniform, dtype=torch.float64))] > 0


def test_draw_largest_uniform_gives_the_last_token():
    weights = torch.tensor([0.3, 0.7, 0.0, 0.0], dtype=torch.float64)
    assert int(draw(weights * 3, torch.tensor(np.nextafter(1.0, 0)))) == 1


@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.greedy], ids=str)
def test_sampling_policy_equals_hugging_face_warpers(policy):
    logits = rand_logits(20, 50, seed=1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(policy.temperature)])
    if policy.top_k:
        warpers.append(TopKLogitsWarper(policy.top_k))
    if policy.top_p < 1:
        warpers.append(TopPLogitsWarper(policy.top_p))
    expected = warpers(None, logits).softmax(-1)
    torch.testing.assert_close(policy.probabilities(logits), expected, rtol=0, atol=1e-12)


def test_sampling_policy_greedy_is_one_hot():
    logits = rand_logits(7, 9, seed=2)
    probabilities = SamplingPolicy().probabilities(logits)
    assert torch.equal(probabilities.argmax(-1), logits.argmax(-1))
    assert set(probabilities.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1: expected a number ≥ 0"),
        ({"temperature": 1e-40}, "temperature=1e-40: expected 0 (greedy), or at least 0.001"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number ≥ 0"),
        ({"top_p": 0}, "top_p=0: expected a number in (0, 1]"),
        ({"top_p": 1.5}, "top_p=1.5: expected a number in (0, 1]"),
        ({"top_k": -2}, "top_k=-2: expected a whole number ≥ 0 (0 keeps all tokens)"),
    ],
)
def test_sampling_policy_out_of_range_raises(settings, message):
    with pytest.raises(UserError) as error:
        SamplingPolicy(**settings)
    assert str(error.value) == message
