"""Answers of the base's own: the same as alone, every other column as it was, and a killed run goes on."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.drafters import alone, load_base
from helpers.engine_harness import load_rows
from helpers.tiny_models import make_base, make_chat_rows, make_tokenizer, write_parquet
from verl_speculator.base_model.chat_template import end_token_ids, tokenize_prompt
from verl_speculator.data.generation_backends import HuggingFaceBackend, cut_at_end
from verl_speculator.data.regenerate import RegenerateSettings, regenerate
from verl_speculator.utils.settings import UserError

TOKENS = 32
# Every so manieth token ends a turn, so that answers are long, short, empty or do not end.
ENDS = {"qwen2_untied": 4, "llama": 10, "gemma2": 3}


def with_ends(folder: Path, out: Path, every: int) -> Path:
    """A copy of a base for which many tokens end a turn, and that would punish repetition if it were applied."""
    shutil.copytree(folder, out)
    path = out / "generation_config.json"
    config = json.loads(path.read_text()) | {"eos_token_id": list(range(2, 330, every)), "repetition_penalty": 1.7}
    path.write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def ending(bases, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ending")
    return {name: with_ends(bases[name], root / name, every) for name, every in ENDS.items()}


@pytest.fixture(scope="module")
def small(ending) -> Path:
    return ending["qwen2_untied"]


def make_settings(base: Path, data: Path, out: Path, **more) -> RegenerateSettings:
    settings = {"max_new_tokens": TOKENS, "dtype": "fp64", "batch_size": 4, "shard_rows": 8, "device": "cpu"} | more
    return RegenerateSettings(base=str(base), data=data, out=out, **settings)


def read_metadata(path: Path) -> dict:
    return json.loads(pq.read_schema(path).metadata[b"verl_speculator"])


def answer_alone(base: Path, tokenizer, messages: list[dict], limit: int = TOKENS) -> tuple[str, bool]:
    """What the base model answers to some messages, one prompt at a time, argmax by argmax; whether it ended."""
    model, ids, answered = load_base(base), tokenize_prompt(tokenizer, messages), []
    ends = end_token_ids(tokenizer, model.generation_config)
    while len(answered) < min(limit, 256 - len(ids)):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + answered]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return tokenizer.decode(answered, skip_special_tokens=True), True
        answered.append(token)
    return tokenizer.decode(answered, skip_special_tokens=True), False


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_is_the_one_given_alone(ending, name, chat, tokenizer, tmp_path):
    """Turn by turn, with the base's own earlier answers before it; rows whose answer does not end are dropped."""
    counts = regenerate(make_settings(ending[name], chat, tmp_path / "out.parquet", num_rows=12))
    expected, dropped = [], []
    source = pq.read_table(chat)["messages"].to_pylist()
    for row in (i * 40 // 12 for i in range(12)):
        conversation = source[row]
        for i, message in enumerate(conversation):
            if message["role"] == "assistant":
                text, ended = answer_alone(ending[name], tokenizer, conversation[:i])
                conversation[i] = {"role": "assistant", "content": text}
                if not ended:
                    dropped.append(row)
                    break
        else:
            expected.append(conversation)
    assert pq.read_table(tmp_path / "out.parquet")["messages"].to_pylist() == expected
    assert counts.dropped.get("unfinished", []) == dropped and counts.written == 12 - len(dropped)
    assert len(expected) >= 4 and any(len(conversation) == 4 for conversation in expected)


def test_unfinished_answers_are_kept_on_request(small, chat, tokenizer, tmp_path):
    counts = regenerate(
        make_settings(small, chat, tmp_path / "new" / "out.parquet", num_rows=12, max_new_tokens=2, seed=3)
    )
    assert 0 < counts.written < 12 and counts.unfinished == 0
    kept = regenerate(
        make_settings(small, chat, tmp_path / "all.parquet", num_rows=12, max_new_tokens=2, keep_unfinished=True)
    )
    assert kept.written == 12 and kept.unfinished > 0 and not kept.dropped
    for conversation in pq.read_table(tmp_path / "all.parquet")["messages"].to_pylist():
        answered = [m["content"] for m in conversation if m["role"] == "assistant"]
        assert answered == [
            answer_alone(small, tokenizer, conversation[:i], 2)[0]
            for i, m in enumerate(conversation)
            if m["role"] == "assistant"
        ]


def test_other_columns_stay_as_they_were(small, tmp_path):
    """Nested, dictionary-encoded and null columns, a message's further keys, and the file's own metadata."""
    rows = make_chat_rows(6)
    for i, row in enumerate(rows):
        for message in row["messages"]:
            message["name"] = "bob" if message["role"] == "user" and i % 2 else None
    table = pa.table(
        {
            "id": pa.array(range(6), pa.int16()),
            "messages": pa.array([row["messages"] for row in rows]),
            "info": pa.array([{"tags": ["a", None], "score": {"x": 1.5}}, None] * 3),
            "kind": pa.array(["a", "b", None] * 2).dictionary_encode(),
            "blob": pa.array([b"\x00\xff"] * 6, pa.large_binary()),
        }
    ).replace_schema_metadata({"pandas": "{}", "mine": "yes"})
    pq.write_table(table, tmp_path / "in.parquet")
    regenerate(make_settings(small, tmp_path / "in.parquet", tmp_path / "out.parquet", keep_unfinished=True))
    out = pq.ParquetFile(tmp_path / "out.parquet").read()
    assert out.schema.equals(pq.ParquetFile(tmp_path / "in.parquet").schema_arrow)
    assert out.schema.metadata[b"mine"] == b"yes"
    assert out.drop_columns("messages").equals(table.drop_columns("messages"))
    before, after = (t["messages"].to_pylist() for t in (table, out))
    for old, new in zip(before, after, strict=True):
        assert [m for m in old if m["role"] == "user"] == [m for m in new if m["role"] == "user"]
        assert [m["role"] for m in old] == [m["role"] for m in new] and old != new


@pytest.mark.parametrize(
    ("columns", "roles"),
    [
        ({"prompt": "one two"}, "ua"),
        ({"prompt": [{"role": "system", "content": "red"}, {"role": "user", "content": "cat"}]}, "sua"),
        ({"turns": ["one", "two"], "prompt": "not this"}, "uaua"),
        ({"messages": [{"role": "user", "content": "cat"}], "prompt": "not this"}, "ua"),
    ],
)
def test_rows_of_prompts_get_messages(small, tokenizer, tmp_path, columns, roles):
    data = write_parquet(tmp_path / "in.parquet", [columns | {"answer": "a person's"}] * 2)
    regenerate(make_settings(small, data, tmp_path / "out.parquet", keep_unfinished=True))
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[1]
    assert "".join(m["role"][0] for m in row["messages"]) == roles
    assert {name: row[name] for name in columns if name != "messages"} == {
        name: value for name, value in columns.items() if name != "messages"
    }
    assert row["answer"] == "a person's"
    assert row["messages"][-1]["content"] == answer_alone(small, tokenizer, row["messages"][:-1])[0]


def test_rows_that_cannot_be_answered_are_counted_and_named(small, tokenizer, tmp_path):
    """The base has 256 positions: no prompt may fill them, and a prompt near them has less room to be answered in."""
    near = "cat " * 120
    while len(tokenize_prompt(tokenizer, [{"role": "user", "content": near}])) > 250:
        near = near[:-1]
    say = lambda text, **more: {"messages": [{"role": "user", "content": text, **more}]}  # noqa: E731
    rows = [say("red"), say("x" * 300), say(near), say("dog", tool_calls="f()")]
    data = write_parquet(tmp_path / "in.parquet", rows)
    counts = regenerate(make_settings(small, data, tmp_path / "out.parquet", keep_unfinished=True))
    assert counts.dropped == {"tools": [3], "too_long": [1]} and counts.written == 2
    assert "1 dropped, prompt does not fit the base model: row 1" in counts.summary()
    description = read_metadata(tmp_path / "out.parquet")
    assert description["dropped_rows"] == counts.dropped
    assert (
        description["counts"]["rows"] == 4
        and description["counts"]["rows_written"] == 2 == description["counts"]["answers"]
    )
    answer = pq.read_table(tmp_path / "out.parquet")["messages"].to_pylist()[1][-1]["content"]
    assert answer == answer_alone(small, tokenizer, rows[2]["messages"])[0]


def test_absolute_positions(tokenizer, tmp_path):
    """GPT-2 looks its positions up: padding must not move them, and no row of a batch may go past the last."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=330, bos_token_id=None, eos_token_id=None, **shape))
    base.save_pretrained(tmp_path / "gpt2")
    ends = (1, 2, 3)
    settings = make_settings(tmp_path / "gpt2", Path(), Path(), batch_size=8, max_new_tokens=10)
    many = HuggingFaceBackend(settings, "cpu", torch.float64, ends, None)
    prompts = [list(range(5, 5 + n)) for n in (3, 23, 9, 14, 20, 20)]
    answers = sorted(many.generate(prompts, [0] * 6))
    for prompt, answer in zip(prompts, answers, strict=True):
        alone, size = list(prompt), min(10, 24 - len(prompt))
        with torch.no_grad():
            for _ in range(size):
                alone.append(int(many.base(input_ids=torch.tensor([alone])).logits[0, -1].argmax()))
        assert answer[1:] == cut_at_end(alone[len(prompt) :], ends)


@pytest.mark.parametrize("architecture", ["qwen2_tied", "gemma2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_that_replace_others_change_no_text(bases, architecture, batch_size):
    """Prompts of many lengths and answers of many lengths: rows end, others take their places, caches are cut."""
    base = load_base(bases[architecture])
    settings = make_settings(bases[architecture], Path(), Path(), batch_size=batch_size, max_new_tokens=25)
    prompts = [[(13 * i + 7 * j) % 290 + 5 for j in range(3 + (11 * i) % 40)] for i in range(17)]
    texts = [alone(base, prompt, 25, eos_token_id=None) for prompt in prompts]
    ends = sorted({text[(5 * i) % 23] for i, text in enumerate(texts)})[::2]  # end tokens at different places
    backend = HuggingFaceBackend(settings, "cpu", torch.float64, ends, None)
    answers = sorted(backend.generate(prompts, range(17)))
    assert [answer[1:] for answer in answers] == [cut_at_end(text, ends) for text in texts]
    assert len({len(answer.tokens) for answer in answers}) > 2 and not all(a.finished for a in answers)


def test_a_sampled_text_does_not_depend_on_the_batch(small):
    prompts = [[5, 17, 40], list(range(10, 40)), [7] * 9, [100, 200], [3, 4, 5, 6]]
    found = []
    for batch_size in (1, 2, 5):
        settings = make_settings(small, Path(), Path(), batch_size=batch_size, temperature=0.9, max_new_tokens=12)
        found.append(sorted(HuggingFaceBackend(settings, "cpu", torch.float64, (2,), None).generate(prompts, range(5))))
    assert found[0] == found[1] == found[2]
    settings = make_settings(small, Path(), Path(), temperature=0.9, max_new_tokens=12)
    assert (
        sorted(HuggingFaceBackend(settings, "cpu", torch.float64, (2,), None).generate(prompts, range(1, 6)))
        != found[0]
    )


def test_a_base_with_a_recurrent_state_runs_by_generate(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=330, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    base.save_pretrained(tmp_path)
    settings = make_settings(tmp_path, Path(), Path(), batch_size=2, max_new_tokens=5)
    backend = HuggingFaceBackend(settings, "cpu", torch.float32, (2,), None)
    answers = sorted(backend.generate([[5, 6, 7], [9, 10, 11], [40, 41, 42]], [0] * 3))
    assert [answer.index for answer in answers] == [0, 1, 2] and all(answer.tokens for answer in answers)


def test_sampling_follows_the_seed_wherever_it_was_interrupted(small, chat, tmp_path, monkeypatch):
    settings = {"temperature": 1.0, "top_k": 50, "num_rows": 24}

    def run(name: str, **more) -> list:
        regenerate(make_settings(small, chat, tmp_path / name, **(settings | more)))
        return pq.read_table(tmp_path / name)["messages"].to_pylist()

    whole = run("a.parquet")
    assert run("other.parquet", seed=1) != whole and run("cold.parquet", temperature=0.0) != whole
    # Stopped in the third shard, while the line of the second was being written.
    calls = []
    generate = HuggingFaceBackend.generate

    def stopping(self, *args, **more):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return generate(self, *args, **more)

    monkeypatch.setattr(HuggingFaceBackend, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("b.parquet")
    monkeypatch.undo()
    log = tmp_path / "b.parquet.answers.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 3 and not (tmp_path / "b.parquet").exists()
    log.write_text("".join(lines)[:-9])
    (tmp_path / ".tmp.1.b.parquet.answers.jsonl").write_text("half")
    assert run("b.parquet") == whole
    assert not log.exists() and not list(tmp_path.rglob(".tmp.*"))


def test_shards_of_other_settings_are_refused(small, chat, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("verl_speculator.data.regenerate.write_answers", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            regenerate(make_settings(small, chat, out, num_rows=8))
    loads = []
    load = HuggingFaceBackend.__init__
    monkeypatch.setattr(HuggingFaceBackend, "__init__", lambda self, *a, **k: loads.append(1) or load(self, *a, **k))
    with pytest.raises(UserError) as error:
        regenerate(make_settings(small, chat, out, num_rows=8, temperature=0.5))
    assert "temperature (0.0, 0.5)" in str(error.value) and "--overwrite" in str(error.value) and not loads
    # Greedily the size of a batch is free, and finished shards need no base; --overwrite goes on as well.
    regenerate(make_settings(small, chat, out, num_rows=8, batch_size=1, overwrite=True))
    assert not loads
    with pytest.raises(UserError, match="exists already"):
        regenerate(make_settings(small, chat, out, num_rows=8))
    regenerate(make_settings(small, chat, out, num_rows=8, temperature=0.5, overwrite=True))
    assert loads and read_metadata(out)["temperature"] == 0.5


def test_a_killed_command_goes_on(small, chat, tmp_path):
    """SIGKILL while it writes shards: the same command ends as if nothing had happened."""
    out, log = tmp_path / "out.parquet", tmp_path / "out.parquet.answers.jsonl"
    command = [
        *(sys.executable, "-m", "verl_speculator", "regenerate", "--base", small, "--data", chat, "--out", out),
        *("--max-new-tokens", TOKENS, "--dtype", "fp64", "--device", "cpu", "--shard-rows", 1, "--batch-size", 1),
    ]
    command, environment = list(map(str, command)), os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not log.exists() or (len(log.read_text().splitlines()) < 4 and process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(log.read_text().splitlines()) - 1
    assert 3 <= done < 40, "the kill came too late"
    assert not out.exists()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "of 40 rows" in ended.stdout and "chat.parquet (answers)" in ended.stderr
    assert not log.exists()
    regenerate(make_settings(small, chat, tmp_path / "whole.parquet", shard_rows=40, batch_size=16))
    assert pq.read_table(out)["messages"].equals(pq.read_table(tmp_path / "whole.parquet")["messages"])


def test_training_reads_the_result(small, chat, tokenizer, tmp_path):
    """The loss mask covers what the base answered, and the result says what it is."""
    out = tmp_path / "out.parquet"
    counts = regenerate(make_settings(small, chat, out, num_rows=12))
    rows = load_rows(out, tokenizer)
    conversations = pq.read_table(out)["messages"].to_pylist()
    assert len(rows) == counts.written == len(conversations)
    for row, conversation in zip(rows, conversations, strict=True):
        answered = tokenizer.decode(row["input_ids"][row["loss_mask"].bool()])
        assert answered == "".join(f"{m['content']}<|im_end|>\n" for m in conversation if m["role"] == "assistant")
    description = read_metadata(out)
    assert (
        description["base"] == str(small)
        and len(description["base_fingerprint"]) == 32
        and description["temperature"] == 0
    )
    assert description["settings"]["dtype"] == "float64" and description["settings"]["max_new_tokens"] == TOKENS
    assert description["versions"]["transformers"] and description["data"] == str(chat) and description["hardware"]


def test_vllm_is_asked_for_the_same(small, chat, tmp_path, monkeypatch):
    """A stand-in for vLLM, which is not installed here: what it is given, and that what it gives is used."""
    made, sampling_params = {}, []

    class LLM:
        def __init__(self, **settings):
            made.update(settings)
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=256))

        def generate(self, prompts, sampling, *, use_tqdm):
            sampling_params.extend(sampling)
            for prompt, params in zip(prompts, sampling, strict=True):
                ended = len(prompt["prompt_token_ids"]) % 2 == 0
                tokens = [100, 101] + ([params.stop_token_ids[0]] if ended else [])
                one = types.SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop" if ended else "length")
                yield types.SimpleNamespace(outputs=[one])

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    more = {"backend": "vllm", "device": "auto", "dtype": "bf16", "temperature": 0.7, "top_k": 0}
    counts = regenerate(
        make_settings(small, chat, tmp_path / "out.parquet", vllm_args={"tensor_parallel_size": 2}, **more)
    )
    assert made["model"] == str(small) and made["tensor_parallel_size"] == 2 and made["generation_config"] == "vllm"
    assert made["dtype"] == "bfloat16"
    assert (
        sampling_params[0].temperature == 0.7
        and sampling_params[0].top_k == -1
        and sampling_params[0].stop_token_ids[0] < 330
    )
    assert len({params.seed for params in sampling_params}) == len(sampling_params) and 0 < counts.written < 40
    assert read_metadata(tmp_path / "out.parquet")["versions"]["vllm"] == "0.0"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": -1}, "temperature=-1: expected a number ≥ 0"),
        ({"top_p": 2}, "top_p=2: expected a number in (0, 1]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a number ≥ 1"),
        ({"shard_rows": 0}, "shard_rows=0: expected a number ≥ 1"),
        ({"backend": "vlm"}, "backend=vlm: expected hf or vllm (did you mean 'vllm'?)"),
        ({"backend": "vllm", "device": "auto"}, "backend=vllm: vLLM is not installed"),
        ({"vllm_args": {"seed": 1}}, "only for --backend vllm"),
        ({"dtype": "fp31"}, "dtype=fp31: expected auto"),
        ({"base": "/no/such"}, "base=/no/such:"),
        ({"data": Path("nothing.parquet")}, "data=nothing.parquet: no such file"),
        ({"out": Path("out.jsonl")}, "out=out.jsonl: expected a name that ends in .parquet"),
    ],
)
def test_bad_settings(small, chat, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(HuggingFaceBackend, "__init__", lambda *a, **k: pytest.fail("the base was loaded"))
    if more.get("backend") == "vllm" and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    arguments = {"base": str(small), "data": chat, "out": tmp_path / "out.parquet", "device": "cpu"} | more
    with pytest.raises(UserError) as error:
        regenerate(RegenerateSettings(**arguments))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "plain", "promt": "x"}], "no column that can be used; it has text, promt (did you mean 'prompt'?)"),
        ([], "holds no rows"),
        ([{"messages": "a text"}], "column 'messages' is string, expected lists of messages"),
        ([{"messages": [{"from": "human", "value": "x"}]}], "expected lists of messages with a role and a content"),
        ([{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}], "expected lists of messages"),
        ([{"prompt": "x"}, {"prompt": None}], "row 1: prompt is None, expected a text"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "row 0: messages has no message to answer"),
        ([{"messages": [{"role": "user", "content": None}]}, *make_chat_rows(1)], "row 0: messages[0] is"),
        ([{"prompt": "x", "enable_thinking": True}], "column 'enable_thinking' is set"),
    ],
)
def test_files_that_cannot_be_used(small, tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(HuggingFaceBackend, "__init__", lambda *a, **k: pytest.fail("the base was loaded"))
    data = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=None if rows else pa.schema({"prompt": pa.string()})), data)
    with pytest.raises(UserError) as error:
        regenerate(make_settings(small, data, tmp_path / "out.parquet"))
    assert message in str(error.value) and str(data) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_places_that_cannot_be_used(small, chat, tmp_path):
    data = shutil.copy(chat, tmp_path / "in.parquet")
    with pytest.raises(UserError, match="is the data itself"):
        regenerate(make_settings(small, data, data, overwrite=True))
    with pytest.raises(UserError, match=r"in.parquet is a file, expected a directory"):
        regenerate(make_settings(small, data, data / "out.parquet"))
    log = tmp_path / "out.parquet.answers.jsonl"
    for content in ("", "a thesis\n", "[1]\n", "{}"):
        log.write_text(content)
        with pytest.raises(UserError, match=r"answers.jsonl: expected answers for out.parquet"):
            regenerate(make_settings(small, data, tmp_path / "out.parquet", overwrite=True))
        assert log.read_text() == content
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated, or not a parquet file"):
        regenerate(make_settings(small, data, tmp_path / "other.parquet"))


def test_a_template_that_refuses_is_named_with_the_row(small, tmp_path, monkeypatch):
    base = shutil.copytree(small, tmp_path / "strict")
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no cats') if 'cat' in messages[0]['content'] }}")
    tokenizer.save_pretrained(base)
    data = write_parquet(tmp_path / "in.parquet", [{"prompt": "dog"}, {"prompt": "cat"}])
    monkeypatch.setattr(HuggingFaceBackend, "__init__", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=r"row 1: the chat template refuses it: no cats"):
        regenerate(make_settings(base, data, tmp_path / "out.parquet"))


def test_a_base_that_never_ends(tokenizer, chat, tmp_path):
    base = make_base("llama", tmp_path / "base", tokenizer)
    with pytest.raises(UserError) as error:
        regenerate(make_settings(base, chat, tmp_path / "out.parquet", num_rows=2, max_new_tokens=1))
    assert str(error.value).endswith(
        "no row is left: 2 dropped, answer did not end within max_new_tokens: rows 0, 20; expected a larger "
        "--max-new-tokens than 1, or --keep-unfinished"
    )
    assert not (tmp_path / "out.parquet.answers.jsonl").exists()


def test_a_users_error_is_one_line_and_exit_code_2(small, chat, tmp_path):
    command = [sys.executable, "-m", "verl_speculator", "regenerate", "--base", small, "--data", chat]
    command += ["--out", tmp_path / "out.parquet", "--vllm-args", "[1]"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)
    assert "error: vllm_args=[1]: expected a JSON object" in ended.stderr
