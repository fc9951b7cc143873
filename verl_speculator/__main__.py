"""The command line `verl-speculator`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import verl_speculator
from verl_speculator.cli.diagnose import app as diagnose
from verl_speculator.cli.evaluate import evaluate, plot, sweep, tree
from verl_speculator.cli.files import convert, export, inspect, prepare, regenerate, rollout_args
from verl_speculator.cli.generate import generate, serve
from verl_speculator.cli.options import command
from verl_speculator.utils.process import silence_import_warnings
from verl_speculator.utils.settings import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speculators for language models.")
for function in (
    *(prepare, regenerate, inspect, convert, generate, serve, evaluate, tree, plot, sweep),
    *(export, rollout_args),
):
    app.command()(command(function))
app.add_typer(diagnose, name="diagnose")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a speculator: PROCESSES SAVE_PATH [hydra overrides…]; `train --help` shows all of it."""
    from verl_speculator.preflight.launch import launch

    launch(context.args)


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"verl_speculator {verl_speculator.__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Speculators for language models."""


def main() -> None:
    """Run a command; a `UserError` is one line on standard error and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("chat_template", "loading"):  # the tokens that end a turn, and the dtype on a CPU
        logging.getLogger(f"verl_speculator.base_model.{name}").setLevel(logging.INFO)
    silence_import_warnings()
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
