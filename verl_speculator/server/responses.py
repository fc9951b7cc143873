"""The API's answers, whole and in pieces. `speculation` is this server's own field, which other clients pass over."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_speculator.decoding import Generation
from verl_speculator.server.engine import Step

DONE = "data: [DONE]\n\n"


def event(content: Mapping[str, Any]) -> str:
    """One of server-sent events."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class Answer:
    """One answer under its id.

    Attributes:
        chat: of /v1/chat/completions; otherwise of /v1/completions.
        model: the served name.
        prompt_tokens: length of the prompt.
        include_usage: whether a stream ends with the counts.
    """

    chat: bool
    model: str
    prompt_tokens: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, steps: Sequence[Step], generation: Generation) -> dict[str, Any]:
        """The answer of a request without streaming."""
        text, finish = "".join(step.text for step in steps), steps[-1].finish
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._head("chat.completion", [said | _rest(finish)]) | {
            "usage": self.usage(generation),
            "speculation": summary(steps, generation),
        }

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a chat, which says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def chunk(self, step: Step) -> dict[str, Any]:
        """A round's text and what of it was drafted."""
        facts = {"tokens": step.tokens, "drafted": step.drafted, "accepted": step.accepted, "spans": step.spans}
        said = {"delta": {"content": step.text}} if self.chat else {"text": step.text}
        return self._chunk(said, None) | {"speculation": facts}

    def closing(self, steps: Sequence[Step], generation: Generation) -> list[dict[str, Any]]:
        """The last chunks: why the text ends, and the counts if they were asked for."""
        said = {"delta": {}} if self.chat else {"text": ""}
        last = self._chunk(said, steps[-1].finish) | {"speculation": summary(steps, generation)}
        if not self.include_usage:
            return [last]
        return [last, self._head("chat.completion.chunk", []) | {"usage": self.usage(generation)}]

    def usage(self, generation: Generation) -> dict[str, int]:
        """Tokens of prompt and answer, the end token included."""
        count = len(generation.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": self.prompt_tokens + count,
        }

    def _chunk(self, said: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        chunk = self._head("chat.completion.chunk", [dict(said) | _rest(finish)])
        return chunk | {"usage": None} if self.include_usage else chunk

    def _head(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


def _rest(finish: str | None) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": finish}


def summary(steps: Sequence[Step], generation: Generation) -> dict[str, Any]:
    """What a whole answer took. τ is None where nothing was drafted, or too little to say."""
    drafts = generation.draft_length > 0 and generation.accepted is not None
    seconds = generation.seconds.prefill + generation.seconds.decode
    return {
        "drafted": sum(step.drafted for step in steps),
        "accepted": sum(step.accepted for step in steps),
        "tokens_per_pass": generation.accepted + 1 if drafts else None,
        "tokens_per_second": len(generation.tokens) / seconds,
    }
