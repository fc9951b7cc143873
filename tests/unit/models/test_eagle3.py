"""EAGLE-3: what training computes is what drafting computes, for every row, and no row reads what it must not."""

from __future__ import annotations

import pytest
import torch

from helpers.drafters import alone, load_base, untrained_speculator
from verl_speculator.base_model.hidden_states import HiddenStateHook
from verl_speculator.config.schema import LayerShape, SpeculatorConfig, default_aux_layers
from verl_speculator.data.alignment import align
from verl_speculator.decoding import DraftTree, SamplingPolicy, speculative_generate
from verl_speculator.decoding.drafters import SpeculatorDrafter
from verl_speculator.models import eagle3
from verl_speculator.models.speculator import TokenBatch
from verl_speculator.utils.settings import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]
LENGTHS = (14, 5, 19)
DEPTHS = 4
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 3), (0, 0, 0), (1, 0, 2), (1, 0, 2, 1)))
SETTINGS = {
    "one": {},
    "two": {"num_layers": 2, "draft_vocab_size": 100},
    "normed": {"norm_before_residual": True, "embedding": "own", "head": "own"},
}


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


def drafter_of(model, name, **more):
    """Of random weights, its norms too."""
    settings = {"method": "eagle3", "aux_layers": [0, 1, 2], "layer": vars(LayerShape.of(model.config))}
    speculator = untrained_speculator(model, DEPTHS, **settings, **SETTINGS[name], **more)
    speculator.attach(model)
    generator = torch.Generator().manual_seed(2)
    for parameter in speculator.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return speculator


def states_of(model, speculator, tokens, **more):
    """[1, T, 3D]"""
    with torch.no_grad(), HiddenStateHook(model, speculator.hidden_state_source) as hook:
        model(tokens[None], use_cache=False, **more)
    return hook.take()


@pytest.fixture(scope="module")
def documents():
    """Three, of which the first has two turns of the assistant."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(300, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.zeros(n, dtype=torch.long) for n in LENGTHS]
    masks[0][3:7] = masks[0][9:] = masks[1][2:] = masks[2][6:] = 1
    return tokens, masks


def packed(model, speculator, documents, width=None):
    """The documents one after the other, or padded to a width: states, `TokenBatch`, aligned rows, their documents."""
    tokens, masks = documents
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    rows = align(torch.cat(tokens), torch.cat(masks), borders, DEPTHS, ())
    starts = borders[:-1] if width is None else torch.arange(len(LENGTHS)) * width
    document = torch.searchsorted(borders, rows.positions, right=True) - 1
    count = int(borders[-1]) if width is None else width * len(LENGTHS)
    flat, states = torch.zeros(count, dtype=torch.long), torch.full((1, count, 96), torch.nan, dtype=torch.float64)
    for start, text in zip(starts.tolist(), tokens, strict=True):
        flat[start : start + len(text)] = text
        states[:, start : start + len(text)] = states_of(model, speculator, text)
    batch = TokenBatch(
        flat, torch.stack([starts, torch.tensor(LENGTHS)], 1), rows.positions - borders[document] + starts[document]
    )
    return states, batch, rows, document


def drafted_states(model, speculator, text, position):
    """[K, D] what decoding computes at each depth when the drafts are the text's own tokens, its cache filled in two
    pieces of the text."""
    drafter = SpeculatorDrafter(speculator, SamplingPolicy(0.0), sampled=False)
    states = states_of(model, speculator, text)[0]
    middle = (position + 1) // 2
    with torch.no_grad():
        if middle:
            drafter.begin(states[:middle], text[1 : middle + 1], middle)
        state = drafter.begin(states[middle : position + 1], text[middle + 1 : position + 2], position + 1)
        outputs = []
        for depth in range(min(DEPTHS, len(text) - position - 2)):
            state = speculator.step(state, text[position + 1 + depth : position + 2 + depth])
            outputs.append(state.output[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("width", [None, 24], ids=["packed", "padded"])
def test_training_computes_what_drafting_computes(model, documents, name, width):
    """Every valid pair, to 1e-12; padding holds no numbers at all."""
    speculator = drafter_of(model, name)
    states, batch, rows, document = packed(model, speculator, documents, width)
    with torch.no_grad():
        computed = speculator.unroll(speculator.draft_states(states, rows.tokens, batch), rows.tokens)
    compared = 0
    for row, (start, index) in enumerate(zip(batch.rows.tolist(), document.tolist(), strict=True)):
        position = start - int(batch.documents[index, 0])
        expected = drafted_states(model, speculator, documents[0][index], position)
        depths = int(rows.valid[:, row].sum())
        assert len(expected) >= depths > 0
        torch.testing.assert_close(computed[:depths, row], expected[:depths], rtol=1e-12, atol=1e-12)
        compared += depths
    assert compared == int(rows.valid.sum()) > 60


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_reads_nothing_later_and_no_other_document(model, documents, name):
    """By gradients: row t at depth j depends on states up to t of its document, and on its tokens up to t + 1 + j."""
    speculator = drafter_of(model, name)
    states, batch, rows, document = packed(model, speculator, documents)
    hidden = states.clone().requires_grad_()
    computed = speculator.unroll(speculator.draft_states(hidden, rows.tokens, batch), rows.tokens)
    for row in range(0, len(rows.positions), 5):
        for depth in range(int(rows.valid[:, row].sum())):
            (gradient,) = torch.autograd.grad(computed[depth, row].square().sum(), hidden, retain_graph=True)
            read = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
            start, position = int(batch.documents[document[row], 0]), int(rows.positions[row])
            assert read == list(range(start, position + 1))
    changed = rows.tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 300
    with torch.no_grad():
        other = speculator.unroll(speculator.draft_states(states, changed, batch), changed)
    assert torch.equal(other[:2], computed[:2]) and not torch.isclose(other[2], computed[2]).all(-1).any()


def test_computing_activations_again_changes_no_gradient(model, documents, monkeypatch):
    gradients = []
    for kept in (eagle3.KEPT_NUMBERS, 0):
        monkeypatch.setattr(eagle3, "KEPT_NUMBERS", kept)
        speculator = drafter_of(model, "two")
        states, batch, rows, _ = packed(model, speculator, documents)
        trained = [p.requires_grad_() for n, p in speculator.named_parameters() if "head" not in n]
        computed = speculator.unroll(speculator.draft_states(states, rows.tokens, batch), rows.tokens)
        gradients.append(torch.autograd.grad(computed.square().sum(), trained))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.any()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_the_greedy_text_is_the_base_models(model, name, tree):
    text = alone(model, PROMPT, 40, eos_token_id=None)
    speculator = drafter_of(model, name)
    result = speculative_generate(model, speculator, PROMPT, max_new_tokens=40, eos_token_id=(), draft_tree=tree)
    assert result.tokens == text


def test_a_tree_without_branches_drafts_what_a_chain_drafts(model):
    """Also after rejections: the caches hold accepted positions alone."""
    speculator = drafter_of(model, "two")
    chain = DraftTree(tuple((0,) * depth for depth in range(1, DEPTHS + 1)))
    results = [
        speculative_generate(model, speculator, PROMPT, max_new_tokens=60, eos_token_id=(), draft_tree=tree)
        for tree in (None, chain)
    ]
    assert [r.accepted for r in results[0].rounds] == [r.accepted for r in results[1].rounds]


@pytest.mark.parametrize(
    ("count", "layers"),
    [(32, [2, 16, 29]), (28, [2, 14, 25]), (6, [2, 3, 5]), (4, [1, 2, 3]), (3, [1, 2, 3]), (2, [0, 1, 2])],
)
def test_default_aux_layers(count, layers):
    """vLLM's own where these are three, else as far apart as possible."""
    assert default_aux_layers(count) == layers


def test_a_base_of_one_layer_is_refused():
    with pytest.raises(UserError, match=r"method=eagle3: the base has 1 decoder layer; expected at least 2"):
        default_aux_layers(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux_layers": [0, 1, 3]}, r"aux_layers=\[0, 1, 3\]: the base has 2 decoder layers; expected 0 to 2"),
        ({"aux_layers": [1, 0, 2]}, r"aux_layers=.*ascending"),
        ({"ttt_steps": 0}, r"ttt_steps=0"),
        ({"ttt_steps": 1, "n_predict": 0}, r"n_predict=0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        SpeculatorConfig(method="eagle3", **settings).for_base(model.config)


def test_ttt_steps_and_n_predict_default_to_each_other():
    made = [SpeculatorConfig(method="eagle3", **settings) for settings in ({}, {"n_predict": 5}, {"ttt_steps": 3})]
    assert [(config.n_predict, config.depths) for config in made] == [(7, 7), (5, 5), (7, 3)]


def test_blocks_of_rows_change_nothing(model, documents, monkeypatch):
    computed = []
    for block in (eagle3.BLOCK, 3):
        monkeypatch.setattr(eagle3, "BLOCK", block)
        speculator = drafter_of(model, "two")
        states, batch, rows, _ = packed(model, speculator, documents)
        with torch.no_grad():
            computed.append(speculator.draft_states(states, rows.tokens, batch))
    torch.testing.assert_close(*computed, rtol=1e-12, atol=1e-12)
