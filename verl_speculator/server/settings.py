"""Settings of `verl-speculator serve`, and its socket. Importing it loads neither torch nor FastAPI."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from verl_speculator.decoding.options import DraftLengthOption
from verl_speculator.utils.settings import BaseModel, MaxNewTokens, Option, UserError, check_minimums

# Names the speculator where --speculator does not.
VARIABLE = "VERL_SPECULATOR_PATH"
# Seconds after which a stopping server closes its connections.
GRACE = 2


def bind(host: str, port: int) -> socket.socket:
    """A socket that reserves the address before the model loads.

    Raises:
        UserError: for an address that is unknown, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror}; expected an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"host={host}, port={port}: {error.strerror}; expected a free one, such as --port 0") from None
    return bound


def listen(app: Any, bound: socket.socket, stop: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal ends it. Ctrl-C is no error.

    Args:
        app: an ASGI application.
        bound: from `bind`.
        stop: called first at shutdown, to end running generations.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    with suppress(KeyboardInterrupt):  # uvicorn shuts down, then raises the signal again
        Server(config).run(sockets=[bound])


@dataclass(frozen=True)
class ServeSettings:
    """What a server loads, its names and its limits.

    Raises:
        UserError: for a value out of range.
    """

    base: BaseModel
    speculator: Annotated[str | None, Option(f"checkpoint or run [{VARIABLE}, or the base alone]")] = None
    host: Annotated[str, Option("address to listen on")] = "127.0.0.1"
    port: Annotated[int, Option("0 takes a free one")] = 8000
    served_name: Annotated[str, Option("the model's name in requests [the base's]")] = ""
    draft_length: DraftLengthOption = None
    draft_tree: Annotated[
        Path | None, Option("file of a tree to draft in greedy answers; others draft n_predict in a row")
    ] = None
    # Also what a request gets that names no number.
    max_new_tokens: MaxNewTokens = 1024
    max_prompt_tokens: Annotated[int | None, Option("of a request [the base's positions]", minimum=1)] = None
    max_request_bytes: Annotated[int, Option("of a request's body", minimum=1)] = 1 << 20
    max_waiting: Annotated[int, Option("requests that wait while another is answered", minimum=0)] = 16

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port}: expected 0 to 65535 (0 takes a free one)")
        check_minimums(self)

    @property
    def model(self) -> str:
        """The model's name in requests."""
        path = Path(self.base).expanduser()
        return self.served_name or (path.resolve().name if path.is_dir() else self.base)
