"""Tokens and masks of conversations and texts, through verl's own dataset."""

from __future__ import annotations

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from helpers.engine_harness import load_rows
from helpers.tiny_models import CHAT_TEMPLATE, WORDS, make_chat_rows, make_tokenizer, write_parquet
from verl_speculator.base_model.chat_template import end_token_ids, ensure_chat_template, tokenize_texts
from verl_speculator.config.hydra import load_settings
from verl_speculator.data.alignment import align
from verl_speculator.data.conversations import messages_type
from verl_speculator.data.dataset import PaddedDataset, ResumableSampler, TextDataset, build_dataset
from verl_speculator.data.prepare import PrepareSettings, prepare
from verl_speculator.utils.settings import UserError


def spelled(tokenizer, row, n_predict=2):
    """(text that depth 0 sees, target of depth 0) of every row that is drafted."""
    ids = row["input_ids"]
    ends = end_token_ids(tokenizer, None)
    drafts = align(ids, row["loss_mask"], torch.tensor([0, len(ids)]), n_predict, ends)
    return [tokenizer.decode(ids[: t + 2]) for t in drafts.positions], drafts


def test_only_the_assistant_is_drafted(tokenizer, tmp_path):
    rows = make_chat_rows(1)  # the first has two turns
    (row,) = load_rows(write_parquet(tmp_path / "rows.parquet", rows), tokenizer)
    answers = [m["content"] for m in rows[0]["messages"] if m["role"] == "assistant"]
    _, drafts = spelled(tokenizer, row)
    targets = [int(x) for x in drafts.targets[0]]
    # Of each answer: every token but the first is a target of depth 0, and so is the token that ends the turn.
    expected = []
    for answer in answers:
        expected += [*tokenize_texts(tokenizer, [answer], plain=False)[0][1:], tokenizer.eos_token_id]
    assert targets == expected


@pytest.mark.parametrize("eos", [True, False])
def test_the_default_template_fits_verls_dataset(tmp_path, eos):
    """verl tokenizes each turn alone and compares with the whole; the mask must begin behind "Assistant:"."""
    tokenizer = make_tokenizer(chat_template=None)
    assert ensure_chat_template(tokenizer)
    assert not ensure_chat_template(tokenizer)
    if not eos:
        tokenizer.eos_token = None
    rows = make_chat_rows(4)
    loaded = load_rows(write_parquet(tmp_path / "rows.parquet", rows), tokenizer)
    for row, source in zip(loaded, rows, strict=True):
        answered = tokenizer.decode(row["input_ids"][row["loss_mask"].bool()])
        end = tokenizer.eos_token if eos else "\n"
        assert answered == "".join(f" {m['content']}{end}" for m in source["messages"] if m["role"] == "assistant")


def test_text_rows(tokenizer, tmp_path):
    file = write_parquet(tmp_path / "text.parquet", [{"text": "one two three"}, {"text": "red " * 50}])
    config = OmegaConf.create({"text_key": "text", "max_length": 20, "truncation": "error"})
    dataset = TextDataset([str(file)], tokenizer, config)
    row = dataset[0]
    assert tokenizer.decode(row["input_ids"]) == "one two three<|im_end|>"
    assert row["loss_mask"].all()
    with pytest.raises(UserError, match="text row 1 has"):
        dataset[1]
    for truncation in ("left", "right"):
        config.truncation = truncation
        assert len(TextDataset([str(file)], tokenizer, config)[1]["input_ids"]) == 20
    assert len(TextDataset([str(file)], tokenizer, config, max_samples=1)) == 1


@pytest.mark.parametrize("key", ["messages", "text"])
def test_build_dataset_max_samples_keeps_the_first_rows(tokenizer, tmp_path, key):
    """docs/configuration.md on `data.train_max_samples`."""
    rows = make_chat_rows(12) if key == "messages" else [{"text": f"{word} cat"} for word in WORDS[:12]]
    config = load_settings(["trainer.default_local_dir=."]).data
    if key == "text":
        config.messages_key = "none"
    file = [str(write_parquet(tmp_path / "rows.parquet", rows))]
    whole, part = (build_dataset(file, config, tokenizer, None, count) for count in (-1, 5))
    assert len(whole) == 12 and len(part) == 5
    assert all(torch.equal(part[i]["input_ids"], whole[i]["input_ids"]) for i in range(5))


def test_tools_reach_the_chat_template_as_objects(tmp_path):
    """Offered tools and the arguments of calls are JSON in a parquet file; a template gets what they hold."""
    template = (
        "{%- if tools %}{{- '<|im_start|>tools\\n' + tools[0]['function']['name'] + '<|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{%- if 'tool_calls' in message %}{%- for call in message['tool_calls'] %}"
        "{{- call['function']['name'] + ' ' + call['function']['arguments']['place'] }}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    call = {"type": "function", "function": {"name": "cat", "arguments": json.dumps({"place": "red"})}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    plain = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "three"}]
    source = tmp_path / "rows.jsonl"
    rows = [{"messages": messages, "tools": [{"name": "dog"}]}, {"messages": plain}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(PrepareSettings(inputs=(str(source),), out=tmp_path / "out", val_rows=0))
    with_tools, without = load_rows(tmp_path / "out" / "train.parquet", tokenizer)
    end = "<|im_end|>\n"
    assert tokenizer.decode(with_tools["input_ids"]) == (
        f"<|im_start|>tools\ndog{end}<|im_start|>user\none{end}<|im_start|>assistant\ncat red{end}"
        f"<|im_start|>tool\ntwo{end}<|im_start|>assistant\nthree{end}"
    )
    answers = tokenizer.decode(with_tools["input_ids"][with_tools["loss_mask"].bool()])
    assert answers == f"cat red{end}three{end}"
    assert "tools" not in tokenizer.decode(without["input_ids"])

    messages[1]["content"] = None  # as OpenAI writes a call
    column = pa.array([messages], type=messages_type(calls=True))
    tools = json.dumps([{"type": "function", "function": {"name": "dog"}}])
    pq.write_table(pa.table({"messages": column, "tools": [tools]}), tmp_path / "null.parquet")
    (row,) = load_rows(tmp_path / "null.parquet", tokenizer)
    assert torch.equal(row["input_ids"], with_tools["input_ids"])
    assert torch.equal(row["loss_mask"], with_tools["loss_mask"])


@pytest.mark.parametrize(
    ("answer", "targets"),
    [
        ("<think>one two</think>three four", "three four<|im_end|>\n"),
        ("one two</think>three", "three<|im_end|>\n"),  # the prompt opened it
        ("three<think>one", "three"),  # cut
        ("one<think>two</think>three<think>four</think>five", "onethreefive<|im_end|>\n"),
        ("<think>the <think> tag</think>three", "three<|im_end|>\n"),
        ("one two", "one two<|im_end|>\n"),
    ],
)
def test_thinking_targets_false_leaves_out_the_reasoning(answer, targets, tokenizer, tmp_path):
    turns = [{"role": "user", "content": "<think>red</think>"}, {"role": "assistant", "content": answer}] * 2
    file = [str(write_parquet(tmp_path / "rows.parquet", [{"messages": turns}]))]
    whole, part = (
        build_dataset(file, load_settings(["trainer.default_local_dir=.", *more]).data, tokenizer, None, -1)[0]
        for more in ([], ["data.thinking_targets=false"])
    )
    assert torch.equal(whole["input_ids"], part["input_ids"])
    all_targets, kept = (tokenizer.decode(row["input_ids"][row["loss_mask"].bool()]) for row in (whole, part))
    assert all_targets == f"{answer}<|im_end|>\n" * 2
    assert kept == targets * 2


def test_padding_rows_count_for_nothing():
    rows = [{"input_ids": torch.tensor([i]), "loss_mask": torch.tensor([1])} for i in range(5)]
    padded = PaddedDataset(rows, 4)
    assert len(padded) == 8
    assert [int(padded[i]["loss_mask"]) for i in range(8)] == [1] * 5 + [0] * 3
    assert len(PaddedDataset(rows[:4], 4)) == 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_global_batch_does_not_depend_on_the_ranks(ranks):
    batch, data = 8, range(43)

    def batches(skip=0):
        samplers = [ResumableSampler(data, num_replicas=ranks, rank=r, seed=3, drop_last=True) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_position(epoch=1, skip=skip * batch // ranks)
        rows_of_ranks = [list(sampler) for sampler in samplers]
        per_rank = batch // ranks
        return [
            {i for rows in rows_of_ranks for i in rows[b * per_rank : (b + 1) * per_rank]}
            for b in range(len(data) // batch - skip)
        ]

    whole = ResumableSampler(data, num_replicas=1, rank=0, seed=3, drop_last=True)
    whole.set_position(epoch=1, skip=0)
    order = list(whole)
    assert batches() == [set(order[i : i + batch]) for i in range(0, 40, batch)]
    assert batches(skip=2) == batches()[2:]


class Ends:
    """A generation config that names these end tokens."""

    def __init__(self, ids):
        self.eos_token_id = ids


@pytest.mark.parametrize(
    ("eos", "template", "generation", "expected"),
    [
        ("<|im_start|>", CHAT_TEMPLATE, "<|im_end|>", ["<|im_end|>"]),  # as a reader of GGUF files names it
        ("<|im_start|>", CHAT_TEMPLATE, None, ["<|im_start|>", "<|im_end|>"]),
        ("<|endoftext|>", CHAT_TEMPLATE, "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]),
        ("<|im_end|>", "{{ messages[0]['content'] }}", "<|endoftext|>", ["<|endoftext|>"]),
        ("<|im_end|>", "{{ raise_exception('no') }}", None, ["<|im_end|>"]),
        ("<|im_end|>", None, None, ["<|im_end|>"]),
        (None, None, None, []),
    ],
)
def test_end_token_ids_of_generation_config_and_template(eos, template, generation, expected, caplog):
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.eos_token = eos
    named = None if generation is None else Ends(tokenizer.convert_tokens_to_ids(generation))
    with caplog.at_level(logging.INFO, "verl_speculator.base_model.chat_template"):
        ends = end_token_ids(tokenizer, named)
    assert list(ends) == sorted(tokenizer.convert_tokens_to_ids(expected))
    line, *warnings = caplog.messages
    assert all(f"{token} (" in line for token in expected) and line.count("(") == len(expected)
    assert bool(warnings) == (bool(expected) and eos not in expected), warnings


def test_end_token_ids_several_of_the_generation_config():
    tokenizer = make_tokenizer(chat_template=None)
    assert end_token_ids(tokenizer, Ends([9, 3])) == (3, 9)
