"""The endpoints: OpenAI's chat completions, completions and models, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from verl_speculator.server.engine import Engine, Job, Step, Ticket
from verl_speculator.server.protocol import ApiError, ChatRequest, CompletionRequest, parse
from verl_speculator.server.responses import DONE, Answer, event
from verl_speculator.server.settings import ServeSettings

# A body over the limit is read on and dropped, up to this many times the limit: a client that is still sending does
# not see the answer.
DROPPED = 16
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The application. Its end closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.stop()
        await run_in_threadpool(engine.close)

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page = files("verl_speculator.server").joinpath("page.html").read_text(encoding="utf-8")
    model = {
        "id": settings.model,
        "object": "model",
        "created": Answer(True, settings.model, 0).created,
        "owned_by": "verl_speculator",
        "speculator": None if engine.speculator is None else engine.speculator.method,
    }

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> JSONResponse:
        said = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(said.body, said.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        said = ApiError(500, "the server failed; its log says why", kind="server_error")
        return JSONResponse(said.body, said.status)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        _check_model(name, settings)
        return JSONResponse(model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request, settings.max_request_bytes))
        _check_model(asked.model, settings)
        prompt = await run_in_threadpool(engine.tokenize_chat, [message.turn for message in asked.messages])
        return await _answer(request, asked, prompt, engine, settings)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request, settings.max_request_bytes))
        _check_model(asked.model, settings)
        prompt = asked.prompt
        if isinstance(prompt, str):
            prompt = await run_in_threadpool(engine.tokenize_text, prompt)
        elif not all(0 <= token < engine.vocabulary for token in prompt):
            raise ApiError(400, f"prompt: expected token ids from 0 to {engine.vocabulary - 1}", param="prompt")
        return await _answer(request, asked, prompt, engine, settings)

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
        raise ApiError(
            *(413, f"the body has more than {limit} bytes, this server's limit (--max-request-bytes)"),
            code="request_too_large",
        )
    return bytes(body)


def _check_model(name: str, settings: ServeSettings) -> None:
    if name != settings.model:
        raise ApiError(
            *(404, f"model={name[:100]!r}: not served here; expected {settings.model!r}"),
            param="model",
            code="model_not_found",
        )


def _room(asked: ChatRequest | CompletionRequest, prompt: list[int], engine: Engine, settings: ServeSettings) -> int:
    """Tokens that the answer may have.

    Raises:
        ApiError: for a prompt that is empty or too long, or more tokens than fit.
    """
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if not prompt:
        raise ApiError(400, f"{param}: no tokens; expected a text that is not empty", param=param)
    field, count = asked.limit
    if count is not None and count > settings.max_new_tokens:
        raise ApiError(400, f"{field}={count}: expected 1 to {settings.max_new_tokens} (--max-new-tokens)", param=field)
    too_long = None
    if settings.max_prompt_tokens is not None and len(prompt) > settings.max_prompt_tokens:
        too_long = f"this server takes {settings.max_prompt_tokens} (--max-prompt-tokens)"
    elif engine.positions is not None and len(prompt) + (count or 1) > engine.positions:
        wanted = f"with {field}={count}" if count else "with one for the answer"
        too_long = f"{wanted} these are {len(prompt) + (count or 1)}, the model's context length is {engine.positions}"
    if too_long:
        raise ApiError(
            *(400, f"{param}: {len(prompt)} tokens; {too_long}"), param=param, code="context_length_exceeded"
        )
    if count is not None:
        return count
    left = settings.max_new_tokens if engine.positions is None else engine.positions - len(prompt)
    return min(asked.default_limit or left, settings.max_new_tokens, left)


async def _answer(
    request: Request, asked: ChatRequest | CompletionRequest, prompt: list[int], engine: Engine, settings: ServeSettings
) -> Response:
    """Generate, whole or as a stream."""
    job = Job(
        prompt=prompt,
        max_new_tokens=_room(asked, prompt, engine, settings),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        stop=asked.stop,
        speculative=asked.speculative is not False,
    )
    answer = Answer(isinstance(asked, ChatRequest), settings.model, len(prompt), asked.include_usage)
    ticket = engine.submit(job)
    if asked.stream:
        return EventStream(answer, ticket)
    watch = asyncio.create_task(_cancel_when_gone(request, ticket))
    try:
        steps = [step async for step in ticket]
    finally:
        watch.cancel()
        ticket.cancel()
    return JSONResponse(answer.whole(steps, ticket.generation))


async def _cancel_when_gone(request: Request, ticket: Ticket) -> None:
    """Wait for the client to hang up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events. Whatever ends it, a client that hangs up too, ends the generation."""

    def __init__(self, answer: Answer, ticket: Ticket) -> None:
        super().__init__(_events(answer, ticket), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


async def _events(answer: Answer, ticket: Ticket) -> AsyncIterator[str]:
    opening = answer.opening()
    if opening is not None:
        yield event(opening)
    steps: list[Step] = []
    try:
        async for step in ticket:
            steps.append(step)
            yield event(answer.chunk(step))
    except ApiError as error:
        # The status has been sent: what is left is an event, which the official client raises.
        yield event(error.body)
        return
    for chunk in answer.closing(steps, ticket.generation):
        yield event(chunk)
    yield DONE
