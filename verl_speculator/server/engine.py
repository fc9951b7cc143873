"""One model and a queue of requests, which a single thread answers one after another, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import nn

from verl_speculator.base_model.chat_template import tokenize_prompt
from verl_speculator.base_model.loading import base_shape
from verl_speculator.decoding import (
    DraftTree,
    Generation,
    GenerationOptions,
    GenerationStream,
    Round,
    speculative_generate,
)
from verl_speculator.decoding.options import DraftLength
from verl_speculator.decoding.target import position_limit
from verl_speculator.models import Speculator
from verl_speculator.server.protocol import ApiError, TextRound
from verl_speculator.utils.settings import UserError

logger = logging.getLogger(__name__)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens to text incrementally.

    The results of `put` and `end`, joined, are the text of all tokens without special ones, cut before the first stop
    string. Text that may still become another character or a stop string is held back.

    Args:
        tokenizer: of the base model.
        stops: strings that end the text and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.stopped = False
        self._held = ""
        # Tokens before `_end` are decoded. Those from `_begin` on are decoded again as context of the next ones,
        # because a tokenizer may decode a token differently at the beginning of a text.
        self._begin = self._end = 0

    def put(self, token: int) -> str:
        """Add a token; the text that has become certain."""
        self.tokens.append(token)
        return self._release(last=False)

    def end(self) -> str:
        """The text that was held back."""
        return self._release(last=True)

    def _new_text(self, *, last: bool) -> str:
        """Complete characters that were not decoded before."""
        context = self._decode(self.tokens[self._begin : self._end])
        text = self._decode(self.tokens[self._begin :])
        if len(text) <= len(context) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._begin, self._end = self._end, len(self.tokens)
        return text[len(context) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, *, last: bool) -> str:
        """The part of held and new text in which no stop string can begin."""
        text = self._held + self._new_text(last=last)
        if self.stopped:
            return ""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def text_round(text: TextStream, part: Round) -> TextRound:
    """A round's tokens as text."""
    pieces = [text.put(token) for token in part.tokens]
    # Decoding's stop rule sees special tokens; the text without them may hold a stop string that it has missed.
    finish = "stop" if text.stopped else part.finish
    if finish:
        pieces[-1] += text.end()
    halves = ("".join(pieces[: part.accepted]), True), ("".join(pieces[part.accepted :]), False)
    return TextRound([(span, accepted) for span, accepted in halves if span], replace(part, finish=finish))


class Ticket:
    """A request in the queue: iterate for its rounds; `cancel` when the client is gone.

    Attributes:
        generation: the result so far; None while it waits.
        cancelled: whether the generation should stop before its next round.
    """

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._rounds: asyncio.Queue[TextRound | ApiError] = asyncio.Queue()
        self.cancelled = False

    def cancel(self) -> None:
        """Leave the queue, or stop after the current round."""
        self.cancelled = True
        if self.future is not None and self.future.cancel():
            self._rounds.put_nowait(_stopped())

    def put(self, result: TextRound | ApiError) -> None:
        """Called in the generation thread: the next round, or why there is none."""
        self._loop.call_soon_threadsafe(self._rounds.put_nowait, result)

    async def __aiter__(self) -> AsyncIterator[TextRound]:
        while True:
            result = await self._rounds.get()
            if isinstance(result, ApiError):
                raise result
            yield result
            if result.finish:
                return


class Engine:
    """A base model with or without a speculator, and one thread that generates.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        tokenizer: the base model's, with a chat template.
        speculator: None for the base model alone.
        ends: tokens that end an answer.
        draft_length: drafts per round, or auto; None for the speculator's n_predict.
        draft_tree: used by greedy answers instead. Sampled answers draft a chain, as trees are verified greedily.
        max_waiting: requests that may wait while another is answered.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer: Any,
        speculator: Speculator | None,
        *,
        ends: Sequence[int],
        draft_length: DraftLength = None,
        draft_tree: DraftTree | None = None,
        max_waiting: int = 16,
    ) -> None:
        self.base, self.tokenizer, self.speculator = base, tokenizer, speculator
        self.ends, self.max_waiting = tuple(ends), max_waiting
        self.draft_length, self.draft_tree = draft_length, draft_tree
        self.positions = position_limit(base)
        self.vocabulary = base_shape(base)[1]
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")
        self._open: list[Ticket] = []

    def warm_up(self) -> None:
        """Generate a few tokens, so that the first request does not pay for one-time costs."""
        settings = {"max_new_tokens": 8, "eos_token_id": ()} | self._drafts(0)
        self._worker.submit(speculative_generate, self.base, self.speculator, [0], **settings).result()

    def _drafts(self, temperature: float) -> dict[str, Any]:
        """Draft settings of a generation with the speculator."""
        if self.draft_tree is not None and temperature == 0:
            return {"draft_tree": self.draft_tree}
        return {"draft_length": self.draft_length}

    def stop(self) -> None:
        """Cancel all tickets."""
        for ticket in self._open:
            ticket.cancel()

    def close(self) -> None:
        """Drop what has not begun and wait for the end of the thread."""
        self._worker.shutdown(cancel_futures=True)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation for the assistant to continue.

        Raises:
            ApiError: if the chat template rejects it.
        """
        try:
            return tokenize_prompt(self.tokenizer, messages)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None

    def tokenize_text(self, text: str) -> list[int]:
        """Token ids of a text to continue, without the chat template."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def submit(self, prompt: Sequence[int], options: GenerationOptions, *, speculative: bool = True) -> Ticket:
        """Join the queue.

        Args:
            prompt: token ids.
            options: of the generation; end tokens, tokenizer and draft settings are the engine's.
            speculative: False generates without the speculator.

        Raises:
            ApiError: if the queue is full.
        """
        self._open = [ticket for ticket in self._open if not ticket.future.done()]
        waiting = len(self._open) - 1
        if waiting >= self.max_waiting:
            message = f"one request is being answered and {waiting} wait, as many as may (--max-waiting); try later"
            raise ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error")
        speculator = self.speculator if speculative else None
        drafts = {} if speculator is None else self._drafts(options.temperature)
        options = replace(options, eos_token_id=self.ends, tokenizer=self.tokenizer, **drafts)
        ticket = Ticket()
        ticket.future = self._worker.submit(self._run, ticket, speculator, prompt, options)
        self._open.append(ticket)
        return ticket

    def _run(
        self, ticket: Ticket, speculator: Speculator | None, prompt: Sequence[int], options: GenerationOptions
    ) -> None:
        """In the thread: generate, and report an error to the ticket."""
        text = TextStream(self.tokenizer, options.stop)
        try:
            with closing(GenerationStream(self.base, speculator, prompt, options)) as stream:
                ticket.generation = stream.generation
                for part in stream:
                    result = _stopped() if ticket.cancelled else text_round(text, part)
                    ticket.put(result)
                    if isinstance(result, ApiError) or result.finish:
                        return
        except UserError as error:
            ticket.put(ApiError(400, str(error)))
        except Exception:
            logger.exception("a generation failed")
            ticket.put(ApiError(500, "the generation failed; the server's log says why", kind="server_error"))


def _stopped() -> ApiError:
    return ApiError(503, "the generation was stopped", kind="server_error")
