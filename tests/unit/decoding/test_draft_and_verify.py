"""Decoding gives the base model's own text with any draft, on every architecture."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.drafters import (
    Oracle,
    alone,
    assert_third_token_has_base_distribution,
    load_base,
    train_quickly,
    untrained_speculator,
)
from helpers.tiny_models import ARCHITECTURES
from verl_speculator.decoding import Round, SamplingPolicy, speculative_generate, speculative_stream
from verl_speculator.decoding.generate import StopRule, first_difference
from verl_speculator.decoding.target import Target
from verl_speculator.utils.settings import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]
COUNT = 30


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


@pytest.fixture(scope="module")
def text(model):
    return alone(model, PROMPT, COUNT, eos_token_id=None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("draft", ["agreeing", "disagreeing", "changing", "random", "trained", "none"])
def test_generate_greedy_text_is_the_base_models(bases, architecture, draft):
    base = load_base(bases[architecture])
    text = alone(base, PROMPT, COUNT, eos_token_id=None)
    whole = PROMPT + text
    speculator = {
        "agreeing": lambda: Oracle(base, whole, [True] * 4),
        "disagreeing": lambda: Oracle(base, whole, [False] * 4),
        "changing": lambda: Oracle(base, whole, [True, True, False, True]),
        "random": lambda: untrained_speculator(base, 3),
        "trained": lambda: train_quickly(base, [whole]),
        "none": lambda: None,
    }[draft]()
    result = speculative_generate(base, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
    assert result.tokens == text
    assert [token for r in result.rounds for token in r.tokens] == text
    if draft in ("agreeing", "disagreeing", "changing"):
        accepted = {"agreeing": 4, "disagreeing": 0, "changing": 2}[draft]
        assert {r.accepted for r in result.counted} == {accepted}
        assert result.accepted == accepted
    if draft == "trained":
        assert result.accepted > 1


@pytest.mark.parametrize("n_predict", range(1, 9))
def test_generate_every_draft_length_gives_the_greedy_text(model, text, n_predict):
    for speculator in (untrained_speculator(model, n_predict), Oracle(model, PROMPT + text, [True] * n_predict)):
        for draft_length in {1, n_predict // 2 or 1, n_predict}:
            result = speculative_generate(
                model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=(), draft_length=draft_length
            )
            assert result.tokens == text
            assert {r.drafted for r in result.rounds[1:]} == {draft_length}


OTHER_SETTINGS = {
    "sum_rnn": {"tie_weights": False},
    "sum_lstm": {"tie_lstm_embs": True},
    "medusa": {"hidden_state": "pre_norm", "head": "shared", "num_layers": 2},
}


@pytest.mark.parametrize("method", OTHER_SETTINGS)
def test_generate_every_family_gives_the_greedy_text(model, text, method):
    for settings in ({}, OTHER_SETTINGS[method], {"draft_vocab_size": 100}):
        speculator = untrained_speculator(model, 4, method=method, **settings)
        result = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=())
        assert result.tokens == text


def test_generate_end_token_inside_a_draft_ends_the_text(model, text):
    """The text ends with the end token, at any place in a round."""
    speculator = Oracle(model, PROMPT + text, [True] * 4)
    for end in dict.fromkeys(text):
        result = speculative_generate(model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=end)
        assert result.tokens == text[: text.index(end) + 1]
        assert result.finish == "stop"
        assert result.rounds[-1].tokens[-1] == end


def test_generate_end_token_first_gives_one_token(model, text):
    result = speculative_generate(
        model, untrained_speculator(model, 3), PROMPT, max_new_tokens=COUNT, eos_token_id=[text[0], 1]
    )
    assert (result.tokens, result.finish) == ([text[0]], "stop")
    assert result.accepted is None and result.decode_tokens_per_second is None


def test_generate_end_tokens_default_to_the_generation_config(bases, model, text):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bases["qwen2_tied"], dtype=torch.float64).eval()
    base.generation_config.eos_token_id = [text[4], text[2]]
    result = speculative_generate(base, untrained_speculator(base, 3), PROMPT, max_new_tokens=COUNT)
    assert result.tokens == alone(base, PROMPT, COUNT)
    assert len(result.tokens) <= 5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_generate_max_new_tokens_cuts_a_round(model, text, count):
    for agree in (True, False):
        result = speculative_generate(
            model, Oracle(model, PROMPT + text, [agree] * 4), PROMPT, max_new_tokens=count, eos_token_id=()
        )
        assert (result.tokens, result.finish) == (text[:count], "length")


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5, 9])
def test_generate_stops_at_the_position_limit(model, room):
    """No position beyond the limit is ever read."""
    limit = model.config.max_position_embeddings
    prompt = [(7 * i) % 300 for i in range(limit - room)]
    text = alone(model, prompt, room, eos_token_id=None)
    speculators = [Oracle(model, prompt + text, [agree] * 4) for agree in (True, False)]
    seen = []
    hook = model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    try:
        for speculator in speculators:
            result = speculative_generate(model, speculator, prompt, max_new_tokens=50, eos_token_id=())
            assert (result.tokens, result.finish) == (text, "length")
            assert all(r.drafted == 4 for r in result.counted)
    finally:
        hook.remove()
    assert max(seen) <= limit


def test_generate_stop_string_ends_the_text_as_in_hugging_face(model, text, tokenizer):
    """As Hugging Face: the token that completes a stop string is the last."""
    pieces = [tokenizer.decode([token]) for token in text]
    for i in (2, 7, 11):
        stop = pieces[i] + pieces[i + 1]
        if "�" in stop:
            continue
        expected = alone(model, PROMPT, COUNT, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer)
        for speculator in (untrained_speculator(model, 3), Oracle(model, PROMPT + text, [True] * 4)):
            result = speculative_generate(
                model, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=(), stop=stop, tokenizer=tokenizer
            )
            assert result.tokens == expected
            assert stop in tokenizer.decode(result.tokens) and stop not in tokenizer.decode(result.tokens[:-1])


def test_stop_rule_finds_strings_across_and_inside_tokens(tokenizer):
    """A stop string across several tokens, and one inside a token."""
    words = tokenizer("one two three four five six seven", add_special_tokens=False)["input_ids"]
    prefixes = [tokenizer.decode(words[:i]) for i in range(1, len(words) + 1)]
    for stop in (" thr", "ree fo", "o", "nothing"):
        kept = next((prefix for prefix in prefixes if stop in prefix), None)
        rule = StopRule((), [stop], tokenizer, 1000)
        before, ended = [], None
        for begin in range(0, len(words), 3):
            new, ended = rule.cut(before, words[begin : begin + 3])
            before += new
            if ended:
                break
        assert (tokenizer.decode(before) if ended else None) == kept


def test_stream_yields_the_rounds_of_generate(model):
    speculator = untrained_speculator(model, 3)
    settings = {"max_new_tokens": 12, "eos_token_id": (), "temperature": 1.0, "seed": 5}
    stream = speculative_stream(model, speculator, torch.tensor([PROMPT]), **settings)
    rounds = list(stream)
    assert all(isinstance(r, Round) for r in rounds)
    assert [t for r in rounds for t in r.tokens] == stream.generation.tokens
    assert stream.generation.tokens == speculative_generate(model, speculator, PROMPT, **settings).tokens
    assert [r.finish for r in rounds] == [None] * (len(rounds) - 1) + ["length"]


def test_stream_close_removes_the_hooks(model):
    stream = speculative_stream(model, untrained_speculator(model, 3), PROMPT, max_new_tokens=12, eos_token_id=())
    next(stream)
    assert model.base_model._forward_hooks
    stream.close()
    assert not model.base_model._forward_hooks
    list(speculative_stream(model, untrained_speculator(model, 3), PROMPT, max_new_tokens=12))
    assert not model.base_model._forward_hooks


def test_generation_counted_leaves_out_prefill_and_last_round(model, text):
    """Acceptance is measured over the three rounds between prefill and the last round."""
    result = speculative_generate(
        model, Oracle(model, PROMPT + text, [True, False]), PROMPT, max_new_tokens=8, eos_token_id=()
    )
    assert [len(r.tokens) for r in result.rounds] == [1, 2, 2, 2, 1]
    assert len(result.counted) == 3
    assert all(r.overlap == (1.0, 0.0) for r in result.counted)
    assert result.seconds.prefill > 0 and result.seconds.decode >= result.seconds.draft + result.seconds.target > 0


def test_generate_sliding_window_gives_the_greedy_text(tmp_path, tokenizer):
    """The window of every second layer of Gemma 2 is far shorter than the text."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    base = Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    text = alone(base, PROMPT, 40, eos_token_id=None)
    assert len(set(text)) > 5
    for agrees in ([True, False, True], [False] * 3, [True] * 3):
        result = speculative_generate(
            base, Oracle(base, PROMPT + text, agrees), PROMPT, max_new_tokens=40, eos_token_id=()
        )
        assert result.tokens == text


def test_generate_gpt2_stops_at_n_positions():
    """GPT-2 calls its limit n_positions, and has no position beyond it to look up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=2, n_head=4)).double().eval()
    text = alone(base, PROMPT, 24 - len(PROMPT), eos_token_id=None)
    speculator = Oracle(base, PROMPT + text, [True] * 4)
    result = speculative_generate(base, speculator, PROMPT, max_new_tokens=50, eos_token_id=())
    assert (result.tokens, result.finish) == (text, "length")


@pytest.mark.parametrize("architecture", ["qwen2_tied", "gemma2"])
def test_target_roll_back_equals_never_having_read(bases, architecture):
    base = load_base(bases[architecture])
    tokens = torch.tensor([(11 * i) % 300 for i in range(200)])
    with torch.no_grad(), Target(base) as target:
        target.read(tokens[:120])
        target.read(tokens[150:])
        target.roll_back(100)
        _, again = target.read(tokens[100:])
        expected = base(input_ids=tokens[None], use_cache=False).logits[0, 100:]
    assert target.length == 200
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("draft_vocab_size", [None, 150])
@pytest.mark.parametrize("sampled_drafts", [True, False])
def test_generate_sampled_text_has_the_base_models_distribution(model, sampled_drafts, draft_vocab_size):
    """Also where the draft knows half of the tokens only."""
    assert_third_token_has_base_distribution(
        model,
        untrained_speculator(model, 3, draft_vocab_size=draft_vocab_size),
        PROMPT,
        SamplingPolicy(1.3, top_k=4),
        draws=600,
        sampled_drafts=sampled_drafts,
    )


@pytest.mark.parametrize("policy", [{}, {"temperature": 0.8, "top_k": 1, "seed": 1}], ids=["greedy", "top_k_1"])
def test_generate_bf16_base_with_float32_speculator_gives_the_greedy_text(bases, policy):
    """Also when it is sampled from the most likely token alone."""
    base = load_base(bases["llama"], torch.bfloat16)
    speculator = untrained_speculator(base, 3).float()
    result = speculative_generate(base, speculator, PROMPT, max_new_tokens=COUNT, eos_token_id=(), **policy)
    assert result.tokens == alone(base, PROMPT, COUNT, eos_token_id=None)


def test_first_difference_names_the_token_and_the_gap_of_the_logits(model, text):
    other = (text[5] + 1) % model.config.vocab_size
    changed = [*text[:5], other, *text[6:]]
    assert first_difference(model, PROMPT, text, text) is None
    found = first_difference(model, PROMPT, text, changed)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *text[:5]]])).logits[0, -1]
    assert found.position == 5 and found.gap == pytest.approx(float(logits[text[5]] - logits[other]), rel=1e-5)
    shorter = first_difference(model, PROMPT, text, text[:9])
    assert shorter.position == 9 and math.isnan(shorter.gap)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: expected a number ≥ 0"),
        ({"top_p": 1.2}, "top_p=1.2: expected a number in (0, 1]"),
        ({"draft_length": 4}, "draft_length=4: expected 1 to 3, the speculator's n_predict"),
        ({"draft_length": 0}, "draft_length=0: expected 1 to 3, the speculator's n_predict"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a number ≥ 1"),
        ({"input_ids": []}, "input_ids: expected the tokens of one prompt, got a shape of [0]"),
        ({"input_ids": [[1, 2], [3, 4]]}, "input_ids: expected the tokens of one prompt, got a shape of [2, 2]"),
        (
            {"input_ids": list(range(256))},
            "input_ids: 256 tokens, the base has 256 positions and needs one for the answer",
        ),
        ({"stop": "x"}, "stop: stop strings need a tokenizer"),
    ],
)
def test_generate_invalid_input_raises(model, settings, message):
    arguments = {"input_ids": PROMPT, "max_new_tokens": 5} | settings
    with pytest.raises(UserError) as error:
        speculative_stream(model, untrained_speculator(model, 3), arguments.pop("input_ids"), **arguments)
    assert str(error.value) == message
    assert not model.base_model._forward_hooks


def test_generate_unusable_base_raises(model):
    from transformers import MambaConfig, MambaForCausalLM

    small = MambaConfig(vocab_size=330, hidden_size=32, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="recurrent state cannot be rolled back"):
        speculative_stream(MambaForCausalLM(small).eval(), None, PROMPT, max_new_tokens=5)
    model.train()
    try:
        with pytest.raises(UserError, match=r"expected a base in evaluation mode"):
            speculative_stream(model, None, PROMPT, max_new_tokens=5)
    finally:
        model.eval()
    with pytest.raises(UserError, match="there is no speculator to draft with"):
        speculative_stream(model, None, PROMPT, max_new_tokens=5, draft_length=2)


def test_generate_real_prompts_give_the_greedy_text(shared):
    """Greedy identity on the real base in float32, with an untrained draft: rejections everywhere."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    folder = shared / "models" / "gsm8k-tiny"
    base, tokenizer = load_base(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    speculator = train_quickly(base, [tokenizer("Each day 3 ducks lay 16 eggs. " * 4)["input_ids"]], steps=20)
    for row in pq.read_table(shared / "data" / "gsm8k" / "test.parquet", columns=["prompt"]).to_pylist()[:8]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        result = speculative_generate(base, speculator, prompt, max_new_tokens=64)
        assert result.tokens == alone(base, prompt, 64)
