"""`verl-speculator diagnose`: where two runs differ first, and why a speculator is not accepted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_speculator.cli.options import command
from verl_speculator.diagnose import DiagnosisSettings, TracedModelOptions
from verl_speculator.utils.settings import Option, UserError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140

app = typer.Typer(no_args_is_help=True, help="Find the first place where two runs differ: 'acceptance is 0 %'.")


def parse_tokens(text: str) -> list[int]:
    """Token ids written as "5,9,23".

    Raises:
        UserError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f'tokens={text}: expected token ids joined by commas, such as "5,9,23"')
    return [int(part) for part in parts]


Tokens = Annotated[list[int], Option('token ids, such as "5,9,23"', parse=parse_tokens)]
Model = Annotated[str | None, Option("a model: a directory or a hub name")]
Tolerance = Annotated[float | None, Option("the largest relative difference of rounding [by the coarsest type]")]
Drafts = Annotated[int, Option("tokens to draft", minimum=1)]


def _console() -> Console:
    from rich.console import Console

    # Names and errors may hold square brackets and colons, which are no markup.
    plain = {"markup": False, "highlight": False, "emoji": False}
    console = Console(**plain)
    # A file or a pipe has no width of its own, and a narrow one would cut the names.
    return console if console.is_terminal else Console(width=WIDTH, **plain)


def _print_table(console: Console, rows: Sequence[Sequence[str]], headers: Sequence[str] = ("",) * 3) -> None:
    """A table whose last column folds."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(headers))
    for i, header in enumerate(headers):
        table.add_column(header, no_wrap=i < len(headers) - 1, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@app.command()
@command
def trace(
    *,
    tokens: Tokens,
    out: Annotated[Path, Option("file to write")],
    model: Model = None,
    options: TracedModelOptions,
    modules: Annotated[tuple[str, ...], Option("only these: names, ends of names, patterns")] = (),
    keep: Annotated[tuple[str, ...], Option("keep the tensors of these modules, for bisect")] = (),
    num_draft: Drafts = 3,
) -> None:
    """Run a model, or a base with its speculator, on fixed tokens and write statistics of every module's tensors."""
    from verl_speculator.diagnose.experiments import draft_tokens, load_traced_model
    from verl_speculator.diagnose.tracer import check_out
    from verl_speculator.diagnose.tracer import trace as record

    check_out(out)
    traced = load_traced_model(model, options, tokens)
    with record(traced, out, modules=modules or None, keep=keep) as tracer:
        tracer.notes["drafts"] = draft_tokens(traced, tokens, num_draft)
    typer.echo(f"{out}: {len(tracer.calls)} calls, {out.stat().st_size:,} bytes; drafts {tracer.notes['drafts']}")


@app.command()
@command
def compare(
    *,
    a: Annotated[Path, Option("a trace", positional=True)],
    b: Annotated[Path, Option("another", positional=True)],
    out: Annotated[Path | None, Option("directory for comparison.csv and the picture")] = None,
    tolerance: Tolerance = None,
    under_a: Annotated[str | None, Option("module of A to compare [found by names]")] = None,
    under_b: Annotated[str | None, Option("module of B")] = None,
    everything: Annotated[bool, Option("every call in the table", flag="--all")] = False,
) -> None:
    """Say where two traces differ first. Exit code 0: they agree; 1: they do not; 2: they cannot be compared."""
    from verl_speculator.diagnose.comparison import compare as compare_traces
    from verl_speculator.diagnose.report import show, write
    from verl_speculator.diagnose.trace_file import read_trace
    from verl_speculator.utils.atomic_io import check_writable

    if out is not None:
        check_writable(f"out={out}", out)
    comparison = compare_traces(read_trace(a), read_trace(b), tolerance=tolerance, under=(under_a, under_b))
    show(comparison, _console(), everything=everything)
    for path in write(comparison, out) if out is not None else ():
        typer.echo(path)
    raise typer.Exit(0 if comparison.agrees else 1)


@app.command()
@command
def bisect(
    *,
    trace: Annotated[Path, Option("a trace that kept the module (--keep)", positional=True)],
    module: Annotated[str, Option("its name, or the end of it", positional=True)],
    model: Model = None,
    options: TracedModelOptions,
    call: Annotated[int, Option("which of its calls")] = 0,
    after: Annotated[str | None, Option("a model that runs in between, which should change nothing")] = None,
    tolerance: Tolerance = None,
) -> None:
    """Replay a module's inputs: alone, twice, after another model, in float64, in a batch; and all that it calls."""
    from verl_speculator.diagnose.experiments import bisect as replay
    from verl_speculator.diagnose.experiments import draft_tokens, load_other_model, load_traced_model
    from verl_speculator.diagnose.trace_file import read_trace

    recorded = read_trace(trace)
    if not recorded.kept:
        raise UserError(f"{trace}: kept no module's inputs; expected a trace made with --keep {module}")
    tokens = list(recorded.tokens)
    traced = load_traced_model(model, options, tokens)
    disturb = None
    if after is not None:
        other = load_other_model(after, options, tokens)

        def disturb() -> None:
            draft_tokens(other, tokens, 1)

    result = replay(recorded, traced, module, call=call, disturb=disturb, tolerance=tolerance)
    console = _console()
    console.print(f"{result.verdict}\n", soft_wrap=True)
    rows = [
        (v.module, v.name, v.against, "–" if v.distance is None else f"{v.distance:.1e}", v.effect)
        for v in result.variants
    ]
    _print_table(console, rows, ("module", "run", "against", "difference", ""))
    raise typer.Exit(0 if result.agrees else 1)


@app.command("solo-vs-pair")
@command
def solo_vs_pair(
    *,
    target: Annotated[str, Option("the model that runs before the draft: a directory or a hub name")],
    tokens: Tokens,
    out: Annotated[Path, Option("directory for the traces and comparisons")],
    draft: Annotated[str | None, Option("a model that drafts: a directory or a hub name")] = None,
    options: TracedModelOptions,
    num_draft: Drafts = 4,
    tolerance: Tolerance = None,
) -> None:
    """The draft alone, after its own weights as target, and after the target: is it still the same?"""
    from verl_speculator.diagnose.experiments import draft_tokens, load_other_model, load_traced_model
    from verl_speculator.diagnose.experiments import solo_vs_pair as experiment
    from verl_speculator.diagnose.report import write
    from verl_speculator.utils.atomic_io import check_writable

    check_writable(f"out={out}", out)
    if draft is None and options.base is None:
        raise UserError("draft: expected --draft, or --base together with --speculator")
    traced = load_traced_model(draft, options, tokens)
    out.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> None:
        # Loaded only now: loading, too, may have an effect.
        draft_tokens(load_other_model(name, options, tokens), tokens, num_draft)

    others = {"own": lambda: run(draft or options.base), "target": lambda: run(target)}
    result = experiment(traced, lambda: draft_tokens(traced, tokens, num_draft), others, out, tolerance=tolerance)
    typer.echo(result.verdict)
    for name, drafts in result.tokens.items():
        typer.echo(f"  {name:<8} drafts {drafts}")
    for name, comparison in result.comparisons.items():
        typer.echo(f"  alone against {name}: {comparison.verdict.sentence}")
        write(comparison, out / f"alone-{name}")
    raise typer.Exit(0 if result.agrees else 1)


@app.command()
@command
def speculator(settings: DiagnosisSettings) -> None:
    """Why is it not accepted? Checks in order, each with its evidence, and one recommendation."""
    from verl_speculator.diagnose.checkpoint_checks import diagnose

    report = diagnose(settings)
    faults, accepted = report.faults, "It does not load"
    if report.accepted is not None:
        accepted = f"{report.accepted} of drafts accepted ({report.accepted.positions} positions)"
    cause = f"{faults[0].name}: {faults[0].evidence}" if faults else "no check finds a fault"
    console = _console()
    console.print(f"{accepted}; {cause}.\n", soft_wrap=True)
    _print_table(console, [(check.status, check.name, check.evidence) for check in report.checks])
    console.print(f"\nRecommendation: {report.recommendation}", soft_wrap=True)
    raise typer.Exit(1 if faults else 0)
