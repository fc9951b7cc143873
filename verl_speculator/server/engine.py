"""One model and the line before it: requests are answered one after another, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from verl_speculator.base_model.chat_template import tokenize_prompt
from verl_speculator.base_model.loading import base_shape
from verl_speculator.decoding import DraftTree, Generation, Round, speculative_generate, speculative_stream
from verl_speculator.decoding.draft_length import DraftLength
from verl_speculator.decoding.target import position_limit
from verl_speculator.models import Speculator
from verl_speculator.server.protocol import ApiError
from verl_speculator.utils.errors import UserError

logger = logging.getLogger(__name__)


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a text token by token.

    What `put` and `end` give, joined, is the text of all tokens without special ones, cut before the first stop
    string. The tail that may still become another character or a stop string is held back.

    Args:
        tokenizer: of the base.
        stops: texts that end it and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.stopped = False
        self._held = ""
        # Tokens from `_from` up to `_read` are in the text already; they are decoded again as the context of the next,
        # since a tokenizer may write a token otherwise at the beginning of a text.
        self._from = self._read = 0

    def put(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(token)
        return self._release(self._decoded(last=False), last=False)

    def end(self) -> str:
        """The rest."""
        return self._release(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        """New whole characters."""
        known = self._decode(self.tokens[self._from : self._read])
        text = self._decode(self.tokens[self._from :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._from, self._read = self._read, len(self.tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str, *, last: bool) -> str:
        """Of the held text and the new one, what no stop string can begin in."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Job:
    """What is to be generated: the settings of `speculative_stream`.

    Attributes:
        prompt: token ids.
        speculative: False leaves the speculator out.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    speculative: bool


@dataclass(frozen=True)
class Step:
    """A round as text.

    Attributes:
        spans: pieces of text in their order, each with whether it is of accepted drafts. What had to be held back
            belongs to the token that settled it.
        tokens: number of tokens.
        drafted: number of drafts.
        accepted: how many the base accepted.
        finish: "stop", "length" or None.
    """

    spans: tuple[tuple[str, bool], ...]
    tokens: int
    drafted: int
    accepted: int
    finish: str | None

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(text for text, _ in self.spans)


class Ticket:
    """A request in the line: iterate for its steps; `cancel` if nobody wants them any more.

    Attributes:
        generation: what there is so far; None while it waits.
    """

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | ApiError] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether the generation should stop before its next round."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Leave the line, or stop after the round under way."""
        self._cancelled.set()
        if self.future is not None and self.future.cancel():
            self._steps.put_nowait(_stopped())

    def put(self, step: Step | ApiError) -> None:
        """From the worker's thread: the next step, or why there is none."""
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            step = await self._steps.get()
            if isinstance(step, ApiError):
                raise step
            yield step
            if step.finish:
                return


class Engine:
    """A base, a speculator or none, and one thread that generates.

    Args:
        base: a Hugging Face causal language model in evaluation mode.
        tokenizer: the base's, with a chat template.
        speculator: None for the base alone.
        ends: tokens that end an answer.
        draft_length: drafts per round, or auto; None for the speculator's n_predict.
        draft_tree: what greedy answers draft instead. Sampled ones draft a chain: a tree is verified greedily.
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
        """Generate a few tokens: the first call of anything is slow, and no request should pay for it."""
        settings = {"max_new_tokens": 8, "eos_token_id": ()} | self._drafts(0)
        self._worker.submit(speculative_generate, self.base, self.speculator, [0], **settings).result()

    def _drafts(self, temperature: float) -> dict[str, Any]:
        """How drafts are made, as settings of a generation."""
        if self.draft_tree is not None and temperature == 0:
            return {"draft_tree": self.draft_tree}
        return {"draft_length": self.draft_length}

    def stop(self) -> None:
        """Cancel all tickets."""
        for ticket in self._open:
            ticket.cancel()

    def close(self) -> None:
        """Wait for the end of the thread; what has not begun never will."""
        self._worker.shutdown(cancel_futures=True)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue.

        Raises:
            ApiError: if the chat template refuses it.
        """
        try:
            return tokenize_prompt(self.tokenizer, messages)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def tokenize_text(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued as it stands."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def submit(self, job: Job) -> Ticket:
        """Join the line.

        Raises:
            ApiError: if the line is full.
        """
        self._open = [ticket for ticket in self._open if not ticket.future.done()]
        waiting = len(self._open) - 1
        if waiting >= self.max_waiting:
            raise ApiError(
                *(429, f"one request is being answered and {waiting} wait, as many as may (--max-waiting); try later"),
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            )
        ticket = Ticket()
        ticket.future = self._worker.submit(self._run, job, ticket)
        self._open.append(ticket)
        return ticket

    def _run(self, job: Job, ticket: Ticket) -> None:
        """In the thread: generate, a step for each round."""
        try:
            self._generate(job, ticket)
        except UserError as error:
            ticket.put(ApiError(400, str(error)))
        except Exception:
            logger.exception("a generation failed")
            ticket.put(ApiError(500, "the generation failed; the server's log says why", kind="server_error"))

    def _generate(self, job: Job, ticket: Ticket) -> None:
        text = TextStream(self.tokenizer, job.stop)
        draft = self.speculator if job.speculative else None
        stream = speculative_stream(
            self.base,
            draft,
            job.prompt,
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k,
            seed=job.seed,
            eos_token_id=self.ends,
            stop=job.stop,
            tokenizer=self.tokenizer,
            **({} if draft is None else self._drafts(job.temperature)),
        )
        ticket.generation = stream.generation
        try:
            for one in stream:
                if ticket.cancelled:
                    ticket.put(_stopped())
                    return
                step = _step(text, one)
                ticket.put(step)
                if step.finish:
                    return
        finally:
            stream.close()


def _step(text: TextStream, one: Round) -> Step:
    """A round's tokens as text."""
    pieces = [[text.put(token), i < one.accepted] for i, token in enumerate(one.tokens)]
    # The rule that ends generations reads special tokens too; the text may hold a stop string that only shows without.
    finish = "stop" if text.stopped else one.finish
    if finish:
        pieces[-1][0] += text.end()
    spans: list[list[Any]] = []
    for piece, accepted in pieces:
        if spans and spans[-1][1] == accepted:
            spans[-1][0] += piece
        elif piece:
            spans.append([piece, accepted])
    return Step(tuple((t, a) for t, a in spans), len(one.tokens), one.drafted, one.accepted, finish)


def _stopped() -> ApiError:
    return ApiError(503, "the generation was stopped", kind="server_error")
