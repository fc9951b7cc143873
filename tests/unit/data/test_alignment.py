"""The shift against a brute-force reading of its definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_speculator.data.alignment import align, padded_positions

END = 9


def reference(documents, n_predict):
    """(t, k) -> target over the packed row, straight from the definition."""
    pairs, offset = {}, 0
    for tokens, mask in documents:
        for t in range(len(tokens)):
            for k in range(n_predict):
                target = t + 2 + k
                if target >= len(tokens) or not all(mask[t + 1 : target + 1]):
                    continue
                begin = t + 1  # the turn that the target lies in begins here or before
                while begin > 0 and mask[begin - 1]:
                    begin -= 1
                if END in tokens[begin:target]:
                    continue
                pairs[offset + t, k] = tokens[target]
        offset += len(tokens)
    return pairs


def pack(documents):
    tokens = torch.tensor([token for document in documents for token in document[0]], dtype=torch.long)
    mask = torch.tensor([m for document in documents for m in document[1]], dtype=torch.long)
    lengths = torch.tensor([0] + [len(document[0]) for document in documents])
    return tokens, mask, lengths.cumsum(0)


def valid_pairs(rows):
    return {
        (int(t), k): int(rows.targets[k, r])
        for r, t in enumerate(rows.positions)
        for k in range(len(rows.valid))
        if rows.valid[k, r]
    }


document = st.lists(st.tuples(st.integers(0, END), st.integers(0, 1)), min_size=1, max_size=14).map(
    lambda pairs: ([token for token, _ in pairs], [mask for _, mask in pairs])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(document, min_size=1, max_size=4), st.integers(1, 5))
def test_pairs_are_those_of_the_definition(documents, n_predict):
    tokens, mask, cu_seqlens = pack(documents)
    rows = align(tokens, mask, cu_seqlens, n_predict, [END])
    assert valid_pairs(rows) == reference(documents, n_predict)
    assert rows.valid[0].all(), "a row without a valid pair was kept"
    assert (rows.valid[1:] <= rows.valid[:-1]).all(), "a deeper pair is valid where an earlier one is not"
    for r, t in enumerate(rows.positions.tolist()):
        for k in range(n_predict):
            if rows.valid[k, r]:  # a valid pair reads the tokens right behind its position
                assert rows.tokens[r, : k + 1].tolist() == tokens[t + 1 : t + 2 + k].tolist()
                # The base predicts a target at the position right before it.
                assert rows.targets[k, r] == tokens[rows.teachers[k, r] + 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(document, min_size=2, max_size=4), st.integers(1, 4))
def test_packed_equals_separate(documents, n_predict):
    together = valid_pairs(align(*pack(documents), n_predict, [END]))
    apart, offset = {}, 0
    for each in documents:
        rows = align(*pack([each]), n_predict, [END])
        apart |= {(t + offset, k): target for (t, k), target in valid_pairs(rows).items()}
        offset += len(each[0])
    assert together == apart


def test_worked_example():
    a, b, c, d, e, f = range(6)
    rows = align(*pack([([a, b, c, d, e, f], [0, 0, 1, 1, 1, 1])]), 2, [END])
    assert valid_pairs(rows) == {(1, 0): d, (1, 1): e, (2, 0): e, (2, 1): f, (3, 0): f}
    assert rows.tokens.tolist() == [[c, d], [d, e], [e, f]]


def test_the_newline_behind_the_end_token_is_no_target():
    tokens, newline = [1, 2, 3, END], 4
    rows = align(*pack([([*tokens, newline], [0, 1, 1, 1, 1])]), 3, [END])
    assert newline not in valid_pairs(rows).values()
    assert END in valid_pairs(rows).values()


def test_no_draft_crosses_into_the_users_turn():
    # user 1, assistant 2 3 END, user 5 6, assistant 7 8 END
    document = ([1, 2, 3, END, 5, 6, 7, 8, END], [0, 1, 1, 1, 0, 0, 1, 1, 1])
    rows = align(*pack([document]), 5, [END])
    assert set(valid_pairs(rows)) == {(0, 0), (0, 1), (1, 0), (5, 0), (5, 1), (6, 0)}


def test_plain_text_has_no_end_tokens():
    rows = align(*pack([([1, END, 2, 3], [1, 1, 1, 1])]), 1, [])
    assert valid_pairs(rows) == {(0, 0): 2, (1, 0): 3}


def test_padded_positions():
    cu_seqlens = torch.tensor([0, 3, 5, 9])
    assert padded_positions(torch.tensor([0, 2, 3, 4, 5, 8]), cu_seqlens, 4).tolist() == [0, 2, 4, 5, 8, 11]
