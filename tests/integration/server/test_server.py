"""`verl-speculator serve`, called by the official client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import verl_speculator.decoding.draft_and_verify as loop
from helpers.drafters import load_base
from helpers.live_server import QUESTION, answer_tokens, quick_speculator, serving, slow_rounds, until
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.server.engine import TextStream
from verl_speculator.server.protocol import ApiError, ChatRequest, CompletionRequest, Message, parse
from verl_speculator.server.settings import ServeSettings
from verl_speculator.utils.settings import UserError

MESSAGES = [{"role": "user", "content": QUESTION}]
LIMIT = 20_000
FIELDS = st.sampled_from(sorted(ChatRequest.model_fields | CompletionRequest.model_fields | Message.model_fields))


@pytest.fixture(scope="module")
def speculator(base):
    return quick_speculator(base)


@pytest.fixture(scope="module")
def servers(base, speculator):
    """A server of the base model alone and one with the speculator."""
    with serving(base) as alone, serving(base, speculator, max_request_bytes=LIMIT, max_waiting=1) as drafted:
        yield alone, drafted


@pytest.fixture(scope="module")
def clients(servers):
    return [client_of(address) for address, _ in servers]


@pytest.fixture(scope="module")
def client(clients):
    """Of the server with the speculator."""
    return clients[1]


@pytest.fixture(scope="module")
def address(servers):
    """Of the server with the speculator."""
    return servers[1][0]


@pytest.fixture
def slow(monkeypatch):
    slow_rounds(monkeypatch)


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client, **settings):
    settings = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40} | settings
    return client.chat.completions.create(**settings)


def complete(client, **settings):
    settings = {"model": "tiny", "prompt": QUESTION, "temperature": 0, "max_tokens": 40} | settings
    return client.completions.create(**settings)


def streamed(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def post_refused(address: str, path: str = "chat/completions", **fields) -> tuple[int, dict]:
    """Status and error of a request with these fields."""
    default = {"chat/completions": {"messages": MESSAGES}, "completions": {"prompt": QUESTION}}[path]
    reply = httpx.post(f"{address}/v1/{path}", json={"model": "tiny", **default, **fields})
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return reply.status_code, error


def test_chat_text_is_the_same_with_and_without_speculator(base, clients, tokenizer):
    prompt, answer = answer_tokens(base, 40)
    expected = tokenizer.decode(answer, skip_special_tokens=True)
    whole = [chat(client) for client in clients]
    assert [done.choices[0].message.content for done in whole] == [expected] * 2
    assert [streamed(chat(client, stream=True)) for client in clients] == [expected] * 2
    assert chat(clients[1], extra_body={"speculative": False}).choices[0].message.content == expected
    for done in whole:
        assert done.choices[0].finish_reason == "length" and done.model == "tiny" and done.id.startswith("chatcmpl-")
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 40)
        assert done.usage.total_tokens == len(prompt) + 40 and done.created > 0
    alone, drafted = (done.speculation for done in whole)
    assert alone["drafted"] == 0 and alone["tokens_per_pass"] is None and alone["tokens_per_second"] > 0
    assert drafted["drafted"] >= drafted["accepted"] > 0 and drafted["tokens_per_pass"] > 2


def test_chat_text_is_the_same_with_an_untrained_speculator(base, clients):
    config = SpeculatorConfig(n_predict=3, inner_dim=8, emb_dim=8, proj_dim=8)
    engine_base = load_base(base, torch.float32)
    vocab, width = engine_base.get_output_embeddings().weight.shape
    untrained = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0).eval()
    with serving(base, untrained) as (other, _):
        done = chat(client_of(other))
    assert done.choices[0].message == chat(clients[0]).choices[0].message
    assert done.speculation["drafted"] > done.speculation["accepted"]


def test_completions_text_is_the_same_for_every_form_of_prompt(clients, tokenizer):
    texts = [complete(client).choices[0].text for client in clients]
    ids = tokenizer(QUESTION)["input_ids"]
    for prompt in ([QUESTION], ids, [ids]):
        texts.append(complete(clients[1], prompt=prompt).choices[0].text)
    texts.append("".join(c.choices[0].text for c in complete(clients[1], stream=True)))
    assert len(set(texts)) == 1 and texts[0]
    assert complete(clients[1], max_tokens=None).usage.completion_tokens == 16


def test_stream_chunks_hold_accepted_spans_and_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    rounds = [chunk for chunk in chunks if "spans" in (getattr(chunk, "speculation", None) or {})]
    for chunk in rounds:
        facts = chunk.speculation
        assert "".join(text for text, _ in facts["spans"]) == chunk.choices[0].delta.content
        assert any(accepted for _, accepted in facts["spans"]) <= (facts["accepted"] > 0)
    assert any(accepted for chunk in rounds for _, accepted in chunk.speculation["spans"])
    assert sum(chunk.speculation["tokens"] for chunk in rounds) == 40
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    whole = chat(client).speculation
    assert {k: chunks[-2].speculation[k] for k in whole if k != "tokens_per_second"} == {
        k: whole[k] for k in whole if k != "tokens_per_second"
    }
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_stop_string_is_not_part_of_the_answer(clients):
    text = chat(clients[0]).choices[0].message.content
    for start, length in ((5, 1), (9, 4), (3, 9)):
        stop = text[start : start + length]
        for client in clients:
            done = chat(client, stop=[stop, "never said"]).choices[0]
            assert (done.message.content, done.finish_reason) == (text[: text.index(stop)], "stop")
            assert streamed(chat(client, stop=stop, stream=True)) == text[: text.index(stop)]


def test_end_token_ends_the_answer(base, servers, client, monkeypatch):
    answer = answer_tokens(base, 40)[1]
    monkeypatch.setattr(servers[1][1], "ends", (answer[20],))
    done = chat(client)
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == answer.index(answer[20]) + 1


def test_seed_reproduces_a_sampled_text(client):
    def drawn(**settings):
        return chat(client, temperature=1.5, **settings).choices[0].message.content

    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert streamed(chat(client, temperature=1.5, seed=3, stream=True)) == drawn(seed=3)
    # The API's default is to draw; top_k=1 leaves one token to draw.
    greedy = chat(client).choices[0].message.content
    assert chat(client, temperature=None, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert chat(client, temperature=None, seed=1).choices[0].message.content != greedy


def test_neutral_and_unknown_fields_do_not_change_the_answer(client):
    expected = chat(client).choices[0].message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two three"}]}]
    assert chat(client, messages=parts).choices[0].message.content == expected
    settings = {"n": 1, "user": "me", "tools": [], "presence_penalty": 0, "response_format": {"type": "text"}}
    assert chat(client, **settings, max_tokens=None, max_completion_tokens=40).choices[0].message.content == expected
    turns = [{"role": role, "content": "red"} for role in ("developer", "user", "assistant", "user")]
    as_system = [{"role": "system", "content": "red"}, *turns[1:]]
    assert chat(client, messages=turns).choices[0].message == chat(client, messages=as_system).choices[0].message
    # Without a number an answer has what the model's positions leave.
    usage = chat(client, max_tokens=None).usage
    assert usage.total_tokens == 256


def test_models_endpoint_lists_the_served_model_only(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").speculator == "sum_rnn"
    for ask in (lambda: client.models.retrieve("other"), lambda: chat(client, model="other")):
        with pytest.raises(openai.NotFoundError, match="'tiny'") as error:
            ask()
        assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "temperature=3: Input should be less than or equal to 2"),
        ({"temperature": 1e-40}, "temperature", "temperature=1e-40: expected 0, or 0.001 to 2"),
        ({"temperature": "hot"}, "temperature", "temperature='hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "max_tokens=5000: expected 1 to 1024 (--max-new-tokens)"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", "expected 1 to 1024"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "not empty"),
        ({"seed": 2**64}, "seed", "seed=18446744073709551616"),
        ({"top_k": -1}, "top_k", "top_k=-1"),
        ({"n": 2}, "n", "n=2: not supported by this server"),
        ({"logprobs": True}, "logprobs", "logprobs=True: not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream=true"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "messages='hello'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text parts"),
        ({"model": None}, "model", "model=None"),
    ],
)
def test_parse_invalid_field_is_named(address, fields, param, message):
    status, error = post_refused(address, **fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", "b"], [[1], [2]], [-1], [10**6], [True], 3, None])
def test_parse_invalid_prompt_is_named(address, prompt):
    status, error = post_refused(address, "completions", prompt=prompt)
    assert (status, error["param"]) == (400, "prompt")


def test_malformed_body_or_path_gives_an_api_error(address, client):
    for body, message in ((b"{", "not JSON"), (b"[]", "expected a JSON object"), (b"\xff", "not JSON"), (b"", "JSON")):
        reply = httpx.post(f"{address}/v1/completions", content=body)
        assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    deep = b"[" * 9000
    assert httpx.post(f"{address}/v1/completions", content=deep).status_code == 400
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    with socket.create_connection(httpx.URL(address).netloc.decode().split(":")) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    assert chat(client).choices


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | FIELDS, inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from([ChatRequest, CompletionRequest]), content=st.dictionaries(FIELDS, JSON) | JSON)
def test_parse_any_json_gives_a_request_or_a_one_line_error(kind, content):
    try:
        parse(kind, json.dumps(content).encode())
    except ApiError as error:
        assert error.status == 400 and error.message and "\n" not in error.message
        json.dumps(error.body)


def test_limits_of_body_prompt_and_answer_are_enforced(base, address, client):
    status, error = post_refused(address, messages=[{"role": "user", "content": "a" * LIMIT}])
    assert (status, error["code"]) == (413, "request_too_large") and str(LIMIT) in error["message"]
    reply = httpx.post(f"{address}/v1/completions", content=(b"x" * 1000 for _ in range(100)))
    assert reply.status_code == 413
    status, error = post_refused(address, messages=[{"role": "user", "content": "cat " * 300}])
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "context length is 256" in error["message"]
    status, error = post_refused(address, "completions", max_tokens=255)
    assert error["code"] == "context_length_exceeded" and "with max_tokens=255 these are" in error["message"]
    with serving(base, max_prompt_tokens=3, max_new_tokens=7) as (other, _):
        status, error = post_refused(other, "completions")
        assert error["code"] == "context_length_exceeded" and "takes 3 (--max-prompt-tokens)" in error["message"]
        ids = {"model": "tiny", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 7}
        assert httpx.post(f"{other}/v1/completions", json=ids).json()["usage"]["completion_tokens"] == 7


def test_queue_full_gives_429_and_waiting_requests_are_answered(address, client, slow):
    """One request is answered, one may wait."""
    texts: list[str] = []
    asking = [threading.Thread(target=lambda: texts.append(chat(client).choices[0].message.content)) for _ in range(2)]
    expected = chat(client).choices[0].message.content
    running = chat(client, stream=True, max_tokens=200, extra_body={"speculative": False})
    next(iter(running))
    asking[0].start()

    def full() -> bool:
        status, _ = post_refused(address, max_tokens=100000)
        assert status == 400  # an invalid request does not wait
        try:
            chat(client, max_tokens=1, timeout=0.2)
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded" and "1 wait" in error.message
            return True
        except openai.APITimeoutError:
            return False
        return False

    until(full)
    running.close()
    asking[0].join()
    asking[1].start()
    asking[1].join()
    assert texts == [expected] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_client_disconnect_ends_the_generation(servers, client, slow, stream):
    address, engine = servers[1]
    # 200 rounds, ten seconds.
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 200, "stream": stream}
    body["speculative"] = False
    if stream:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                if '"spans"' in line:
                    break
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=1)
    ticket = engine._open[-1]
    until(ticket.future.done, 2)
    assert 0 < len(ticket.generation.tokens) < 200 and ticket.generation.rounds[-1].finish is None
    assert not engine.base.base_model._forward_hooks
    assert chat(client).choices[0].finish_reason == "length"


def test_engine_stop_ends_a_stream_with_an_error(servers, client, slow):
    with pytest.raises(openai.APIError, match="the generation was stopped"):
        for chunk in chat(client, stream=True, max_tokens=200):
            if chunk.choices[0].delta.content:
                servers[1][1].stop()
    assert chat(client).choices[0].finish_reason == "length"


def test_generation_failure_gives_500_and_the_next_request_is_answered(client, monkeypatch, caplog):
    expected = chat(client).choices[0].message.content
    advance = loop.DraftAndVerify.advance
    monkeypatch.setattr(loop.DraftAndVerify, "advance", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="log says why"):
        chat(client)
    with pytest.raises(openai.APIError, match="log says why"):
        list(chat(client, stream=True))
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(loop.DraftAndVerify, "advance", advance)
    assert chat(client).choices[0].message.content == expected


def test_text_stream_releases_complete_characters_only(tokenizer):
    text = "añ — 語 🙂 <|im_start|>ends"
    stream = TextStream(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    pieces = [*(stream.put(token) for token in tokens), stream.end()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces) and len([p for p in pieces if p]) > 8
    half = TextStream(tokenizer)
    assert half.put(tokenizer("語")["input_ids"][0]) == "" and half.end() == "�"


def test_text_stream_holds_back_a_possible_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["abcd", "xyz"])
    texts = [stream.put(token) for token in tokenizer("abcabx")["input_ids"]]
    assert "".join(texts) == "abcab" and texts[2] == ""
    assert stream.end() == "x"
    stream = TextStream(tokenizer, ["bcd", "cd"])
    assert "".join(stream.put(token) for token in tokenizer("abcde")["input_ids"]) == "a" and stream.stopped
    assert stream.end() == ""


# — the command —


def command(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "VERL_SPECULATOR_PATH"}
    return subprocess.Popen(
        [sys.executable, "-m", "verl_speculator", "serve", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=clean | environment,
    )


def test_serve_command_announces_its_address_and_answers(base, speculator, tmp_path):
    folder = save_speculator(speculator, tmp_path / "spec", provenance={"base": {"name": "my/base"}})
    process = command("--base", base, "--port", 0, "--draft-length", 2, VERL_SPECULATOR_PATH=str(folder))
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving "):
            break
    assert any("trained for my/base" in line for line in lines)
    address = lines[-1].split("API ")[1].split("/v1")[0]
    done = chat(client_of(address), model=base.name)
    assert done.speculation["accepted"] > 0
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("", 0)


def test_serve_command_invalid_setting_exits_2_with_one_line(base, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = command("--base", base, "--port", port, VERL_SPECULATOR_PATH=str(tmp_path / "none"))
        lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert (
        lines[-1]
        == f"error: host=127.0.0.1, port={port}: Address already in use; expected a free one, such as --port 0"
    )
    assert lines[0].startswith(f"warning: VERL_SPECULATOR_PATH: {tmp_path / 'none'}: no speculator checkpoint here")
    assert lines[0].endswith("the base alone") and len(lines) == 2
    process = command("--base", base, "--speculator", tmp_path / "none")
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2 and len(lines) == 1 and "no speculator checkpoint here" in lines[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port=70000: expected 0 to 65535"),
        ({"max_request_bytes": 0}, "max_request_bytes=0: expected a number ≥ 1"),
        ({"max_waiting": -1}, "max_waiting=-1: expected a number ≥ 0"),
    ],
)
def test_serve_settings_out_of_range_raise(settings, message):
    with pytest.raises(UserError, match="^" + message.split("(")[0]):
        ServeSettings(base="b", **settings)


def test_serve_without_speculator_or_dependencies_says_so(monkeypatch, capsys):
    import verl_speculator.cli.generate as module
    from verl_speculator.cli.options import LoadingOptions

    monkeypatch.delenv("VERL_SPECULATOR_PATH", raising=False)
    assert module._find_speculator(None) is None
    assert "the base alone" in capsys.readouterr().err
    monkeypatch.setattr(module, "restart_with_allocator", lambda: None)
    with pytest.raises(UserError, match="draft_length=2: there is no speculator"):
        module.serve(ServeSettings("b", draft_length=2), LoadingOptions())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install fastapi uvicorn"):
        module.serve(ServeSettings("b"), LoadingOptions())


def test_command_table_imports_no_torch_or_fastapi():
    code = "import verl_speculator.__main__, sys; sys.stdout.write(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "fastapi", "uvicorn"} & set(loaded)


def test_chat_base_without_template_uses_the_default(base, tmp_path, tokenizer):
    from helpers.tiny_models import make_tokenizer

    load_base(base, torch.float32).save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    with serving(tmp_path) as (other, _):
        ids = tokenizer(f"User: {QUESTION}<|im_end|>Assistant:")["input_ids"]
        assert chat(client_of(other)).usage.prompt_tokens == len(ids)


def test_stream_is_server_sent_events(address):
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 3, "stream": True}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events)
