"""What `verl-speculator serve` is told, validated once. Importing it loads neither torch nor FastAPI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verl_speculator.errors import UserError


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
