"""Drafts of EAGLE-3 after every position of a text, to compare with a second implementation's."""

import torch

from verl_speculator.models.speculator import TokenBatch

D, V = 20, 61
LENGTH = 9


def text(count):
    """States [n, 3D] of a text, and its tokens with `count` more."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(LENGTH + count, 3 * D, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(V, (LENGTH + count,), generator=generator)


def logits(speculator, hidden, tokens, count):
    """[rows, count, V] of ours for the drafts after each of the first `LENGTH` positions."""
    rows = torch.arange(LENGTH)
    after = torch.stack([tokens[row + 1 : row + 1 + count] for row in range(LENGTH)])
    batch = TokenBatch(tokens, torch.tensor([[0, len(tokens)]]), rows)
    states = speculator.unroll(speculator.draft_states(hidden[None], after, batch), after)
    return torch.stack([speculator.logits(k, states[k]) for k in range(count)], dim=1)


def check_drafts(read, speculator, count=3):
    """That a reader, from (states, tokens, count) to logits, computes what ours does, after every position."""
    hidden, tokens = text(count)
    ours = logits(speculator, hidden, tokens, count)
    for row in range(LENGTH):
        expected = read(hidden[: row + 1], tokens[1 : row + 1 + count], count)
        torch.testing.assert_close(expected, ours[row], rtol=1e-9, atol=1e-9)
