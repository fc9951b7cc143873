"""The API's requests and its errors. What would change the answer and is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from verl_speculator.decoding.sampling_policy import LEAST_TEMPERATURE

# Fields that OpenAI's API or vLLM's knows and this server does not, each with the values that ask for nothing. Other
# unknown fields do not change the text (user, metadata, store, …) and are ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0, 0.0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None,),
    "web_search_options": (None,),
}
MAX_STOPS = 4
SHOWN = 60


class ApiError(Exception):
    """An error as the API defines it.

    Args:
        status: of HTTP.
        message: one line that names the field, what came and what is accepted.
        param: the field.
        code: a word for programs.
        kind: the API's `type`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Message(BaseModel):
    """A turn. A list of text parts is one text; a developer's message is a system's."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("expected a text or a list of text parts")
            return "".join(texts)
        return value

    @property
    def turn(self) -> dict[str, str]:
        """For the chat template."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """What a stream should carry besides."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Request(BaseModel):
    """What both endpoints read. `None` stands for the API's default. `top_k` and `speculative` are this server's own;
    the latter leaves the speculator out if it is false."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: tuple[str, ...] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in NEUTRAL.keys() & data.keys():
                if not any(type(data[name]) is type(value) and data[name] == value for value in NEUTRAL[name]):
                    raise ApiError(
                        *(400, f"{name}={_shown(data[name])}: not supported by this server; leave it out"),
                        param=name,
                        code="unsupported_parameter",
                    )
        return data

    @field_validator("temperature")
    @classmethod
    def _greedy_or_soft(cls, value: float | None) -> float | None:
        if value and value < LEAST_TEMPERATURE:
            raise ValueError(f"expected 0, or {LEAST_TEMPERATURE} to 2")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> Any:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"expected a text that is not empty, or up to {MAX_STOPS} of them")
        return tuple(stops)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only allowed with stream=true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    default_limit: ClassVar[int | None] = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its number of tokens, None for the default."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions. The prompt is a text or its token ids; a list of one prompt is that prompt."""

    default_limit: ClassVar[int | None] = 16
    prompt: Annotated[str | list[int], Field(min_length=1)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
            value = value[0]
        ids = isinstance(value, list) and all(type(i) is int for i in value)
        if not value or not (ids or isinstance(value, str)):
            raise ValueError("expected one text or one list of token ids, not empty")
        return value

    @property
    def limit(self) -> tuple[str, int | None]:
        """As `ChatRequest.limit`."""
        return "max_tokens", self.max_tokens


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """A request from its body.

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
    # Numbers are places in a list; what stands behind a field of several types names the type that was tried.
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    came = "" if first["type"] == "missing" else f"={_shown(first['input'])}"
    raise ApiError(400, f"{param}{came}: {said}", param=param)


def _shown(value: Any) -> str:
    """A value in an error's one line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
