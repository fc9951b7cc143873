"""`verl-speculator rollout-args`: how verl's rollout is told to decode with a speculator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_speculator.errors import UserError
from verl_speculator.rollout.arguments import ENGINES, PURPOSES, rollout_arguments


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
    from verl_speculator.checkpoint import load_speculator, read_checkpoint_info

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
