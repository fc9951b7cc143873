"""`verl-speculator convert`: Medusa heads from elsewhere as a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_speculator.convert.keymaps import AUTO, FORMATS
from verl_speculator.convert.settings import TOKEN_AFTER_NEXT, ConvertSettings


def convert(
    source: Annotated[Path, typer.Argument(help="directory of a Medusa checkpoint, or its .safetensors, .pt or .bin")],
    out: Annotated[Path, typer.Option(help="directory of the checkpoint")],
    format_: Annotated[str, typer.Option("--format", help=", ".join(FORMATS))] = AUTO,
    base: Annotated[
        str | None, typer.Option(help="the base, a directory or a hub name: checks, and what is missing")
    ] = None,
    n_predict: Annotated[int | None, typer.Option(help="heads in the file, where its config.json is wrong")] = None,
    first_offset: Annotated[
        int, typer.Option(help="the first head predicts the token so many positions on: 2, or 1 (it is dropped then)")
    ] = TOKEN_AFTER_NEXT,
    hidden_state: Annotated[
        str | None, typer.Option(help="the base's state that the heads read: post_norm or pre_norm [config.json's]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, fp64 [the file's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint that is there")] = False,
) -> None:
    """Take over Medusa heads that FasterDecoding's trainer or vLLM's format holds, checked tensor by tensor."""
    from verl_speculator.convert.run import convert as run

    settings = ConvertSettings(
        source=source,
        out=out,
        format=format_,
        base=base,
        n_predict=n_predict,
        first_offset=first_offset,
        hidden_state=hidden_state,
        dtype=dtype,
        overwrite=overwrite,
    )
    typer.echo(run(settings).summary())
