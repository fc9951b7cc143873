"""The draft vocabulary: the choice of its tokens, its file, and what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_speculator.config.draft_vocabulary import DraftVocabulary, check_size, most_used, vocabulary_digest
from verl_speculator.config.schema import SpeculatorSettings
from verl_speculator.utils.settings import UserError


@given(st.lists(st.integers(0, 5), min_size=4, max_size=30), st.data())
def test_most_used_takes_the_end_tokens_and_then_the_most_frequent(counts, data):
    always = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=3))
    size = data.draw(st.integers(max(len(always), 1), len(counts)))
    tokens = most_used(counts, size, always)
    assert len(tokens) == size and list(tokens) == sorted(set(tokens)) and always <= set(tokens)
    others = set(range(len(counts))) - always
    taken, left = sorted(counts[t] for t in others & set(tokens)), [counts[t] for t in others - set(tokens)]
    assert not taken or not left or taken[0] >= max(left)


def test_a_file_is_what_was_written(tmp_path, tokenizer):
    vocabulary = DraftVocabulary((0, 3, 7), 10, vocabulary_digest(tokenizer), 0.75)
    vocabulary.write(tmp_path / "v.json")
    assert DraftVocabulary.read(tmp_path / "v.json") == vocabulary
    vocabulary.check("v.json", 10, vocabulary_digest(tokenizer), [7])
    assert Counter(entry.name for entry in tmp_path.iterdir()) == {"v.json": 1}


GOOD = {"tokens": [0, 3, 7], "vocab_size": 10, "tokenizer": "x", "coverage": 1.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory); expected the draft_vocabulary.json of a run"),
        ("[1, 2", "not a draft vocabulary"),
        ("[1, 2]", "not a draft vocabulary"),
        (GOOD | {"tokens": [3, 0]}, "its tokens are no ascending ids"),
        (GOOD | {"tokens": [0, 0]}, "its tokens are no ascending ids"),
        (GOOD | {"tokens": []}, "its tokens are no ascending ids"),
        (GOOD | {"tokens": [0, True]}, "its tokens are no ascending ids"),
        (GOOD | {"tokens": [0, 10]}, "token 10, its vocabulary has 10"),
        ({name: value for name, value in GOOD.items() if name != "tokenizer"}, "not a draft vocabulary"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path, content, words):
    file = tmp_path / "v.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        DraftVocabulary.read(file)
    assert str(error.value).startswith(f"model.speculator.draft_vocab_file={file}: {words}")


def test_a_file_for_another_base_is_refused(tokenizer):
    vocabulary = DraftVocabulary((0, 3, 7), 10, "x", 1.0)
    with pytest.raises(UserError, match="of a vocabulary of 10 tokens, the base has 11"):
        vocabulary.check("v.json", 11, "x", [])
    with pytest.raises(UserError, match="its ids are those of another tokenizer"):
        vocabulary.check("v.json", 10, vocabulary_digest(tokenizer), [])
    with pytest.raises(UserError, match="lacks the end token 5"):
        vocabulary.check("v.json", 10, "x", [7, 5])


def test_sizes_are_checked():
    check_size(None, 10, [1])
    check_size(9, 10, [1, 2])
    with pytest.raises(UserError, match="draft_vocab_size=10: the base has 10 tokens; expected fewer, or null"):
        check_size(10, 10, [])
    with pytest.raises(UserError, match="draft_vocab_size=2: the end tokens alone are 2"):
        check_size(2, 10, [1, 2])


def test_a_file_gives_the_size(tmp_path):
    file = str(tmp_path / "v.json")
    DraftVocabulary((0, 3, 7), 10, "x", 1.0).write(tmp_path / "v.json")
    assert SpeculatorSettings.parse({"draft_vocab_file": file}).config.draft_vocab_size == 3
    with pytest.raises(UserError, match=r"draft_vocab_size=4: .* has 3 tokens"):
        SpeculatorSettings.parse({"draft_vocab_file": file, "draft_vocab_size": 4})
    with pytest.raises(UserError, match="a trained speculator keeps its draft vocabulary"):
        SpeculatorSettings.parse({"draft_vocab_file": file, "path": "spec"})
    with pytest.raises(UserError, match="draft_vocab_size=0: expected an integer of at least 1, or null"):
        SpeculatorSettings.parse({"draft_vocab_size": 0})
