"""The endpoints: OpenAI's chat completions, completions and models, and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from verl_speculator.decoding import GenerationOptions
from verl_speculator.server.engine import Engine, Ticket
from verl_speculator.server.protocol import Answer, ApiError, ChatRequest, CompletionRequest, event, parse
from verl_speculator.server.settings import ServeSettings

# A body over the limit is read and dropped up to this many times the limit: a client that is still sending does not
# see the answer.
DROPPED = 16
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The application. Its shutdown closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.stop()
        await run_in_threadpool(engine.close)

    # No documentation pages: FastAPI's load scripts from other hosts.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page = files("verl_speculator.server").joinpath("page.html").read_text(encoding="utf-8")
    model = {
        "id": settings.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "verl_speculator",
        "speculator": None if engine.speculator is None else engine.speculator.method,
    }

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "the server failed; its log says why", kind="server_error").body, 500)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        _check_model(name, settings)
        return JSONResponse(model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        fields = parse(ChatRequest, await _body(request, settings.max_request_bytes))
        _check_model(fields.model, settings)
        prompt = await run_in_threadpool(engine.tokenize_chat, [message.turn for message in fields.messages])
        return await _answer(request, fields, prompt, engine, settings)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        fields = parse(CompletionRequest, await _body(request, settings.max_request_bytes))
        _check_model(fields.model, settings)
        prompt = fields.prompt
        if isinstance(prompt, str):
            prompt = await run_in_threadpool(engine.tokenize_text, prompt)
        elif not all(0 <= token < engine.vocabulary for token in prompt):
            raise ApiError(400, f"prompt: expected token ids from 0 to {engine.vocabulary - 1}", "prompt")
        return await _answer(request, fields, prompt, engine, settings)

    return app


async def _body(request: Request, limit: int) -> bytes:
    """A request's body.

    Raises:
        ApiError: if it is larger than the limit.
    """
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            body += part
        elif size > DROPPED * limit:
            break
    if size > limit:
        message = f"the body has more than {limit} bytes, this server's limit (--max-request-bytes)"
        raise ApiError(413, message, code="request_too_large")
    return bytes(body)


def _check_model(name: str, settings: ServeSettings) -> None:
    if name != settings.model:
        message = f"model={name[:100]!r}: not served here; expected {settings.model!r}"
        raise ApiError(404, message, "model", "model_not_found")


def _max_new_tokens(
    fields: ChatRequest | CompletionRequest, prompt: list[int], engine: Engine, settings: ServeSettings
) -> int:
    """The most tokens of the answer.

    Raises:
        ApiError: for a prompt that is empty or too long, or more tokens than the server or the model allows.
    """
    param = "messages" if isinstance(fields, ChatRequest) else "prompt"
    if not prompt:
        raise ApiError(400, f"{param}: no tokens; expected a text that is not empty", param)
    field, count = fields.limit
    if count is not None and count > settings.max_new_tokens:
        raise ApiError(400, f"{field}={count}: expected 1 to {settings.max_new_tokens} (--max-new-tokens)", field)
    too_long = None
    total = len(prompt) + (count or 1)
    if settings.max_prompt_tokens is not None and len(prompt) > settings.max_prompt_tokens:
        too_long = f"this server takes {settings.max_prompt_tokens} (--max-prompt-tokens)"
    elif engine.positions is not None and total > engine.positions:
        reserved = f"with {field}={count}" if count else "with one for the answer"
        too_long = f"{reserved} these are {total}, the model's context length is {engine.positions}"
    if too_long:
        raise ApiError(400, f"{param}: {len(prompt)} tokens; {too_long}", param, "context_length_exceeded")
    if count is not None:
        return count
    left = settings.max_new_tokens if engine.positions is None else engine.positions - len(prompt)
    return min(fields.default_limit or left, settings.max_new_tokens, left)


async def _answer(
    request: Request,
    fields: ChatRequest | CompletionRequest,
    prompt: list[int],
    engine: Engine,
    settings: ServeSettings,
) -> Response:
    """Generate, as one object or as a stream."""
    options = GenerationOptions(
        max_new_tokens=_max_new_tokens(fields, prompt, engine, settings),
        **fields.model_dump(include={"temperature", "top_p", "top_k", "seed", "stop"}),
    )
    include_usage = bool(fields.stream_options.include_usage)
    answer = Answer(isinstance(fields, ChatRequest), settings.model, len(prompt), include_usage)
    ticket = engine.submit(prompt, options, speculative=fields.speculative)
    if fields.stream:
        return EventStream(answer, ticket)
    watch = asyncio.create_task(_cancel_on_disconnect(request, ticket))
    try:
        rounds = [part async for part in ticket]
    finally:
        watch.cancel()
        ticket.cancel()
    return JSONResponse(answer.complete(rounds, ticket.generation))


async def _cancel_on_disconnect(request: Request, ticket: Ticket) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, also by a disconnect, the generation ends too."""

    def __init__(self, answer: Answer, ticket: Ticket) -> None:
        super().__init__(_events(answer, ticket), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


async def _events(answer: Answer, ticket: Ticket) -> AsyncIterator[str]:
    for chunk in answer.opening():
        yield event(chunk)
    try:
        async for part in ticket:
            yield event(answer.chunk(part))
    except ApiError as error:
        # The status has been sent already; the official client raises the error of an event.
        yield event(error.body)
        return
    for chunk in answer.closing(part.finish, ticket.generation):
        yield event(chunk)
    yield "data: [DONE]\n\n"
