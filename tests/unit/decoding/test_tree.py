"""Draft trees: the base model's own text along any branch, and a cache without the rejected ones."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.drafters import Ranked, alone, load_base, train_quickly, untrained_speculator
from helpers.tiny_models import ARCHITECTURES
from verl_speculator import SpeculatorConfig
from verl_speculator.base_model.cpu import GROUPED
from verl_speculator.decoding import DraftTree, read_tree, speculative_generate, speculative_stream
from verl_speculator.decoding.drafters import TreeDrafter
from verl_speculator.decoding.target import Target, TreeAttention
from verl_speculator.decoding.tree import MOST_NODES, most_frequent, prefix_counts, write_tree
from verl_speculator.decoding.verification import verify_tree
from verl_speculator.models import DraftState, Speculator
from verl_speculator.utils.settings import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]
COUNT = 30
# Sparse: nodes of rank 1 and 2 without their siblings, and branches of all depths.
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 3), (0, 0, 0), (1, 0, 2), (2, 3, 0), (1, 0, 2, 1)))

paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=20)
trees = paths.map(lambda several: DraftTree(tuple(prefix_counts(several))))


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


@pytest.fixture(scope="module")
def text(model):
    return alone(model, PROMPT, COUNT, eos_token_id=None)


def generate(base, speculator, tree, **settings):
    settings = {"max_new_tokens": COUNT, "eos_token_id": ()} | settings
    return speculative_generate(base, speculator, PROMPT, draft_tree=tree, **settings)


# The text.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("draft", ["second", "changing", "absent", "random", "trained"])
def test_generate_tree_greedy_text_is_the_base_models(bases, architecture, draft):
    base = load_base(bases[architecture])
    text = alone(base, PROMPT, COUNT, eos_token_id=None)
    whole = PROMPT + text
    speculator = {
        "second": lambda: Ranked(base, whole, [[1], [0], [2], [1]]),
        "changing": lambda: Ranked(base, whole, [[0, 1, 2], [0, 3], [0, 2, 1], [1]]),
        "absent": lambda: Ranked(base, whole, [[5]] * 4),
        "random": lambda: untrained_speculator(base, 4),
        "trained": lambda: train_quickly(base, [whole], n_predict=4),
    }[draft]()
    result = generate(base, speculator, TREE)
    assert result.tokens == text
    assert all(r.drafted == 4 and r.nodes == len(TREE.paths) for r in result.counted)
    accepted = {r.accepted for r in result.counted}
    if draft in ("second", "absent"):
        assert accepted == {{"second": 4, "absent": 0}[draft]}
    if draft == "changing":
        assert len(accepted) > 1
    if draft == "trained":
        assert result.accepted > 1


def test_generate_tree_chain_equals_plain_drafting(model, text):
    for speculator in (untrained_speculator(model, 4), train_quickly(model, [PROMPT + text], n_predict=4)):
        chain = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
        tree = generate(model, speculator, DraftTree.chain(4))
        assert tree.rounds == chain.rounds


def sliding(kind: str, implementation: str) -> nn.Module:
    """Bases whose window is far shorter than the text: in every second layer, or in all."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    common = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 6,
        "tie_word_embeddings": False,
        "attn_implementation": implementation,
    }
    if kind == "gemma2":
        base = Gemma2ForCausalLM(Gemma2Config(**common, head_dim=8, query_pre_attn_scalar=8))
    elif kind == "mistral":
        base = MistralForCausalLM(MistralConfig(**common))
    else:
        base = Qwen2ForCausalLM(Qwen2Config(**common, use_sliding_window=True, max_window_layers=2))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return base.double().eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", GROUPED])
@pytest.mark.parametrize("kind", ["gemma2", "mistral", "qwen2"])
def test_generate_tree_sliding_window_gives_the_greedy_text(kind, implementation):
    base = sliding(kind, implementation)
    text = alone(base, PROMPT, 40, eos_token_id=None)
    assert len(set(text)) > 5
    deep = DraftTree(tuple((1,) * d for d in range(1, 9)) + tuple((0,) * d for d in range(1, 9)))
    for tree, ranks in ((TREE, [[1], [0], [2], [1]]), (TREE, [[0, 2], [0, 3], [0], [1]]), (deep, [[1]] * 8)):
        result = generate(base, Ranked(base, PROMPT + text, ranks), tree, max_new_tokens=40)
        assert result.tokens == text and result.accepted > 0.5


def test_generate_tree_gpt2_is_cut_at_the_position_limit():
    """GPT-2 has no position beyond its limit to look up: the tree grows shorter there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=2, n_head=4)).double().eval()
    text = alone(base, PROMPT, 24 - len(PROMPT), eos_token_id=None)
    for ranks in ([[1], [0], [2], [1]], [[0]] * 4, [[5]] * 4):
        result = generate(base, Ranked(base, PROMPT + text, ranks), TREE, max_new_tokens=50)
        assert (result.tokens, result.finish) == (text, "length")
        assert all(r.drafted == 4 for r in result.counted)


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5, 9])
def test_generate_tree_stops_at_the_position_limit(model, room):
    limit = model.config.max_position_embeddings
    prompt = [(7 * i) % 300 for i in range(limit - room)]
    text = alone(model, prompt, room, eos_token_id=None)
    for ranks in ([[1], [0], [2], [1]], [[5]] * 4):
        speculator = Ranked(model, prompt + text, ranks)
        result = speculative_generate(model, speculator, prompt, max_new_tokens=50, eos_token_id=(), draft_tree=TREE)
        assert (result.tokens, result.finish) == (text, "length")


def test_generate_tree_end_token_inside_a_branch_ends_the_text(model, text):
    speculator = Ranked(model, PROMPT + text, [[1], [0], [2], [1]])
    for end in dict.fromkeys(text):
        result = generate(model, speculator, TREE, eos_token_id=end)
        assert result.tokens == text[: text.index(end) + 1] and result.finish == "stop"


def test_generate_tree_bf16_base_with_float32_speculator_gives_the_greedy_text(bases):
    base = load_base(bases["llama"], torch.bfloat16)
    result = generate(base, untrained_speculator(base, 4).float(), TREE)
    assert result.tokens == alone(base, PROMPT, COUNT, eos_token_id=None)


# The cache.


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sliding"])
@torch.no_grad()
def test_target_keep_leaves_the_accepted_branch_in_the_cache(bases, architecture):
    """Keys, values, states and logits, as if the accepted tokens had been read in a row."""
    base = sliding("gemma2", "sdpa") if architecture == "sliding" else load_base(bases[architecture])
    tokens = torch.tensor([(11 * i + 3) % 300 for i in range(len(TREE.paths) + 1)])
    branch = [TREE.paths.index(path) + 1 for path in ((1,), (1, 0), (1, 0, 2), (1, 0, 2, 1))]
    following = torch.tensor([7, 8])
    with Target(base) as target, Target(base) as plain:
        target.read(torch.tensor(PROMPT))
        hidden, logits = target.read(tokens, tree=TreeAttention(base, TREE.parents).arguments(len(PROMPT)))
        target.keep(len(PROMPT), [0, *branch])
        plain.read(torch.tensor(PROMPT))
        expected = plain.read(tokens[[0, *branch]])
        torch.testing.assert_close((hidden[[0, *branch]], logits[[0, *branch]]), expected, rtol=0, atol=1e-9)
        assert target.length == plain.length == len(PROMPT) + 5
        for kept, read in zip(target.cache.layers, plain.cache.layers, strict=True):
            torch.testing.assert_close((kept.keys, kept.values), (read.keys, read.values), rtol=0, atol=1e-9)
        torch.testing.assert_close(target.read(following), plain.read(following), rtol=0, atol=1e-9)


# Drafting.


@pytest.mark.parametrize("draft_vocab_size", [None, 100])
@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm", "medusa"])
def test_tree_drafter_drafts_each_node_by_its_path(model, method, draft_vocab_size):
    """Against the speculator stepped along each path alone."""
    speculator = untrained_speculator(model, 4, method=method, draft_vocab_size=draft_vocab_size)
    hidden, token = torch.randn(1, speculator.hidden_size, dtype=torch.float64), torch.tensor([9])
    with torch.no_grad():
        drafts = TreeDrafter(speculator, TREE).propose(hidden, token, None, TREE.depth, 1).tokens
        for node, path in zip(drafts.tolist(), TREE.paths, strict=True):
            state, newest = speculator.start(hidden), token
            for depth, rank in enumerate(path):
                state = speculator.step(state, newest)
                newest = (state.output @ speculator.head(depth).T).argsort(descending=True)[:, rank]
                newest = newest if draft_vocab_size is None else 2 * newest + 1
            assert node == int(newest)


class TokenBlind(Speculator):
    """Reads no token, and accepts one row only."""

    method = "blind"
    reads_tokens = False

    def __init__(self, base: nn.Module) -> None:
        vocab, width = base.get_output_embeddings().weight.shape
        super().__init__(SpeculatorConfig(n_predict=4), hidden_size=width, vocab_size=vocab)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, vocab, width, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def step(self, state: DraftState, token: torch.Tensor) -> DraftState:
        assert len(token) == len(state.output) == 1
        return DraftState(state.output, None, state.depth + 1)

    def head(self, depth: int) -> torch.Tensor:
        return self.weight[depth]


def test_tree_drafter_steps_one_row_without_reads_tokens(model, text):
    blind = TokenBlind(model)
    assert generate(model, blind, TREE).tokens == text
    hidden = torch.randn(1, blind.hidden_size, dtype=torch.float64)
    tokens = TreeDrafter(blind, TREE).propose(hidden, torch.tensor([9]), None, TREE.depth, 1).tokens.tolist()
    for token, path in zip(tokens, TREE.paths, strict=True):
        order = (hidden @ blind.head(len(path) - 1).T).argsort(descending=True)
        assert token == int(order[0, path[-1]])


# The tree.


@given(trees, st.integers(0, 10**6))
@settings(deadline=None)
def test_verify_tree_walks_from_the_root(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    # The token of a node is its rank, so that siblings differ.
    tokens = [path[-1] for path in tree.paths]
    target = torch.randint(0, 4, (len(tokens) + 1,), generator=generator).tolist()
    number, walked = {(): 0} | {path: i for i, path in enumerate(tree.paths, 1)}, ()
    while (*walked, target[number[walked]]) in number:
        walked = (*walked, target[number[walked]])
    accepted, last = verify_tree(tree.parents, target, tokens)
    assert [tree.paths[node - 1] for node in accepted] == [walked[:d] for d in range(1, len(walked) + 1)]
    assert last == target[number[walked]]


@given(trees)
@settings(deadline=None)
def test_draft_tree_is_ordered_and_its_first_levels_are_a_tree(tree):
    assert list(tree.paths) == sorted(tree.paths, key=lambda path: (len(path), path))
    for i, (path, parent) in enumerate(zip(tree.paths, tree.parents, strict=True), 1):
        assert parent < i and (tree.paths[parent - 1] if parent else ()) == path[:-1]
    for depth in range(1, tree.depth + 1):
        nodes = sum(len(path) <= depth for path in tree.paths)
        first = DraftTree(tree.paths[:nodes])
        assert first.depth == depth and first.parents == tree.parents[:nodes]


@given(paths, st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_most_frequent_is_the_best_tree(sample, nodes):
    """By an exchange argument: no path outside of the tree is more frequent than one inside."""
    tree, counts = most_frequent(sample, nodes), prefix_counts(sample)
    assert len(tree.paths) == min(nodes, len(counts))
    outside = [count for path, count in counts.items() if path not in tree.paths]
    assert min(counts[path] for path in tree.paths) >= max(outside, default=0)


def test_write_tree_read_tree_round_trip(tmp_path):
    path = tmp_path / "tree.json"
    write_tree(path, TREE, measured={"tau_tree": 2.5}, provenance={"base": "b"})
    assert read_tree(path) == TREE
    assert json.loads(path.read_text())["measured"] == {"tau_tree": 2.5}
    assert [p.name for p in tmp_path.iterdir()] == ["tree.json"]
    path.write_text('{"paths": [[1], [0], [1, 0]]}')
    assert read_tree(path).paths == ((0,), (1,), (1, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "[1], expected an object with a list of paths"),
        ('{"paths": 3}', "expected an object with a list of paths"),
        ('{"paths": [[0]], "path": 1}', "unknown key 'path', expected paths, measured, provenance"),
        ('{"paths": []}', f"0 nodes, expected 1 to {MOST_NODES}"),
        (json.dumps({"paths": [[i] for i in range(65)]}), f"65 nodes, expected 1 to {MOST_NODES}"),
        ('{"paths": [0]}', "path 0, expected a list of ranks"),
        ('{"paths": [[]]}', "path [], expected ranks, whole numbers ≥ 0"),
        ('{"paths": [[true]]}', "path [True], expected ranks, whole numbers ≥ 0"),
        ('{"paths": [[-1]]}', "path [-1], expected ranks, whole numbers ≥ 0"),
        ('{"paths": [[0], [0]]}', "path [0] is there twice, expected every path once"),
        ('{"paths": [[0], [1, 0]]}', "path [1, 0] without [1]; expected the beginning of every path too"),
    ],
)
def test_read_tree_invalid_file_raises(tmp_path, content, message):
    path = tmp_path / "tree.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_tree(path)
    assert str(error.value).startswith(f"draft_tree={path}: ") and message in str(error.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_tree(tmp_path / "nothing.json")


# Refusals.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": 0.5}, "draft_tree: temperature=0.5, expected 0: a tree is verified greedily"),
        ({"draft_length": 2}, "draft_length=2: a draft_tree has lengths of its own; expected one of the two"),
        ({"draft_tree": DraftTree.chain(5)}, "draft_tree: 5 levels, the speculator was trained to draft 4"),
        ({"draft_tree": DraftTree(((400,),))}, "draft_tree: rank 400, the vocabulary has 330 tokens"),
        ({"speculator": None}, "draft_tree: there is no speculator to draft with"),
    ],
)
def test_generate_tree_with_conflicting_settings_raises(model, more, message):
    arguments = {"speculator": untrained_speculator(model, 4), "draft_tree": TREE, "max_new_tokens": 5} | more
    with pytest.raises(UserError) as error:
        speculative_stream(model, arguments.pop("speculator"), PROMPT, **arguments)
    assert str(error.value) == message.replace("330", str(model.config.vocab_size))


def test_generate_tree_base_without_tree_attention_raises():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        Llama4ForCausalLM,
        Llama4TextConfig,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    small = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    flash = Qwen2ForCausalLM(Qwen2Config(**small, num_attention_heads=4, num_key_value_heads=2)).eval()
    flash.config._attn_implementation = "flash_attention_2"
    chunked = Llama4ForCausalLM(
        Llama4TextConfig(
            **small, intermediate_size_mlp=32, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2
        )
    )
    biased = BloomForCausalLM(BloomConfig(vocab_size=330, hidden_size=32, n_layer=1, n_head=2))
    for base, message in (
        (flash, "Qwen2ForCausalLM) attends by flash_attention_2, which takes no mask of a tree's; expected attn_impl"),
        (chunked, "(Llama4ForCausalLM) has layers of chunked_attention; expected full_attention or sliding_attention"),
        (biased, "(BloomForCausalLM) takes no mask and positions from outside"),
    ):
        with pytest.raises(UserError) as error:
            speculative_stream(base.eval(), untrained_speculator(base, 4), PROMPT, max_new_tokens=5, draft_tree=TREE)
        assert message in str(error.value)


def test_generate_tree_real_prompts_give_the_greedy_text(shared):
    """Greedy identity on the real base in float32."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    folder = shared / "models" / "gsm8k-tiny"
    base, tokenizer = load_base(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer("Each day 3 ducks lay 16 eggs. " * 4)["input_ids"]]
    speculator = train_quickly(base, texts, steps=20, n_predict=4)
    for row in pq.read_table(shared / "data" / "gsm8k" / "test.parquet", columns=["prompt"]).to_pylist()[:4]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        result = speculative_generate(base, speculator, prompt, max_new_tokens=64, draft_tree=TREE)
        assert result.tokens == alone(base, prompt, 64)
