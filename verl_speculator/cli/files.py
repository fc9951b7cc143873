"""Commands that write data and checkpoints: prepare, regenerate, inspect, convert, export, rollout-args."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.data.prepare import PrepareSettings
from verl_speculator.data.regenerate import RegenerateSettings
from verl_speculator.interop.convert import ConvertSettings
from verl_speculator.interop.engine_formats import FORMATS
from verl_speculator.rl.rollout_args import ENGINES, PURPOSES, rollout_arguments
from verl_speculator.utils.atomic_io import atomic_file, check_writable
from verl_speculator.utils.process import restart_with_allocator
from verl_speculator.utils.settings import Option, UserError

Checkpoint = Annotated[Path, Option("a checkpoint, or a run's folder for its latest step", positional=True)]


def prepare(settings: PrepareSettings) -> None:
    """Turn ShareGPT, UltraChat, OpenAssistant, Alpaca and other data, or plain text, into what training reads."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from verl_speculator.data.prepare import prepare as run

    report = run(settings)
    counts = report["counts"]
    rows = [(f"{source['name']} ({source['format'] or 'not read'})", source["read"]) for source in report["inputs"]]
    rows += [(f"  dropped: {reason}", count) for reason, count in counts["dropped"].items()]
    rows += [(f"  {change}", count) for change, count in counts["changed"].items()]
    rows += [(str(settings.out / f"{name}.parquet"), counts[name]) for name in ("train", "val") if counts[name]]
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("rows", justify="right")
    for name, count in rows:
        table.add_row(escape(name), f"{count:,}")
    Console().print(table)


def regenerate(settings: RegenerateSettings) -> None:
    """Answer the prompts of a parquet with the base: the same columns, ready for training."""
    from verl_speculator.data.regenerate import regenerate as run

    restart_with_allocator()
    first, *others = run(settings).summary()
    for line in (f"{settings.out}: {first}", *others):
        typer.echo(line)


def inspect(directory: Checkpoint, as_json: Annotated[bool, Option("for programs", flag="--json")] = False) -> None:
    """Show what a checkpoint is: family, dims, parameters, base, data, step, versions, and which engine can serve it.
    Reads every weight."""
    from verl_speculator.checkpoint.format import DRAFT_TOKENS, read_checkpoint_info, read_weights
    from verl_speculator.config.families import FAMILIES
    from verl_speculator.interop.engine_formats import serving_engines

    info = read_checkpoint_info(directory)
    weights = read_weights(info)
    weights.pop(DRAFT_TOKENS, None)
    sections: dict[str, Any] = {
        "directory": str(info.directory),
        "family": {"method": info.config.method, "is": FAMILIES[info.config.method].summary},
        "settings": {name: value for name, value in info.config.to_dict().items() if name != "method"},
        "parameters": {"count": sum(t.numel() for t in weights.values()), "dtype": info.dtype},
        "fits a base of": {"input_hidden_dim": info.hidden_size, "vocab_size": info.vocab_size},
        **info.provenance,
        "serving": {
            engine: "yes" if reason is None else f"no: {reason}"
            for engine, reason in serving_engines(info.config).items()
        },
    }
    if as_json:
        typer.echo(json.dumps(sections, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for section, values in sections.items():
        for i, (name, value) in enumerate(values.items() if isinstance(values, dict) else [("", values)]):
            text = f"{value:,}" if name == "count" else ", ".join(map(str, value)) if isinstance(value, list) else value
            table.add_row("" if i else section, name, str(text))
    Console().print(table)


def convert(settings: ConvertSettings) -> None:
    """Take over Medusa heads (FasterDecoding's format, vLLM's) or an EAGLE-3 draft (SafeAILab's format, speculators'),
    checked tensor by tensor."""
    from verl_speculator.interop.convert import convert as run

    typer.echo(run(settings).summary())


def export(
    checkpoint: Checkpoint,
    format: Annotated[str, Option(", ".join(FORMATS))],
    out: Annotated[Path, Option("directory to write")],
    dtype: Annotated[str, Option("of the tensors: auto (as they are), fp32, bf16, fp16")] = "auto",
    base: Annotated[
        str | None, Option("base model, if the checkpoint does not say which, or uses its embedding or LM head")
    ] = None,
    results: Annotated[Path | None, Option("results.csv of an evaluation, for the model card")] = None,
    push_to_hub: Annotated[str | None, Option("owner/name of a repository to upload to")] = None,
    private: Annotated[bool, Option("make the repository a private one", flag="--private")] = False,
    dry_run: Annotated[bool, Option("write the model card alone; upload nothing", flag="--dry-run")] = False,
    overwrite: Annotated[bool, Option("replace the directory", flag="--overwrite")] = False,
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
    check_export(info, format, out, dtype, overwrite or dry_run, base)
    check_writable(f"--out {out}", out)
    if push_to_hub is not None:
        check_repo(push_to_hub)
    card = model_card(info, format, read_results(results) if results is not None else ())
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
    options = {"base_architectures": architectures, "base": base, "overwrite": overwrite}
    export_speculator(info, format, out, dtype=dtype, card=card, **options)
    typer.echo(f"{out}: {format}, for {FORMATS[format].engine}")
    if push_to_hub is not None:
        typer.echo(push(out, push_to_hub, private=private))


def rollout_args(
    checkpoint: Checkpoint,
    overrides: Annotated[
        tuple[str, ...], Option("your own overrides: held against these, and printed behind them", positional=True)
    ] = (),
    engine: Annotated[str, Option(f"vllm (the runner that the installed vLLM has), {', '.join(ENGINES)}")] = "vllm",
    purpose: Annotated[str, Option(", ".join(PURPOSES), flag="--for")] = "ppo",
    train: Annotated[
        bool, Option("have PPO's actor train the speculator, and the rollout take it over", flag="--train")
    ] = False,
    allow_untrained: Annotated[
        bool, Option("a checkpoint that training never changed", flag="--allow-untrained")
    ] = False,
) -> None:
    """Print the Hydra overrides for verl's PPO trainer or generation server, one a line; notes on standard error."""
    from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info

    info = read_checkpoint_info(checkpoint)
    arguments = rollout_arguments(info, engine=engine, purpose=purpose, train=train, overrides=overrides)

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
