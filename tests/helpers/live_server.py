"""A server under test: the real application and uvicorn, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

import verl_speculator.decoding.draft_and_verify as loop
from helpers.drafters import load_base, train_quickly
from verl_speculator.base_model.chat_template import end_token_ids, tokenize_prompt
from verl_speculator.base_model.loading import load_tokenizer
from verl_speculator.decoding import speculative_generate
from verl_speculator.server.app import create_app
from verl_speculator.server.engine import Engine
from verl_speculator.server.settings import ServeSettings, bind

QUESTION = "one two three"


def answer_tokens(base: Path, count: int) -> tuple[list[int], list[int]]:
    """The tokens of the question, and what the base alone says to it, greedily."""
    prompt = tokenize_prompt(load_tokenizer(base), [{"role": "user", "content": QUESTION}])
    return prompt, speculative_generate(load_base(base, torch.float32), None, prompt, max_new_tokens=count).tokens


def quick_speculator(base: Path, count: int = 60):
    """A speculator that knows the base's answer to the question."""
    prompt, answer = answer_tokens(base, count)
    return train_quickly(load_base(base, torch.float32), [[*prompt, *answer]])


@contextmanager
def serving(base: Path, speculator=None, **settings) -> Iterator[tuple[str, Engine]]:
    """A running server: its address and its engine."""
    settings = ServeSettings(base=str(base), served_name="tiny", port=0, **settings)
    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    ends = end_token_ids(tokenizer, model.generation_config)
    engine = Engine(model, tokenizer, speculator, ends=ends, max_waiting=settings.max_waiting)
    with bind(settings.host, settings.port) as taken:
        config = uvicorn.Config(create_app(engine, settings), log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()


def until(holds, seconds: float = 10) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def slow_rounds(monkeypatch, seconds: float = 0.05) -> None:
    """Make rounds take a while, so that a test can act between them."""
    advance = loop.DraftAndVerify.advance

    def waiting(self, count):
        time.sleep(seconds)
        return advance(self, count)

    monkeypatch.setattr(loop.DraftAndVerify, "advance", waiting)
