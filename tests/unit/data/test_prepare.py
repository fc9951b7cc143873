"""`prepare`: every style of data, what is dropped and why, a split without leaks, and results that training reads."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from helpers.engine_harness import load_rows
from helpers.tiny_models import WORDS, make_chat_rows, write_parquet
from verl_speculator.data import prepare as module
from verl_speculator.data.dataset import build_dataset
from verl_speculator.data.formats import CONVERSATION_FORMATS, documents, recognise
from verl_speculator.data.prepare import CUT, PrepareSettings, choose_held_out, prepare
from verl_speculator.utils.settings import UserError

USER, ANSWER = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "red cat"}
SYSTEM = {"role": "system", "content": "sings"}
ANSWER_PART = {"type": "text", "text": "red cat"}


def turns(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def oasst(message, parent, role, text, **more):
    return {"message_id": message, "parent_id": parent, "role": role, "text": text, "rank": None} | more


def write(path, rows):
    """Rows in the format that the suffix names; `.json` is one array."""
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
        return path
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def run(path, out, **options):
    """What is written to training and validation together, and the report."""
    inputs = tuple(map(str, path if isinstance(path, list) else [path]))
    report = prepare(PrepareSettings(inputs, out, **options))
    assert report == json.loads((out / "prepare.json").read_text())
    counts = report["counts"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == counts["train"] + counts["val"]
    assert not list(out.glob(".tmp.*"))
    return [*read(out / "train.parquet"), *read(out / "val.parquet")], report


def read(path):
    if not path.exists():
        return []
    (column,) = (table := pq.read_table(path)).column_names
    return table[column].to_pylist()


def assert_refused(words, path, out, **options):
    inputs = tuple(map(str, path if isinstance(path, list) else [path]))
    with pytest.raises(UserError) as error:
        prepare(PrepareSettings(inputs, out, **options))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (out / "train.parquet").exists()


STYLED = {
    "sharegpt": {
        "id": "a",
        "conversations": [
            {"from": "system", "value": "sings"},
            {"from": "human", "value": "one two"},
            {"from": "gpt", "value": "red cat"},
        ],
    },
    "sharegpt, other names": {"system": "sings", "conversation": [USER, ANSWER]},
    "ultrachat": {"id": "0", "data": ["one two", "red cat", "six", "dog"]},
    "messages": {"prompt": "one two", "messages": [SYSTEM, USER, ANSWER]},
    "messages, in parts": {
        "messages": turns([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], [ANSWER_PART])
    },
    "alpaca": {"instruction": "one two", "input": "", "output": "red cat"},
    "alpaca with input": {"instruction": "one", "input": "two", "output": "red cat", "system": "sings"},
    "alpaca, dolly's names": {"instruction": "one", "context": "two", "response": "red cat"},
    "pairs": {"question": "one two", "answer": "red cat"},
    "pairs, other names": {"system_prompt": "sings", "prompt": "one two", "completion": "red cat"},
    "oasst": {
        "message_tree_id": "a",
        "prompt": oasst(
            "a", None, "prompter", "one two", replies=[oasst("b", "a", "assistant", "red cat", replies=[])]
        ),
    },
}
EXPECTED = {
    "sharegpt": [SYSTEM, USER, ANSWER],
    "sharegpt, other names": [SYSTEM, USER, ANSWER],
    "ultrachat": turns("one two", "red cat", "six", "dog"),
    "messages": [SYSTEM, USER, ANSWER],
    "alpaca with input": [SYSTEM, *turns("one\n\ntwo", "red cat")],
    "alpaca, dolly's names": turns("one\n\ntwo", "red cat"),
    "pairs, other names": [SYSTEM, USER, ANSWER],
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", STYLED)
def test_styles(name, suffix, tmp_path):
    style = name.split(",")[0].split(" ")[0]
    path = write(tmp_path / f"rows.{suffix}", [STYLED[name]])
    rows, report = run(path, tmp_path / "out", val_rows=0)
    assert rows == [EXPECTED.get(name, [USER, ANSWER])]
    assert report["inputs"][0]["format"] == style
    named, _ = run(path, tmp_path / "named", val_rows=0, format=style, keep_system=False)
    assert named == [[message for message in rows[0] if message["role"] != "system"]]


def test_every_style_is_offered():
    assert set(module.FORMATS) == {"auto", "text", *CONVERSATION_FORMATS}
    assert recognise({"text": "one", "messages": [USER]}, (*CONVERSATION_FORMATS, "text")) == "messages"
    assert recognise({"text": "one", "messages": None}, (*CONVERSATION_FORMATS, "text")) == "text"
    assert recognise({"text": ["one"]}, (*CONVERSATION_FORMATS, "text")) is None


def test_trees_of_messages(tmp_path):
    """The best-ranked path of each tree, of rows in any order."""
    rows = [
        oasst("b2", "a", "assistant", "worse", rank=1),
        oasst("b1", "a", "assistant", "better", rank=0),
        oasst("b0", "a", "assistant", "gone", rank=0, deleted=True),
        oasst("c1", "b1", "prompter", "unanswered"),
        oasst("c2", "b1", "prompter", "answered"),
        oasst("d1", "c2", "assistant", "unranked"),
        oasst("d2", "c2", "assistant", "ranked", rank=3),
        oasst("e", "d2", "prompter", "nobody answers"),
        oasst("a", None, "prompter", "one"),
        oasst("f", None, "prompter", "alone"),
        oasst("g", "nowhere", "assistant", "lost"),
        oasst("h", "g", "prompter", "lost with it"),
        oasst("i", None, "prompter", "gone", deleted=True),
        {"text": "no message"},
    ]
    written, report = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", val_rows=0)
    assert written == [turns("one", "better", "answered", "ranked")]
    assert report["counts"]["dropped"] == {
        "not in this format": 1,
        "no assistant turn": 1,
        "reply without its parent": 1,
        "deleted": 1,
    }
    assert report["counts"]["changed"] == {CUT: 1}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no assistant turn"),
        ([SYSTEM, USER], "no assistant turn"),
        ([ANSWER, USER, ANSWER], "does not start with user"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "does not start with user"),
        ([USER, USER, ANSWER], "roles do not alternate"),
        ([USER, ANSWER, ANSWER], "roles do not alternate"),
        ([USER, SYSTEM, ANSWER], "roles do not alternate"),
        ([USER, ANSWER | {"content": " \n"}], "empty answer"),
        ([USER | {"content": ""}, ANSWER], "empty user message"),
        ([USER, ANSWER | {"role": "critic"}], "unknown role"),
        ([USER, ANSWER, ANSWER | {"role": "tool"}, ANSWER], "roles do not alternate"),
        ([USER, ANSWER | {"tool_calls": [{"name": "f"}]}, USER, ANSWER], "roles do not alternate"),
        ([USER, ANSWER | {"role": None}], "unknown role"),
        ([USER, ANSWER | {"tool_calls": [{"arguments": "{}"}]}], "tool call"),
        ([USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "no JSON"}]}], "tool call"),
        ([USER | {"tool_calls": [{"name": "f"}]}, ANSWER], "tool call"),
        ([USER, ANSWER | {"content": None}], "not text"),
        ([USER, ANSWER | {"content": "\ud83d"}], "not text"),
        ([USER, ANSWER | {"content": [{"type": "image", "image": "x"}]}], "not text"),
        ([USER, "red cat"], "turn is not a message"),
        (turns("one two", "red cat" * 10), "too long"),
        ("one two", "not in this format"),
        ([USER, ANSWER], "duplicate"),
        ([USER | {"content": " one\n two "}, ANSWER], "duplicate"),
        (turns("six", "dog"), "too few turns"),
    ],
)
def test_what_is_dropped(messages, reason, tmp_path):
    good = turns("one two", "red cat", "six", "dog") if reason == "too few turns" else [USER, ANSWER]
    path = write(tmp_path / "rows.jsonl", [{"messages": good}, {"messages": messages}])
    min_turns = 2 if reason == "too few turns" else 1
    rows, report = run(path, tmp_path / "out", val_rows=0, max_chars=60, min_turns=min_turns)
    assert rows == [good]
    assert report["counts"]["dropped"] == {reason: 1}


def test_what_is_kept(tmp_path):
    rows = [
        {"messages": [SYSTEM | {"content": " "}, USER, ANSWER, USER, USER]},
        {"messages": [USER | {"content": " cats  \n"}, ANSWER | {"content": " as they stand "}]},
        {"messages": [SYSTEM, USER, ANSWER]},
    ]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[2]])
    written, report = run(path, tmp_path / "out", val_rows=0)
    assert written == [[USER, ANSWER], *(row["messages"] for row in rows[1:])]
    assert report["counts"]["changed"] == {CUT: 2}
    assert report["counts"]["dropped"] == {"duplicate": 1}
    without, report = run(path, tmp_path / "without", val_rows=0, keep_system=False, dedup=False)
    assert without == [[USER, ANSWER], rows[1]["messages"], [USER, ANSWER], [USER, ANSWER]]
    assert report["options"]["dedup"] is False


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": None, "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}


@pytest.mark.parametrize("style", ["openai", "function_call", "sharegpt"])
def test_calls_and_offers_of_tools_are_kept(style, tmp_path):
    """In OpenAI's form, whatever the file has; a row without tools keeps its columns."""
    name_and_arguments = {"name": "weather", "arguments": {"place": "Rome"}}
    result = {"role": "tool", "content": "18"}
    named = {"tool_call_id": "c1", "name": "weather"} if style == "openai" else {"tool_call_id": None, "name": None}
    called = {
        "openai": [ANSWER | {"content": None, "tool_calls": [CALL]}, result | named],
        "function_call": [
            ANSWER | {"content": None, "function_call": name_and_arguments},
            result | {"role": "function"},
        ],
        "sharegpt": [
            {"from": "function_call", "value": json.dumps(name_and_arguments)},
            {"from": "observation", "value": "18"},
        ],
    }[style]
    column = "conversations" if style == "sharegpt" else "messages"
    tools = json.dumps([WEATHER["function"]]) if style == "sharegpt" else [WEATHER]
    rows = [{column: [USER, *called, ANSWER, USER, *called], "tools": tools}, {column: [USER, ANSWER]}]
    path = write(tmp_path / "rows.jsonl", rows)
    report = prepare(PrepareSettings((str(path),), tmp_path / "out", val_rows=0))
    assert report["counts"]["changed"] == {CUT: 1}  # the last result
    plain = {"tool_calls": None, "tool_call_id": None, "name": None}
    call = ANSWER | plain | {"content": "", "tool_calls": [CALL]}
    with_tools, without = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert json.loads(with_tools["tools"]) == [WEATHER]
    assert with_tools["messages"] == [USER | plain, call, result | plain | named, ANSWER | plain, USER | plain, call]
    assert without == {"messages": [USER | plain, ANSWER | plain], "tools": None}


def test_tools_that_are_no_list_of_objects_are_dropped(tmp_path):
    wrong = [["weather"], "weather(place)", [{"name": "\ud83d"}]]
    rows = [{"messages": [USER, ANSWER]}, *({"messages": [USER, ANSWER], "tools": tools} for tools in wrong)]
    written, report = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", val_rows=0)
    assert written == [[USER, ANSWER]] and report["counts"]["dropped"] == {"tools": 3}


def test_calls_count_as_characters_and_their_ids_tell_no_rows_apart(tmp_path):
    def calls(call_id, place="Rome"):
        function = {"name": "weather", "arguments": json.dumps({"place": place})}
        return {"messages": [USER, ANSWER | {"content": None, "tool_calls": [{"id": call_id, "function": function}]}]}

    path = write(tmp_path / "rows.jsonl", [calls("a"), calls("b"), calls("a", "Oslo"), calls("a", "x" * 90)])
    report = prepare(PrepareSettings((str(path),), tmp_path / "out", val_rows=0, max_chars=90))
    assert report["counts"]["dropped"] == {"duplicate": 1, "too long": 1} and report["counts"]["kept"] == 2


def test_text_columns(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"text": "one", "raw": "cat"}, {"text": " ", "raw": None}])
    rows, report = run(path, tmp_path / "out", val_rows=0)
    assert (rows, report["counts"]["dropped"]) == (["one"], {"empty text": 1})
    rows, report = run(path, tmp_path / "raw", val_rows=0, text_column="raw")
    assert (rows, report["counts"]["dropped"]) == (["cat"], {"not text": 1})
    assert report["inputs"][0]["format"] == "text"


ARTICLES = " \n = One Two = \n \n red cat . \n \n = = Six = = \n x \n = y = \n \n = Dog = \n \n sings . \n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ARTICLES, ["= One Two = \n \n red cat . \n \n = = Six = = \n x \n = y =", "= Dog = \n \n sings ."]),
        ("one\ntwo\n\n\n \nsix\n", ["one\ntwo", "six"]),
        ("one\n\ntwo\n<|endoftext|>\nsix\n<|endoftext|>\n", ["one\n\ntwo", "six"]),
        ("cat\n" * 1001, ["cat"] * 1001),
        ("", []),
    ],
)
def test_documents(text, expected, tmp_path):
    assert list(documents(text.splitlines(keepends=True))) == expected
    path = tmp_path / "text.txt"
    path.write_text(text)
    if expected:
        assert run(path, tmp_path / "out", val_rows=0, dedup=False)[0] == expected
    else:
        assert_refused("text.txt: holds no rows", path, tmp_path / "out")


def test_wikitext_with_a_row_for_each_line(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"text": line} for line in ARTICLES.splitlines(keepends=True)])
    rows, report = run(path, tmp_path / "out", val_rows=0)
    assert rows == list(documents(ARTICLES.splitlines(keepends=True)))
    assert report["counts"]["read"] == 2


@pytest.mark.parametrize("options", [{"val_rows": 30}, {"val_share": 0.1}, {}])
def test_nothing_leaks(options, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_ROWS", 7)  # so that batches, row groups and the split do not coincide
    rng = np.random.default_rng(0)
    openings = [f"{word} {i}" for i, word in enumerate(WORDS * 6)]
    rows = []
    for i in range(300):
        opening = openings[int(rng.integers(len(openings)))]
        opening = opening.upper() if i % 3 else f" {opening}\n"
        rows.append({"messages": [SYSTEM, *turns(opening, f"red {i}")]})
    path = write(tmp_path / "rows.jsonl", rows)
    _, report = run(path, tmp_path / "out", **options)
    train, val = (read(tmp_path / "out" / name) for name in ("train.parquet", "val.parquet"))
    assert len(val) == report["counts"]["val"] == (30 if options else 6)
    assert len(train) == 300 - len(val)
    place = {row["messages"][2]["content"]: i for i, row in enumerate(rows)}
    for part in (train, val):
        places = [place[messages[2]["content"]] for messages in part]
        assert places == sorted(places)
    opened = [{messages[1]["content"].strip().lower() for messages in part} for part in (train, val)]
    assert not opened[0] & opened[1]

    run(path, tmp_path / "again", **options)
    for name in ("train.parquet", "val.parquet", "prepare.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    run(path, tmp_path / "seeded", seed=1, **options)
    assert read(tmp_path / "seeded" / "val.parquet") != val


def test_groups_are_held_out_whole():
    def sizes(groups, **asked):
        held_out = choose_held_out(groups, **{"share": 0.0} | asked)
        counts = Counter(np.array(groups, dtype=np.uint64)[held_out].tolist())
        assert all(count == groups.count(group) for group, count in counts.items())
        return dict(counts)

    assert sizes([5, 5, 5, 7, 9, 9], num_rows=3) == {5: 3}
    assert sizes([5, 5, 5, 7, 9, 9], num_rows=2) == {7: 1}  # 5 does not fit, then 9 does not
    assert sizes([5, 5, 5, 2**64 - 1, 2**64 - 1], num_rows=1) == {2**64 - 1: 2}  # none fits: the smallest
    assert sizes([1, 2, 3], share=0.02) == {1: 1}
    assert sizes([1, 2, 3]) == {}
    for groups, asked in (([1, 2, 3], 3), ([1, 1, 1], 1)):
        with pytest.raises(UserError, match=f"val_rows={asked}: so many cannot be held out"):
            choose_held_out(groups, share=0.0, num_rows=asked)


def test_several_inputs_and_a_limit(tmp_path):
    first = write(tmp_path / "first.jsonl", [STYLED["alpaca"], STYLED["alpaca"], {"instruction": "six", "output": "x"}])
    second = write(tmp_path / "second.json", [STYLED["sharegpt"], STYLED["pairs"]])
    rows, report = run([first, second], tmp_path / "out", val_rows=1)
    assert len(rows) == 3
    assert [(i["format"], i["read"], i["kept"]) for i in report["inputs"]] == [("alpaca", 3, 2), ("sharegpt", 2, 1)]
    assert report["counts"]["dropped"] == {"duplicate": 1, "not in this format": 1}
    rows, report = run([first, second], tmp_path / "limited", val_rows=0, max_rows=2)
    assert rows == [[USER, ANSWER], turns("six", "x")]
    assert [(i["format"], i["read"]) for i in report["inputs"]] == [("alpaca", 3), (None, 0)]
    text = write(tmp_path / "text.jsonl", [{"text": "one"}])
    assert_refused(
        "text.jsonl: holds plain text, the inputs before it conversations", [first, text], tmp_path / "kinds"
    )


def test_training_reads_conversations(tmp_path, tokenizer):
    rows = make_chat_rows(40)
    out = tmp_path / "out"
    run(write(tmp_path / "rows.jsonl", rows), out, val_rows=4)
    direct = write_parquet(
        tmp_path / "direct.parquet", [{"messages": messages} for messages in read(out / "val.parquet")]
    )
    for prepared, expected in zip(load_rows(out / "val.parquet", tokenizer), load_rows(direct, tokenizer), strict=True):
        assert prepared["input_ids"].tolist() == expected["input_ids"].tolist()
        assert prepared["loss_mask"].tolist() == expected["loss_mask"].tolist()
    assert all(row["loss_mask"].any() for row in load_rows(out / "train.parquet", tokenizer))


def test_training_reads_text(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("one two\n\nred cat\n")
    run(path, tmp_path / "out", val_rows=0)
    config = {"messages_key": "messages", "text_key": "text", "max_length": 64, "truncation": "error", "custom_cls": {}}
    files = [str(tmp_path / "out" / "train.parquet")]
    dataset = build_dataset(files, OmegaConf.create(config), tokenizer, None, -1)
    texts = [tokenizer.decode(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert texts == ["one two<|im_end|>", "red cat<|im_end|>"]


def test_results_are_replaced_only_when_told(tmp_path):
    path, out = write(tmp_path / "rows.jsonl", [{"messages": turns(word, "red")} for word in WORDS]), tmp_path / "out"
    run(path, out, val_rows=2)
    settings = PrepareSettings((str(path),), out, val_rows=0)
    with pytest.raises(UserError, match=r"holds train.parquet already; expected another directory, or --overwrite"):
        prepare(settings)
    assert len(read(out / "val.parquet")) == 2
    again = PrepareSettings((str(out / "train.parquet"),), out, overwrite=True)
    with pytest.raises(UserError, match=r"train.parquet is read, and would be replaced"):
        prepare(again)
    rows, _ = run(path, out, val_rows=0, overwrite=True)
    assert len(rows) == len(WORDS)
    assert not (out / "val.parquet").exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path, out = write(tmp_path / "rows.jsonl", [{"messages": turns(word, "red")} for word in WORDS]), tmp_path / "out"

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_parquet", full)
        assert_refused("cannot be written (no space left)", path, out)
        assert not out.exists()
    run(path, out)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    monkeypatch.setattr(module, "write_parquet", full)
    with pytest.raises(UserError, match="no space left"):
        prepare(PrepareSettings((str(path),), out, overwrite=True))
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before


def test_prepare_killed_while_reading_leaves_no_file(tmp_path):
    pipe, out = tmp_path / "rows.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    arguments = [sys.executable, "-m", "verl_speculator", "prepare", str(pipe), "--out", str(out)]
    process = subprocess.Popen(arguments)
    try:
        with pipe.open("w") as file:
            for i in range(3000):
                file.write(json.dumps({"messages": turns(f"{i}", "red cat")}) + "\n")
            file.flush()
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
    except BrokenPipeError:
        pass
    finally:
        process.kill()
        process.wait()
    assert not any(out.iterdir())
    (out / ".tmp.1.train.parquet").write_text("left over")
    (out / ".tmp.1.other").write_text("not ours")
    rows = write(tmp_path / "whole.jsonl", [{"messages": turns(word, "red")} for word in WORDS])
    prepare(PrepareSettings((str(rows),), out))
    assert {p.name for p in out.iterdir()} == {"train.parquet", "val.parquet", "prepare.json", ".tmp.1.other"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "sharegtp"}, "format=sharegtp (did you mean 'sharegpt'?): expected auto, sharegpt"),
        ({"format": "alpaca", "text_column": "text"}, "text_column=text: format=alpaca has none"),
        ({"val_share": 0.1, "val_rows": 3}, "val_share=0.1, val_rows=3: expected one of the two"),
        ({"val_share": 1.0}, "val_share=1.0: expected a number from 0 up to, but not, 1"),
        ({"val_share": -0.1}, "val_share=-0.1"),
        ({"val_rows": -1}, "val_rows=-1: expected a number ≥ 0"),
        ({"max_rows": 0}, "max_rows=0: expected a number ≥ 1"),
        ({"min_turns": 0}, "min_turns=0: expected a number ≥ 1"),
        ({"max_chars": 0}, "max_chars=0: expected a number ≥ 1"),
        ({"val_rows": 2}, "val_rows=2: so many cannot be held out"),
        ({}, "val_share=0.02: so many cannot be held out"),
        ({"format": "alpaca"}, "its rows hold messages; expected instruction and output"),
        ({"text_column": "body"}, "its rows hold messages; expected body"),
        ({"min_turns": 2}, "no row is left: 1 read, dropped: too few turns 1"),
    ],
)
def test_settings_that_are_refused(options, words, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    assert_refused(words, path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"messages": []}\n{"mess', "line 2: truncated, or not JSON"),
        ("rows.jsonl", "{\n", "line 1: truncated, or not JSON"),
        ("rows.json", '[{"messages": []}', "rows.json: truncated, or not JSON"),
        ("rows.json", '["one"]', "item 0: 'one', expected a JSON object"),
        ("rows.jsonl", "3\n", "line 1: 3, expected a JSON object"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        (
            "rows.jsonl",
            '{"chosen": "one", "rejected": "two"}\n',
            "format=auto: its rows hold chosen, rejected; expected ",
        ),
        ("rows.jsonl", b"\xff\xfe", "cannot be read as text"),
        ("rows.jsonl.gz", "plain", "cannot be read as text"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "one"}' * 9, mtime=0)[:-12], "cannot be read as text"),
        ("rows.parquet", "plain", "truncated, or not a parquet file"),
        ("rows.parquet.gz", "plain", "unknown suffix '.gz', expected one of .parquet, .jsonl, .json"),
        ("rows.jsnl", "plain", "unknown suffix '.jsnl' (did you mean '.jsonl'?)"),
        ("rows.csv", "plain", "unknown suffix '.csv'"),
        ("rows.jsonl", None, "rows.jsonl: no such file"),
        ("rows/", None, "rows: a directory, expected one file"),
    ],
)
def test_inputs_that_are_refused(name, content, words, tmp_path):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(words, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_without_a_known_column(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"chosen": "one", "rejected": "two"}])
    assert_refused("its rows hold chosen, rejected; expected ", path, tmp_path / "out")


def test_a_file_in_the_way(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    assert_refused("is a file, expected a directory", path, path / "out")


def test_names_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        asked.append((name, config, split))
        return iter([STYLED["alpaca"]])

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: ["plain"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for i, tail in enumerate(("", ":plain", ":test", ":plain:test", "::test")):
        rows, report = run(f"some/data{tail}", tmp_path / str(i), val_rows=0)
        assert rows == [[USER, ANSWER]]
        assert report["inputs"][0]["name"] == f"some/data{tail}"
    tails = [(None, "train"), ("plain", "train"), (None, "test"), ("plain", "test"), (None, "test")]
    assert asked == [("some/data", *tail) for tail in tails]
    for name in ("some/data/more", "data", "some/rows.jsonl", "/some/data"):
        assert_refused(f"{name}: no such file", name, tmp_path / "out")
    fake.load_dataset = lambda *_, **__: 1 / 0
    words = (
        "some/data: no such file, and as a data set on the hub it cannot be read (ZeroDivisionError: division by zero)"
    )
    assert_refused(words, "some/data", tmp_path / "out")


def test_a_hub_that_is_not_reachable(tmp_path):
    """`datasets` as it is, told to stay off the network."""
    assert_refused("nobody/nothing: no such file, and as a data set on the hub", "nobody/nothing", tmp_path / "out")


def test_on_the_command_line(tmp_path):
    def command(*arguments):
        parts = [sys.executable, "-m", "verl_speculator", "prepare", *map(str, arguments)]
        return subprocess.run(parts, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})

    rows = [{"messages": turns(word, "red")} for word in WORDS]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0], {"messages": [*turns("one", ""), USER]}])
    shown = command(path, "--out", tmp_path / "out", "--val-rows", 3, "--no-dedup", "--seed", 2)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()[1:]]
    assert lines == [
        [str(path), "(messages)", "21"],
        ["dropped:", "empty", "answer", "1"],
        [str(tmp_path / "out" / "train.parquet"), "17"],
        [str(tmp_path / "out" / "val.parquet"), "3"],
    ]
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["seed"] == 2
    refused = command(path, "--out", tmp_path / "out")
    assert refused.returncode == 2
    expected = f"error: out={tmp_path / 'out'}: holds train.parquet already; expected another directory, or --overwrite"
    assert refused.stderr.strip() == expected
