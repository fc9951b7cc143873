"""`verl-speculator diagnose`: where two runs part, and why a speculator is not accepted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140

app = typer.Typer(no_args_is_help=True, help="Find the first place where two runs part: 'acceptance is 0 %'.")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Dtype = Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16, fp64")]
Model = Annotated[str | None, typer.Option(help="a model: a directory or a hub name")]
Base = Annotated[str | None, typer.Option(help="a base, with --speculator")]
Speculator = Annotated[str | None, typer.Option(help="its speculator: a checkpoint or a run")]
Tokens = Annotated[str, typer.Option(help='token ids, such as "5,9,23"')]
Tolerance = Annotated[float | None, typer.Option(help="what rounding may explain [by the coarsest type]")]
External = Annotated[
    str | None, typer.Option(help="a module or a Python file to import first: own architectures, kernels, patches")
]
Drafts = Annotated[int, typer.Option(help="tokens to draft")]


def _console() -> Console:
    from rich.console import Console

    # Names and errors may hold square brackets and colons, which are no markup.
    plain = {"markup": False, "highlight": False, "emoji": False}
    console = Console(**plain)
    # A file or a pipe has no width of its own, and a narrow one would cut the names.
    return console if console.is_terminal else Console(width=WIDTH, **plain)


def _check_drafts(count: int) -> None:
    if count < 1:
        raise UserError(f"num-draft={count}: expected a number ≥ 1")


@app.command()
def trace(
    tokens: Tokens,
    out: Annotated[Path, typer.Option(help="file to write")],
    model: Model = None,
    base: Base = None,
    speculator: Speculator = None,
    modules: Annotated[list[str] | None, typer.Option(help="only these: names, ends of names, patterns")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="keep the tensors of these modules, for bisect")] = None,
    num_draft: Drafts = 3,
    external_lib: External = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Run a model, or a base with its speculator, on fixed tokens and write what every module made of them."""
    from verl_speculator.diagnose.experiments import import_external, load_traced_model, parse_tokens
    from verl_speculator.diagnose.tracer import check_out
    from verl_speculator.diagnose.tracer import trace as record

    ids = parse_tokens(tokens)
    check_out(out)
    _check_drafts(num_draft)
    import_external(external_lib)
    traced = load_traced_model(model=model, base=base, speculator=speculator, device=device, dtype=dtype, tokens=ids)
    with record(traced.module, out, modules=modules, keep=keep or ()) as recorder:
        recorder.notes["drafts"] = traced.draft(ids, num_draft)
    typer.echo(f"{out}: {len(recorder.calls)} calls, {out.stat().st_size:,} bytes; drafts {recorder.notes['drafts']}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="a trace")],
    b: Annotated[Path, typer.Argument(help="another")],
    out: Annotated[Path | None, typer.Option(help="directory for comparison.csv and the picture")] = None,
    tolerance: Tolerance = None,
    under_a: Annotated[str | None, typer.Option(help="module of A to look at [found by names]")] = None,
    under_b: Annotated[str | None, typer.Option(help="module of B")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every call in the table")] = False,
) -> None:
    """Say where two traces part. Exit code 0: they agree; 1: they do not; 2: they cannot be compared."""
    from verl_speculator.diagnose.comparison import compare as compared
    from verl_speculator.diagnose.report import show, write
    from verl_speculator.diagnose.trace_file import read_trace
    from verl_speculator.utils.atomic_io import check_writable

    if out is not None:
        check_writable(f"out={out}", out)
    found = compared(read_trace(a), read_trace(b), tolerance=tolerance, under=(under_a, under_b))
    show(found, _console(), everything=everything)
    for path in write(found, out) if out is not None else ():
        typer.echo(path)
    raise typer.Exit(0 if found.agrees else 1)


@app.command()
def bisect(
    trace: Annotated[Path, typer.Argument(help="a trace that kept the module (--keep)")],
    module: Annotated[str, typer.Argument(help="its name, or the end of it")],
    model: Model = None,
    base: Base = None,
    speculator: Speculator = None,
    call: Annotated[int, typer.Option(help="which of its calls")] = 0,
    after: Annotated[str | None, typer.Option(help="a model that runs in between: does it leave a mark?")] = None,
    tolerance: Tolerance = None,
    external_lib: External = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Replay a module's inputs: alone, twice, after another model, in float64, in a batch; and all that it calls."""
    from rich.table import Table

    from verl_speculator.diagnose.experiments import bisect as replay
    from verl_speculator.diagnose.experiments import import_external, load_traced_model
    from verl_speculator.diagnose.trace_file import read_trace

    recorded = read_trace(trace)
    if not recorded.kept:
        raise UserError(f"{trace}: kept no module's inputs; expected a trace made with --keep {module}")
    settings = {"device": device, "dtype": dtype, "tokens": list(recorded.tokens)}
    import_external(external_lib)
    traced = load_traced_model(model=model, base=base, speculator=speculator, **settings)
    disturb = None
    if after is not None:
        other = load_traced_model(model=after, base=None, speculator=None, **settings)

        def disturb() -> None:
            other.draft(list(recorded.tokens), 1)

    found = replay(recorded, traced.module, module, call=call, disturb=disturb, tolerance=tolerance)
    console, table = _console(), Table(box=None, pad_edge=False)
    for name in ("module", "run", "against", "difference"):
        table.add_column(name, no_wrap=True)
    table.add_column(overflow="fold")
    for v in found.variants:
        difference = "–" if v.distance is None else f"{v.distance:.1e}"
        table.add_row(v.module, v.name, v.against, difference, "changes it" if v.changes else v.note)
    console.print(found.verdict, soft_wrap=True)
    console.print()
    console.print(table)
    raise typer.Exit(0 if found.agrees else 1)


@app.command("solo-vs-pair")
def solo_vs_pair(
    target: Annotated[str, typer.Option(help="the model that runs beside it: a directory or a hub name")],
    tokens: Tokens,
    out: Annotated[Path, typer.Option(help="directory for the traces and comparisons")],
    draft: Annotated[str | None, typer.Option(help="a model that drafts: a directory or a hub name")] = None,
    base: Base = None,
    speculator: Speculator = None,
    num_draft: Drafts = 4,
    tolerance: Tolerance = None,
    external_lib: External = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """The draft alone, beside its own weights as target, and beside the target: is it still the same?"""
    from verl_speculator.diagnose.experiments import import_external, load_traced_model, parse_tokens
    from verl_speculator.diagnose.experiments import solo_vs_pair as experiment
    from verl_speculator.diagnose.report import write
    from verl_speculator.utils.atomic_io import check_writable

    ids = parse_tokens(tokens)
    _check_drafts(num_draft)
    check_writable(f"out={out}", out)
    settings = {"device": device, "dtype": dtype, "tokens": ids}
    if draft is None and base is None:
        raise UserError("draft: expected --draft, or --base together with --speculator")
    import_external(external_lib)
    traced = load_traced_model(model=draft, base=base, speculator=speculator, **settings)
    others = {"own": draft or base, "target": target}
    out.mkdir(parents=True, exist_ok=True)

    def beside(name: str) -> None:
        # Loaded when its turn comes: loading, too, may leave a mark.
        load_traced_model(model=others[name], base=None, speculator=None, **settings).draft(ids, num_draft)

    found = experiment(
        traced.module,
        lambda: traced.draft(ids, num_draft),
        {name: (lambda name=name: beside(name)) for name in others},
        out,
        tolerance=tolerance,
    )
    typer.echo(found.verdict)
    for name, drafted in found.tokens.items():
        typer.echo(f"  {name:<8} drafts {drafted}")
    for name, one in found.comparisons.items():
        typer.echo(f"  alone against {name}: {one.verdict.sentence}")
        write(one, out / f"alone-{name}")
    raise typer.Exit(0 if found.agrees else 1)


@app.command()
def speculator(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint, or a run's folder for its latest step")],
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    prompts: Annotated[Path, typer.Option(help="parquet or jsonl of prompts like those that are served")],
    rollout_trace: Annotated[Path | None, typer.Option(help="a trace of the serving engine's draft")] = None,
    train_data: Annotated[Path | None, typer.Option(help="what it was trained on [as its config.json names]")] = None,
    num_prompts: Annotated[int, typer.Option(help="prompts of each file, at even distances")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 64,
    num_draft: Annotated[int | None, typer.Option(help="tokens that the engine drafts a round")] = None,
    external_lib: External = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Why is it not accepted? Checks in order, each with its evidence, and one recommendation."""
    from rich.table import Table

    from verl_speculator.diagnose.checkpoint_checks import FAULT
    from verl_speculator.diagnose.checkpoint_checks import diagnose as run_checks
    from verl_speculator.diagnose.experiments import import_external

    import_external(external_lib)
    found = run_checks(
        checkpoint,
        base,
        prompts,
        rollout_trace=rollout_trace,
        train_data=train_data,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        num_draft=num_draft,
        device=device,
        dtype=dtype,
    )
    faults = [check for check in found.checks if check.status == FAULT]
    accepted = "It does not load"
    if found.accepted is not None:
        accepted = f"{found.accepted} of drafts accepted ({found.accepted.positions} positions)"
    cause = f"{faults[0].name}: {faults[0].evidence}" if faults else "no check finds a fault"
    console, table = _console(), Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        table.add_row(check.status, check.name, check.evidence)
    console.print(f"{accepted}; {cause}.\n", soft_wrap=True)
    console.print(table)
    console.print(f"\nRecommendation: {found.recommendation}", soft_wrap=True)
    raise typer.Exit(1 if faults else 0)
