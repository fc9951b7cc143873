"""`verl-speculator export`: a checkpoint in the format of a serving engine, and onto the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_speculator.files import atomic_file, check_writable
from verl_speculator.rollout.contracts import FORMATS


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder for its latest step")],
    format_: Annotated[str, typer.Option("--format", help=", ".join(FORMATS))],
    out: Annotated[Path, typer.Option(help="directory to write")],
    dtype: Annotated[str, typer.Option(help="of the tensors: auto (as they are), fp32, bf16, fp16")] = "auto",
    base: Annotated[str | None, typer.Option(help="base model, if the checkpoint does not say which")] = None,
    results: Annotated[Path | None, typer.Option(help="results.csv of an evaluation, for the model card")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="owner/name of a repository to upload to")] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository a private one")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write the model card alone; upload nothing")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the directory")] = False,
) -> None:
    """Write a speculator as vLLM or ArcticInference loads it, every tensor held against what the engine demands."""
    from verl_speculator.checkpoint import read_checkpoint_info
    from verl_speculator.rollout.card import model_card, read_results
    from verl_speculator.rollout.export import CARD, check_export, export_speculator
    from verl_speculator.rollout.hub import check_repo, push

    info = read_checkpoint_info(checkpoint)
    check_export(info, format_, out, dtype, overwrite or dry_run)
    check_writable(f"--out {out}", out)
    if push_to_hub is not None:
        check_repo(push_to_hub)
    card = model_card(info, format_, read_results(results) if results is not None else ())
    if dry_run:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / CARD) as path:
            path.write_text(card)
        typer.echo(f"{out / CARD}: the card alone; nothing was exported or uploaded")
        return
    architectures: tuple[str, ...] = ()
    if base is not None:
        from verl_speculator.bases import base_architectures, base_shape

        info.check_base(*base_shape(base))
        architectures = base_architectures(base)
    export_speculator(info, format_, out, dtype=dtype, card=card, base_architectures=architectures, overwrite=overwrite)
    typer.echo(f"{out}: {format_}, for {FORMATS[format_].engine}")
    if push_to_hub is not None:
        typer.echo(push(out, push_to_hub, private=private))
