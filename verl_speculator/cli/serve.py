"""`verl-speculator serve`: an OpenAI-compatible server and a page to chat in, for trying and showing."""

from __future__ import annotations

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from verl_speculator.cli.options import (
    GGUF_HELP,
    QUANTIZATION_HELP,
    check_form,
    check_speculator,
    load,
    read_drafts,
)
from verl_speculator.server.settings import ServeSettings, bind, listen
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import restart_with_allocator

VARIABLE = "VERL_SPECULATOR_PATH"


def serve(
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    speculator: Annotated[str | None, typer.Option(help=f"checkpoint or run [{VARIABLE}, or the base alone]")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    served_name: Annotated[str, typer.Option(help="the model's name in requests [the base's]")] = "",
    draft_length: Annotated[
        str | None, typer.Option(help="drafts per round, at most n_predict, or auto [n_predict]")
    ] = None,
    draft_tree: Annotated[
        Path | None, typer.Option(help="file of a tree to draft in greedy answers; others draft n_predict in a row")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 1024,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="of a request [the base's positions]")] = None,
    max_request_bytes: Annotated[int, typer.Option(help="of a request's body")] = 1 << 20,
    max_waiting: Annotated[int, typer.Option(help="requests that wait while another is answered")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    quantization: Annotated[str | None, typer.Option(help=QUANTIZATION_HELP)] = None,
    gguf_file: Annotated[str | None, typer.Option(help=GGUF_HELP)] = None,
    allow_other_base: Annotated[bool, typer.Option(help="a base with other weights than at training")] = False,
) -> None:
    """Serve OpenAI's chat completions and completions, and a page that shows what was drafted. Not for production."""
    restart_with_allocator()
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve: needs {' and '.join(missing)}; expected: pip install {' '.join(missing)}")
    settings = ServeSettings(
        base=base,
        served_name=served_name,
        host=host,
        port=port,
        max_request_bytes=max_request_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_waiting=max_waiting,
    )
    length, tree = read_drafts(draft_length, draft_tree)
    form = check_form(base, quantization, gguf_file)
    found = _find_speculator(speculator)
    for name, value in (("draft_length", draft_length), ("draft_tree", draft_tree)):
        if value is not None and found is None:
            raise UserError(f"{name}={value}: there is no speculator to draft with; expected --speculator")
    if found is not None:
        check_speculator(found, base, length, allow_other_base, tree, form)
    with bind(host, port) as taken:
        address, number = taken.getsockname()[:2]
        loaded = load(base, found, device=device, dtype=dtype, form=form)

        from verl_speculator.server.app import create_app
        from verl_speculator.server.engine import Engine

        engine = Engine(
            loaded.base,
            loaded.tokenizer,
            loaded.speculator,
            ends=loaded.ends,
            draft_length=length,
            draft_tree=tree,
            max_waiting=max_waiting,
        )
        engine.warm_up()
        if not ipaddress.ip_address(address).is_loopback:
            typer.echo(f"warning: host={host}: whoever reaches this machine can use it; there are no keys", err=True)
        # From here on a connection waits instead of being refused.
        taken.listen()
        at = f"http://{f'[{address}]' if ':' in address else address}:{number}"
        typer.echo(f"serving {settings.model}: page {at}, API {at}/v1 (Ctrl-C ends it)", err=True)
        listen(create_app(engine, settings), taken, engine.stop)


def _find_speculator(given: str | None) -> str | None:
    """The checkpoint to serve with, said in a line where there is none.

    Raises:
        UserError: if the option names none; the variable may.
    """
    from verl_speculator.checkpoint.format import resolve_checkpoint

    if given is not None:
        return str(resolve_checkpoint(given))
    named = os.environ.get(VARIABLE)
    if not named:
        typer.echo(f"no speculator (--speculator, {VARIABLE}): the base alone", err=True)
        return None
    try:
        return str(resolve_checkpoint(named))
    except UserError as error:
        typer.echo(f"warning: {VARIABLE}: {error}: the base alone", err=True)
        return None
