"""`verl-speculator inspect`: what a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.interop.convert import AUTO, SOURCE_FORMATS, TOKEN_AFTER_NEXT, ConvertSettings
from verl_speculator.interop.engine_formats import FORMATS
from verl_speculator.rl.rollout_args import ENGINES, PURPOSES, rollout_arguments
from verl_speculator.utils.atomic_io import atomic_file, check_writable
from verl_speculator.utils.errors import UserError


def inspect(
    directory: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder for its latest step")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show what a checkpoint is: family, dims, parameters, base, data, step, versions, and which engine can serve it.
    Reads every weight."""
    from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights
    from verl_speculator.config.families import FAMILIES
    from verl_speculator.interop.engine_formats import serving_engines

    info = read_checkpoint_info(directory)
    weights = read_weights(info)
    facts: dict[str, Any] = {
        "directory": str(info.directory),
        "family": {"method": info.config.method, "is": FAMILIES[info.config.method].summary},
        "settings": {name: value for name, value in info.config.to_dict().items() if name != "method"},
        "parameters": {"count": sum(t.numel() for t in weights.values()), "dtype": info.dtype},
        "fits a base of": {"input_hidden_dim": info.hidden_size, "vocab_size": info.vocab_size},
        **info.provenance,
        "serving": {
            engine: "yes" if reason is None else f"no: {reason}" for engine, reason in serving_engines(info.config).items()
        },
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for section, value in facts.items():
        if not isinstance(value, dict):
            table.add_row(section, "", str(value))
            continue
        for i, (name, one) in enumerate(value.items()):
            text = f"{one:,}" if name == "count" else ", ".join(map(str, one)) if isinstance(one, list) else str(one)
            table.add_row("" if i else section, name, text)
    Console().print(table)


def convert(
    source: Annotated[Path, typer.Argument(help="directory of a Medusa checkpoint, or its .safetensors, .pt or .bin")],
    out: Annotated[Path, typer.Option(help="directory of the checkpoint")],
    format_: Annotated[str, typer.Option("--format", help=", ".join(SOURCE_FORMATS))] = AUTO,
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
    from verl_speculator.interop.convert import convert as run

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
    from verl_speculator.checkpoint.format import read_checkpoint_info
    from verl_speculator.interop.export import (
        CARD,
        check_export,
        check_repo,
        export_speculator,
        model_card,
        push,
        read_results,
    )

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
        from verl_speculator.base_model.loading import base_shape, read_config

        info.check_base(*base_shape(base))
        architectures = tuple(read_config(base).architectures or ())
    export_speculator(info, format_, out, dtype=dtype, card=card, base_architectures=architectures, overwrite=overwrite)
    typer.echo(f"{out}: {format_}, for {FORMATS[format_].engine}")
    if push_to_hub is not None:
        typer.echo(push(out, push_to_hub, private=private))


def rollout_args(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder for its latest step")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="your own overrides: held against these, and printed behind them")
    ] = None,
    engine: Annotated[str, typer.Option(help=", ".join(ENGINES))] = "vllm",
    purpose: Annotated[str, typer.Option("--for", help=", ".join(PURPOSES))] = "ppo",
    train: Annotated[
        bool, typer.Option("--train", help="have PPO's actor train the speculator, and the rollout take it over")
    ] = False,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="a checkpoint that training never changed")
    ] = False,
) -> None:
    """Print the Hydra overrides for verl's PPO trainer or generation server, one a line; notes on standard error."""
    from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info

    info = read_checkpoint_info(checkpoint)
    arguments = rollout_arguments(info, engine=engine, purpose=purpose, train=train, overrides=overrides or ())

    # Last, since it reads every weight: better here than in a worker of a cluster.
    if load_speculator(info.directory).is_untrained() and not allow_untrained:
        raise UserError(
            f"{info.directory}: no training step has changed its tensors; expected a trained checkpoint, or "
            "--allow-untrained"
        )
    for note in arguments.notes:
        typer.echo(f"note: {note}", err=True)
    for override in arguments.overrides:
        typer.echo(override)
