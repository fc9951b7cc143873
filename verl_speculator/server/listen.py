"""The address: taken before a model loads, served once it has."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from verl_speculator.errors import UserError

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
