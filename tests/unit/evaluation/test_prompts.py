"""Prompts and held-out text: what is read, what is refused, and tokens and masks equal to verl's."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from helpers.tiny_models import CHAT_TEMPLATE, make_chat_rows, make_tokenizer, write_parquet
from verl_speculator.base_model.chat_template import (
    ensure_chat_template,
    tokenize_conversation,
    tokenize_prompt,
    tokenize_texts,
)
from verl_speculator.data.dataset import build_dataset
from verl_speculator.evaluation.prompts import Prompt, prompt_ids, read_prompts, read_texts
from verl_speculator.utils.settings import UserError

USER, ANSWER = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "red cat"}
SYSTEM = {"role": "system", "content": "sings"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["parquet", "jsonl", "json"])
def write(request, tmp_path):
    """Writes rows in each of the formats."""

    def to_file(rows):
        path = tmp_path / f"rows.{request.param}"
        return write_parquet(path, rows) if request.param == "parquet" else write_jsonl(path, rows)

    return to_file


def assert_refused(words, function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def verl_rows(file, tokenizer):
    """(ids, mask) of conversations as training sees them."""
    config = {
        "messages_key": "messages",
        "text_key": "text",
        "pad_mode": "no_padding",
        "max_length": 4096,
        "truncation": "error",
        "custom_cls": {"path": None},
        "tools_key": "tools",
        "thinking_targets": True,
    }
    dataset = build_dataset([str(file)], OmegaConf.create(config), tokenizer, None, -1)
    rows = [dataset[i] for i in range(len(dataset))]
    return [(row["input_ids"].tolist(), row["loss_mask"].tolist()) for row in rows]


def test_read_texts_equals_training_dataset(chat, tokenizer):
    expected = verl_rows(chat, tokenizer)
    assert len(expected) == 40
    assert read_texts(chat, tokenizer) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("eos", [True, False])
def test_read_texts_system_message_equals_training_dataset(template, eos, tmp_path):
    tokenizer = make_tokenizer(chat_template=template)
    ensure_chat_template(tokenizer)
    if not eos:
        tokenizer.eos_token = None
    rows = [{"messages": [SYSTEM, *row["messages"]]} for row in make_chat_rows(4)]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    assert read_texts(file, tokenizer) == verl_rows(file, tokenizer)


def test_read_texts_real_data_equals_training_dataset(shared, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gsm8k-4m")
    ensure_chat_template(tokenizer)
    rows = pq.read_table(shared / "data" / "gsm8k" / "test.parquet", columns=["messages"]).slice(0, 20).to_pylist()
    rows.append({"messages": [USER, {"role": "assistant", "content": "\n\none\n\n"}]})  # line breaks that may merge
    file = write_parquet(tmp_path / "rows.parquet", rows)
    assert read_texts(file, tokenizer) == verl_rows(file, tokenizer)


def test_read_prompts_real_files(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gsm8k-4m")
    ensure_chat_template(tokenizer)
    prompts = read_prompts(shared / "data" / "prompts" / "spec_bench.parquet")
    assert len(prompts) == 480
    assert {prompt.num_turns for prompt in prompts} == {1, 2}
    assert len({prompt.category for prompt in prompts}) > 5
    assert len(prompt_ids(prompts[0], tokenizer, ["one"])) > len(prompt_ids(prompts[0], tokenizer)) > 0
    file = shared / "data" / "gsm8k" / "test.parquet"
    expected = [tuple(value) for value in pq.read_table(file, columns=["prompt"])["prompt"].to_pylist()]
    assert [prompt.messages for prompt in read_prompts(file)] == expected


def test_tokenize_conversation_mask_covers_answers(tokenizer):
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "dog"}]
    ids, mask = tokenize_conversation(tokenizer, messages)
    answers = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(answers) == "red cat<|im_end|>\ndog<|im_end|>\n"
    assert ids[: mask.index(1)] == tokenize_prompt(tokenizer, messages[:1])
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_tokenize_conversation_first_assistant_message_is_masked(tokenizer):
    ids, mask = tokenize_conversation(tokenizer, [ANSWER, USER, ANSWER])
    answers = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(answers) == "red cat<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        # Thoughts that are written for the last answer alone, as Qwen 3 does.
        CHAT_TEMPLATE.replace("+ message['content']", "+ ('<t>' if loop.last else '') + message['content']"),
        # A prompt for the answer that the answer itself does not begin with.
        CHAT_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<t>' }}"),
        # Something behind the last message.
        CHAT_TEMPLATE + "{%- if not add_generation_prompt %}{{- messages | length }}{%- endif %}",
    ],
)
def test_tokenize_conversation_rewriting_template_refused(template):
    tokenizer = make_tokenizer(chat_template=template)
    words = "the chat template writes messages[1] otherwise alone than in the whole conversation"
    assert_refused(words, tokenize_conversation, tokenizer, [USER, ANSWER, USER, ANSWER])


def test_read_texts_merged_first_token_equals_training_dataset(tmp_path):
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + (' ' if m['role'] == 'assistant' else 'one') + m['content'] "
        "+ '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|> ' }}{%- endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    messages = [USER, {"role": "assistant", "content": "red cat"}] * 2
    ids, mask = tokenize_conversation(tokenizer, messages)
    answers = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(answers) == " cat<|im_end|>" * 2
    assert [(ids, mask)] == verl_rows(write_parquet(tmp_path / "rows.parquet", [{"messages": messages}]), tokenizer)


def test_tokenize_conversation_merged_end_refused():
    tokenizer = make_tokenizer(chat_template="{%- for m in messages %}{{- m['content'] }}{%- endfor %}")
    red = [{"role": "user", "content": " "}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "ed"}]
    assert_refused("expected a template that only appends", tokenize_conversation, tokenizer, red)


def test_template_error_is_one_line(tmp_path):
    tokenizer = make_tokenizer(chat_template="{{- raise_exception('no\nsystem') }}")
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    assert_refused("rows.jsonl, row 0: the chat template refuses it: no system", read_texts, file, tokenizer)
    assert_refused("prompt 0: the chat template refuses it", prompt_ids, read_prompts(file)[0], tokenizer)
    assert_refused("the chat template refuses it", tokenize_prompt, make_tokenizer(chat_template=None), [USER])
    assert_refused("the chat template refuses it", tokenize_prompt, make_tokenizer(), [])


def test_read_prompts_turns(write, tokenizer):
    rows = [{"turns": ["one", "two", "six"], "category": "math"}, {"turns": ["cat"], "category": None}]
    first, second = read_prompts(write([row | {"prompt": "unread"} for row in rows]))
    assert first == Prompt(0, "math", ({"role": "user", "content": "one"},), ("two", "six"))
    assert second == Prompt(1, "all", ({"role": "user", "content": "cat"},))
    assert (first.num_turns, second.num_turns) == (3, 1)
    for replies in ([], ["red"], ["red", ""]):
        messages = [{"role": "user", "content": "one"}]
        for reply, question in zip(replies, ["two", "six"], strict=False):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(first, tokenizer, replies) == expected
    with pytest.raises(ValueError, match="1 replies to a prompt of 1 turns"):
        prompt_ids(second, tokenizer, ["red"])


@pytest.mark.parametrize("column", ["messages", "prompt"])
@pytest.mark.parametrize(
    ("messages", "kept"),
    [
        ([USER, ANSWER], 1),
        ([SYSTEM, USER, ANSWER], 2),
        ([USER, ANSWER, USER, ANSWER], 3),
        ([USER, ANSWER, USER, ANSWER, ANSWER], 3),
        ([SYSTEM, USER, ANSWER, USER], 4),
        ([USER], 1),
    ],
)
def test_read_prompts_messages_drop_last_answer(write, tokenizer, column, messages, kept):
    # A key that one message has comes back from parquet as null in the others.
    named = [message | ({"name": "bob"} if message == SYSTEM else {}) for message in messages]
    (prompt,) = read_prompts(write([{column: named, "text": "unread"}]))
    assert prompt == Prompt(0, "all", tuple(named[:kept]))
    assert prompt.num_turns == 1
    assert prompt_ids(prompt, tokenizer) == tokenize_prompt(tokenizer, messages[:kept])


def test_read_prompts_prompt_text(write):
    (prompt,) = read_prompts(write([{"prompt": "one two"}]))
    assert prompt.messages == (USER,)


def test_prompt_ids_plain_text_is_halved(write, tokenizer):
    texts = ["a", "a b", "a b c", "one two three", "one two three four<|im_end|>"]
    prompts = read_prompts(write([{"text": text} for text in texts]))
    lengths = []
    for prompt, text in zip(prompts, texts, strict=True):
        assert (prompt.text, prompt.messages, prompt.num_turns) == (text, (), 1)
        (ids,) = tokenize_texts(tokenizer, [text.removesuffix("<|im_end|>")], plain=False)
        half = prompt_ids(prompt, tokenizer)
        assert half == ids[: len(half)]
        assert 2 * len(half) in (len(ids), len(ids) + 1)
        lengths.append(len(ids))
    assert lengths[0] == 1
    assert {length % 2 for length in lengths} == {0, 1}
    assert_refused("prompt 9: text has no tokens", prompt_ids, Prompt(9, "all", text="<|im_end|>"), tokenizer)
    endless = make_tokenizer()
    endless.eos_token = None
    assert [prompt_ids(p, endless) for p in prompts[:4]] == [prompt_ids(p, tokenizer) for p in prompts[:4]]


def test_read_texts_plain_text_and_messages(write, tokenizer):
    texts = read_texts(write([{"text": "one two", "prompt": "unread"}, {"text": "cat"}]), tokenizer)
    assert [tokenizer.decode(ids) for ids, _ in texts] == ["one two<|im_end|>", "cat<|im_end|>"]
    assert all(mask == [1] * len(ids) for ids, mask in texts)
    (both,) = read_texts(write([{"text": "unread", "messages": [USER, ANSWER]}]), tokenizer)
    assert both == tokenize_conversation(tokenizer, [USER, ANSWER])


def test_read_texts_without_answer_refused(write, tokenizer):
    file = write([{"messages": [USER]}, {"messages": [ANSWER, USER]}])
    assert_refused(f"{file}: no token of an assistant's in column 'messages'", read_texts, file, tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 1}, "row 0: text is 1, expected a text"),
        ({"messages": []}, "row 0: messages is [], expected a list of messages"),
        ({"messages": [USER, {"role": "assistant"}]}, "row 0: messages[1] is"),
        ({"prompt": "one"}, "it has prompt; expected one of messages, text"),
    ],
)
def test_read_texts_invalid_row_refused(write, tokenizer, row, words):
    assert_refused(words, read_texts, write([row]), tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": []}, "row 1: turns is [], expected a list of texts"),
        ({"turns": ["one", ""]}, "row 1: turns is ['one', ''], expected a list of texts, none of them empty"),
        ({"turns": ["one", None]}, "row 1: turns is ['one', None]"),
        ({"turns": None}, "row 1: turns is None"),
        ({"messages": []}, "row 1: messages is [], expected a list of messages"),
        ({"messages": None}, "row 1: messages is None"),
        ({"messages": [USER, {"role": None, "content": "a"}]}, "row 1: messages[1] is {"),
        ({"messages": [{"role": "user", "content": None}]}, "row 1: messages[0] is {"),
        ({"messages": [ANSWER]}, "row 1: messages has no message of a user's to answer"),
        ({"messages": [SYSTEM, ANSWER]}, "row 1: messages has no message of a user's to answer"),
        ({"messages": [{"role": "user", "content": ""}]}, "row 1: messages ends in an empty message"),
        ({"prompt": ""}, "row 1: prompt is '', expected a text that is not empty"),
        ({"prompt": None}, "row 1: prompt is None, expected a text, or a list of messages"),
        ({"text": ""}, "row 1: text is '', expected a text that is not empty"),
        ({"text": None}, "row 1: text is None, expected a text that is not empty"),
    ],
)
def test_read_prompts_invalid_row_refused(write, row, words):
    good = {"turns": ["one"], "messages": [USER], "prompt": "one", "text": "one"}
    assert_refused(words, read_prompts, write([{column: good[column] for column in row}, row]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": "one"}, "row 0: turns is 'one', expected a list of texts"),
        ({"turns": [1]}, "row 0: turns is [1], expected a list of texts"),
        ({"messages": "one\n" * 99}, "row 0: messages is 'one"),
        ({"messages": ["one"]}, "row 0: messages[0] is 'one', expected a role and a content"),
        ({"messages": [{"content": "one"}]}, "row 0: messages[0] is {'content': 'one'}, expected a role"),
        ({"prompt": 1}, "row 0: prompt is 1, expected a list of messages"),
        ({"text": ["one"]}, "row 0: text is ['one'], expected a text"),
        ({"text": "one", "category": 3}, "row 0: category is 3, expected a text"),
        ({"mesages": "one", "id": 1}, "it has mesages (did you mean 'messages'?), id; expected one of turns, messages"),
    ],
)
def test_read_prompts_invalid_type_or_column_refused(write, row, words):
    assert_refused(words, read_prompts, write([row]))


def test_read_invalid_file_refused(tmp_path, tokenizer):
    good = write_parquet(tmp_path / "good.parquet", [{"text": "one"}] * 99).read_bytes()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "folder.parquet").mkdir()
    contents = {
        "rows.parqet": (b"", "unknown suffix '.parqet' (did you mean '.parquet'?), expected one of .parquet, .jsonl"),
        "rows": (b"", "unknown suffix ''"),
        "cut.parquet": (good[: len(good) // 2], "cut.parquet: truncated, or not a parquet file"),
        "nothing.parquet": (b"", "nothing.parquet: truncated, or not a parquet file"),
        "damaged.parquet": (good[:4] + b"\xff" * 40 + good[44:], "damaged.parquet: truncated, or not a parquet file"),
        "empty.jsonl": (b"\n \n", "empty.jsonl: holds no rows"),
        "none.jsonl": (b"{}\n", "no column that can be used; it has none; expected one of"),
        "list.jsonl": (b'{"text": "one"}\n\n["one"]\n', "list.jsonl, line 3: ['one'], expected a JSON object"),
        "cut.jsonl": (b'{"text": "one"}\n{"text": "tw', "cut.jsonl, line 2: truncated, or not JSON (Unterminated"),
        "pretty.json": (b'[\n{"text": "one"}\n', "pretty.json: truncated, or not JSON"),
        "bytes.jsonl": (b'{"text": "\xff"}\n', "bytes.jsonl: cannot be read as text"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: words for name, (_, words) in contents.items()}
    expected["missing.jsonl"] = "missing.jsonl: no such file"
    expected["folder.parquet"] = "folder.parquet: a directory, expected one file"
    expected["empty.parquet"] = "empty.parquet: holds no rows"
    for name, words in expected.items():
        assert_refused(words, read_prompts, tmp_path / name)
        assert_refused(words.split("expected one of")[0], read_texts, str(tmp_path / name), tokenizer)


def test_read_prompts_of_a_json_array(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert read_prompts(file) == [Prompt(0, "all", text="one"), Prompt(1, "all", text="two")]


def test_read_prompts_ignores_other_columns(tmp_path):
    """A damaged column that is not read does not matter."""
    file = tmp_path / "rows.parquet"
    rows = {"junk": ["\x07" * 500], "text": ["one"]}
    pq.write_table(pa.table(rows), file, use_dictionary=False, compression=None)
    content = file.read_bytes()
    at = content.index(b"\x07" * 100)
    file.write_bytes(content[: at - 30] + b"\xff" * 80 + content[at + 50 :])
    assert read_prompts(file) == [Prompt(0, "all", text="one")]
