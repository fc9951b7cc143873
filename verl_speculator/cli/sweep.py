"""`verl-speculator sweep`: which speculator should be trained for a base."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.sweep.grid import SHORT_NAMES, setting_name, split_list
from verl_speculator.sweep.settings import EXECUTORS, read_settings
from verl_speculator.utils.errors import UserError

WIDTH = 180
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def sweep(
    file: Annotated[Path | None, typer.Argument(help="YAML file; what is given beside it takes its place")] = None,
    base: Annotated[str | None, typer.Option(help="base model: a directory or a hub name")] = None,
    train_files: Annotated[list[str] | None, typer.Option(help="parquet to train on; may be given again")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="parquet or jsonl of prompts, or NAME=FILE; may be given again")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="held-out text, or NAME=FILE; may be given again")] = None,
    out: Annotated[Path | None, typer.Option(help="directory of results.csv and plots/; goes on in it")] = None,
    exit_layers: Annotated[str | None, typer.Option(help=f"values of {SHORT_NAMES['exit_layers']}: a,b,c")] = None,
    temperatures: Annotated[str | None, typer.Option(help=f"values of {SHORT_NAMES['temperatures']}: a,b,c")] = None,
    train: Annotated[str | None, typer.Option(help=f"values of {SHORT_NAMES['train']}: a,b,c")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="KEY=a,b,c of any setting; may be given again")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for every point; may be given again")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of `evaluate`, such as num_prompts=20; may be given again")
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="processes of each training [1]")] = None,
    executor: Annotated[str | None, typer.Option(help=f"{' or '.join(EXECUTORS)} [{EXECUTORS[0]}]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list the points, and stop")] = False,
    plots: Annotated[bool, typer.Option(help="draw the pictures too")] = True,
) -> None:
    """Train and evaluate a speculator for each point of a grid: one results.csv, pictures, and which one to take."""
    named = {"exit_layers": exit_layers, "temperatures": temperatures, "train": train}
    axes = {name: values for name, values in named.items() if values is not None}
    given: dict[str, Any] = {
        "base": base,
        "train_files": train_files,
        "prompts": prompts,
        "text": text,
        "out": out,
        "axes": {
            SHORT_NAMES[name]: split_list(SHORT_NAMES[name], values, f"--{name.replace('_', '-')}")
            for name, values in axes.items()
        },
        "settings": {setting_name(name, "--set"): value for name, value in _pairs("--set", set_)},
        "evaluation": dict(_pairs("--evaluation", evaluation)),
        "nproc": nproc,
        "executor": executor,
    }
    for name, values in _pairs("--axis", axis):
        name = setting_name(name, "--axis")
        given["axes"][name] = split_list(name, values, f"--axis {name}")
    settings = read_settings(file, given)

    from rich.console import Console

    from verl_speculator.sweep.report import print_points, print_results
    from verl_speculator.sweep.run import failed, plan
    from verl_speculator.sweep.run import sweep as run

    # A file or a pipe has no width of its own, and a narrow one would cut the names.
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    if dry_run:
        print_points(plan(settings), console)
        return
    signal.signal(signal.SIGTERM, _terminated)
    try:
        rows = run(settings, lambda line: typer.echo(line, err=True))
    except (KeyboardInterrupt, SystemExit) as ending:  # Ray replaces the code of an exit
        typer.echo(f"interrupted: what is done is kept in {settings.out}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED if isinstance(ending, KeyboardInterrupt) else TERMINATED) from None
    if plots:
        from verl_speculator.sweep.report import plot_sweep

        plot_sweep(settings.out)
    print_results(rows, console)
    typer.echo(settings.out / "results.csv")
    if missing := failed(rows):
        typer.echo(f"{len(missing)} of {len(rows)} points failed; the same command tries them again", err=True)
        raise typer.Exit(1)


def _pairs(option: str, given: list[str] | None) -> list[tuple[str, str]]:
    """What stands before and behind the first `=` of each."""
    pairs = [one.partition("=") for one in given or []]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise UserError(f"{option} {name}: expected NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _terminated(number: int, frame: Any) -> None:
    """Leave by an exception, so that nothing that was started is left behind."""
    raise SystemExit(TERMINATED)
