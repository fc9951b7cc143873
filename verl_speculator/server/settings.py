"""Settings of `verl-speculator serve`, and its socket. Importing it loads neither torch nor FastAPI."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_speculator.utils.errors import UserError

# Seconds that clients have to take their last bytes once the server is told to stop.
GRACE = 2


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, so that nobody else takes it while the model loads.

    Raises:
        UserError: for an address that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror}; expected an address of this machine") from None
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise UserError(f"host={host}, port={port}: {error.strerror}; expected a free one, such as --port 0") from None
    return taken


def listen(app: Any, taken: socket.socket, stop: Callable[[], None]) -> None:
    """Answer on a bound socket until a signal ends it. Ctrl-C is no error.

    Args:
        app: an ASGI application.
        taken: from `bind`.
        stop: ends the answers under way, so that nobody has to wait for them.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    with suppress(KeyboardInterrupt):  # uvicorn ends in order, and then raises the signal anew
        Server(config).run(sockets=[taken])


@dataclass(frozen=True)
class ServeSettings:
    """Limits and names of a server.

    Attributes:
        base: directory or hub name of the base.
        served_name: what requests call the model; empty for the last part of a directory, or the hub name.
        host: address to listen on.
        port: 0 takes a free one.
        max_request_bytes: of a request's body.
        max_prompt_tokens: None for what the base's positions hold.
        max_new_tokens: of an answer; also what a request gets that names no number.
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
        """The name that requests use."""
        path = Path(self.base).expanduser()
        return self.served_name or (path.resolve().name if path.is_dir() else self.base)
