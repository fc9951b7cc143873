"""Settings of `verl-speculator serve`, and its socket. Importing it loads neither torch nor FastAPI."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_speculator.utils.errors import UserError

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
    """Address, names and limits of a server.

    Attributes:
        base: directory or hub name of the base model.
        served_name: the model's name in requests; empty for the directory's name, or the hub name.
        host: address to listen on.
        port: 0 takes a free one.
        max_request_bytes: of a request's body.
        max_prompt_tokens: None for the base model's position limit.
        max_new_tokens: of an answer; also the default of a request.
        max_waiting: requests that may wait while another is answered.

    Raises:
        UserError: for a value out of range.
    """

    base: str
    served_name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    max_request_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 1024
    max_waiting: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port}: expected 0 to 65535 (0 takes a free one)")
        for name in ("max_request_bytes", "max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected a number ≥ 1")
        if self.max_waiting < 0:
            raise UserError(f"max_waiting={self.max_waiting}: expected a number ≥ 0")

    @property
    def model(self) -> str:
        """The model's name in requests."""
        path = Path(self.base).expanduser()
        return self.served_name or (path.resolve().name if path.is_dir() else self.base)
