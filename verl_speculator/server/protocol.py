"""The API's requests, answers and errors: OpenAI's, with one field of our own, `speculation`.

Requests for features that would change the answer and are not supported are refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from verl_speculator.decoding import Generation, Round
from verl_speculator.decoding.options import LEAST_TEMPERATURE

# Fields of OpenAI's or vLLM's API that are not supported, with the values that, like null, request nothing. Other
# unknown fields (user, metadata, store, …) do not change the text and are ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "prediction", "top_logprobs", "web_search_options"), ()),
    **dict.fromkeys(("frequency_penalty", "min_p", "presence_penalty"), (0, 0.0)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **dict.fromkeys(("functions", "tools"), ([],)),
    **dict.fromkeys(("echo", "logprobs"), (False,)),
    **dict.fromkeys(("best_of", "n"), (1,)),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
MAX_STOPS = 4
# Longest value that an error message quotes.
MAX_SHOWN = 60


@dataclass(eq=False)
class ApiError(Exception):
    """An error as the API defines it.

    Attributes:
        status: HTTP status.
        message: one line with the field, the value received and the values accepted.
        param: the field.
        code: identifier of the error for programs.
        kind: the API's `type`.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Message(BaseModel):
    """A turn. Text parts are joined to one text; the role `developer` is `system`."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("expected a text or a list of text parts")
            return "".join(texts)
        return value

    @property
    def turn(self) -> dict[str, str]:
        """As the chat template reads it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """Options of a stream: whether it ends with the token counts."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Request(BaseModel):
    """Fields of both endpoints; null is the API's default. `top_k` and `speculative` are our own: false generates
    without the speculator."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    default_limit: ClassVar[int | None] = None
    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    speculative: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        data = {name: value for name, value in data.items() if value is not None or name in needed}
        for name in NEUTRAL.keys() & data.keys():
            if not any(type(data[name]) is type(value) and data[name] == value for value in NEUTRAL[name]):
                message = f"{name}={_shown(data[name])}: not supported by this server; leave it out"
                raise ApiError(400, message, name, "unsupported_parameter")
        return data

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if value and value < LEAST_TEMPERATURE:
            raise ValueError(f"expected 0, or {LEAST_TEMPERATURE} to 2")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"expected a text that is not empty, or up to {MAX_STOPS} of them")
        return tuple(stops)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options: only allowed with stream=true", "stream_options")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens and its value, None for the default."""
        count = getattr(self, "max_completion_tokens", None)
        return ("max_tokens", self.max_tokens) if count is None else ("max_completion_tokens", count)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


class CompletionRequest(Request):
    """POST /v1/completions. The prompt is a text, its token ids, or a list of one of these."""

    default_limit: ClassVar[int | None] = 16
    prompt: Annotated[str | list[int], Field(min_length=1)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _single_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
            value = value[0]
        is_tokens = isinstance(value, list) and all(type(token) is int for token in value)
        if not value or not (is_tokens or isinstance(value, str)):
            raise ValueError("expected one text or one list of token ids, not empty")
        return value


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """Parse a request's body.

    Raises:
        ApiError: naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if not first["loc"]:
        raise ApiError(400, "the body: expected a JSON object")
    # A number is an index of a list. The last part of a union's location names the type that was tried.
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    expected = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    value = "" if first["type"] == "missing" else f"={_shown(first['input'])}"
    raise ApiError(400, f"{param}{value}: {expected}", param)


def _shown(value: Any) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


@dataclass(frozen=True)
class TextRound:
    """A round as text.

    Attributes:
        spans: pieces of text in order, each with whether it consists of accepted drafts. Text that was held back
            belongs to the token that completed it.
        source: the round. Its `finish` is "stop" too where the text, which lacks special tokens, holds a stop string.
    """

    spans: Sequence[tuple[str, bool]]
    source: Round

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(text for text, _ in self.spans)

    @property
    def finish(self) -> str | None:
        """Why the text ends with this round: "stop", "length" or None."""
        return self.source.finish


def event(content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class Answer:
    """Builds the JSON objects of one answer.

    Attributes:
        chat: whether of /v1/chat/completions; otherwise of /v1/completions.
        model: the served name.
        prompt_tokens: length of the prompt.
        include_usage: whether a stream ends with the token counts.
    """

    chat: bool
    model: str
    prompt_tokens: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def complete(self, rounds: Sequence[TextRound], generation: Generation) -> dict[str, Any]:
        """The answer of a request without streaming."""
        text = "".join(r.text for r in rounds)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        answer = self._object("chat.completion", content, rounds[-1].finish)
        return answer | self._usage(generation) | {"speculation": speculation(generation)}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk of a chat's stream, with the role."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def chunk(self, part: TextRound) -> dict[str, Any]:
        """The chunk of a round: its text, and which of it was drafted."""
        source = part.source
        counts = {"tokens": len(source.tokens), "drafted": source.drafted, "accepted": source.accepted}
        content = {"delta": {"content": part.text}} if self.chat else {"text": part.text}
        return self._chunk(content) | {"speculation": counts | {"spans": part.spans}}

    def closing(self, finish: str, generation: Generation) -> list[dict[str, Any]]:
        """The last chunks: why the text ends, and the token counts if they were requested."""
        content = {"delta": {}} if self.chat else {"text": ""}
        last = self._chunk(content, finish) | {"speculation": speculation(generation)}
        usage = self._object("chat.completion.chunk") | self._usage(generation)
        return [last, usage] if self.include_usage else [last]

    def _usage(self, generation: Generation) -> dict[str, Any]:
        """Tokens of prompt and answer, the end token included."""
        prompt, count = self.prompt_tokens, len(generation.tokens)
        return {"usage": {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}}

    def _chunk(self, content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk", content, finish)
        return chunk | {"usage": None} if self.include_usage else chunk

    def _object(self, kind: str, content: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
        """An object of the API with one choice, or with none."""
        choice = {"index": 0, "logprobs": None, "finish_reason": finish}
        return {
            "id": f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [] if content is None else [content | choice],
        }


def speculation(generation: Generation) -> dict[str, Any]:
    """Counts and rates of a complete answer. τ is None without drafts, or without a counted round."""
    has_drafts = generation.draft_length > 0 and generation.accepted is not None
    seconds = generation.seconds.prefill + generation.seconds.decode
    return {
        "drafted": sum(r.drafted for r in generation.rounds),
        "accepted": sum(r.accepted for r in generation.rounds),
        "tokens_per_pass": generation.accepted + 1 if has_drafts else None,
        "tokens_per_second": len(generation.tokens) / seconds,
    }
