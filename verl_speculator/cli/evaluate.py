"""Commands that measure: `evaluate`, its `plot`s, the draft `tree` of a speculator, and a `sweep` of trainings."""

from __future__ import annotations

import datetime
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_speculator.cli.options import LoadingOptions, check_speculator, load_models, wide_console
from verl_speculator.decoding.tree import MOST_NODES
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.sweep.settings import SweepOptions, read_settings
from verl_speculator.utils.process import restart_with_allocator
from verl_speculator.utils.settings import AllowOtherBase, BaseModel, Device, Dtype, Option, UserError

if TYPE_CHECKING:
    from verl_speculator.decoding import DraftTree

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def evaluate(settings: EvaluationSettings) -> None:
    """Measure quality, acceptance and speed of speculators, against the base alone, prompt lookup and a random one."""
    restart_with_allocator()
    settings.check_output()
    settings.checkpoints()

    from verl_speculator.evaluation.report import print_results
    from verl_speculator.evaluation.run import evaluate as run

    run(settings)
    if settings.plots:
        plot(settings.out)
    print_results(settings.out, wide_console())


def plot(
    directory: Annotated[
        Path, Option("output of an evaluation or a sweep; only its CSV files are read", positional=True)
    ],
) -> None:
    """Draw the pictures of an evaluation or a sweep, as PNG and PDF."""
    from verl_speculator.evaluation.plots import plot as draw
    from verl_speculator.sweep.report import is_sweep, plot_sweep

    for path in plot_sweep(directory) if is_sweep(directory) else draw(directory):
        if path.suffix == ".png":
            typer.echo(path)


def tree(
    base: BaseModel,
    speculator: Annotated[str, Option("checkpoint or run")],
    prompts: Annotated[Path, Option("parquet or jsonl of prompts that the base answers")],
    out: Annotated[Path, Option("file of the tree, for --draft-tree")],
    nodes: Annotated[int, Option(f"guesses that the base reads in a round, at most {MOST_NODES}")] = 24,
    num_prompts: Annotated[int, Option("prompts of the file, at even distances; 0 for all", minimum=0)] = 100,
    max_new_tokens: Annotated[int, Option("the most tokens of an answer", minimum=2)] = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Choose a draft tree for a base and a speculator, and write it to a file."""
    restart_with_allocator()
    if not 1 <= nodes <= MOST_NODES:
        raise UserError(f"nodes={nodes}: expected 1 to {MOST_NODES}")
    from verl_speculator.checkpoint.format import WEIGHTS_FILE, read_checkpoint_info
    from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, versions, weights_fingerprint
    from verl_speculator.decoding.tree import check_family, write_tree
    from verl_speculator.evaluation.prompts import read_prompts
    from verl_speculator.utils.atomic_io import check_writable

    if out.is_dir():
        raise UserError(f"out={out}: a directory, expected the name of a file")
    check_writable(f"out={out}", out.parent)
    info = read_checkpoint_info(speculator)
    check_family(info.config)
    loading = LoadingOptions(dtype=dtype, device=device, allow_other_base=allow_other_base)
    check_speculator(speculator, base, loading)
    conversations = read_prompts(prompts)

    models = load_models(base, speculator, loading)

    from verl_speculator.decoding.target import windows
    from verl_speculator.evaluation.tree_search import sample_ranks

    windows(models.base)  # refuses a base model that cannot use tree attention before anything is sampled
    sample = sample_ranks(
        models.base,
        models.tokenizer,
        models.speculator,
        conversations,
        ends=models.ends,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
    )
    draft_tree, statistics = sample.chosen(nodes)
    provenance = {
        "base": base,
        "base_fingerprint": weights_fingerprint(base),
        "speculator": speculator,
        "speculator_fingerprint": file_fingerprint(info.directory / WEIGHTS_FILE),
        "method": info.config.method,
        "n_predict": info.config.n_predict,
        "prompts": str(prompts),
        "prompts_fingerprint": file_fingerprint(prompts),
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
        "max_new_tokens": max_new_tokens,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tree(out, draft_tree, measured=statistics, provenance=provenance)
    _print_tree(draft_tree, statistics)
    typer.echo(out)


def _print_tree(draft_tree: DraftTree, statistics: dict[str, Any]) -> None:
    """Print the acceptance of each rank by depth, and τ of chain and tree, to standard error."""
    from rich.console import Console
    from rich.table import Table

    shares = statistics["rank_shares"]
    table = Table(box=None, pad_edge=False, title=f"ranks at {statistics['positions']} positions of the base's answers")
    for name in ("depth", *(f"rank {rank}" for rank in range(len(shares[0]))), "behind", "nodes"):
        table.add_column(name, justify="right")
    for depth, row in enumerate(shares):
        count = sum(len(path) == depth + 1 for path in draft_tree.paths)
        table.add_row(str(depth), *(f"{share:.1%}" for share in row), f"{1 - sum(row):.1%}", str(count))
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"expected τ: chain of {len(shares)} {statistics['tau_chain']:.2f}, "
        f"tree of {len(draft_tree.paths)} nodes {statistics['tau_tree']:.2f}"
    )


def sweep(
    *,
    file: Annotated[Path | None, Option("YAML file; options given with it take precedence", positional=True)] = None,
    options: SweepOptions,
    dry_run: Annotated[bool, Option("check and list the points, and stop", flag="--dry-run")] = False,
    plots: Annotated[bool, Option("draw the pictures too")] = True,
) -> None:
    """Train and evaluate a speculator for each point of a grid: one results.csv, pictures, and which one to take."""
    settings = read_settings(file, options)

    from verl_speculator.sweep.report import plot_sweep, print_results, print_trials
    from verl_speculator.sweep.run import plan
    from verl_speculator.sweep.run import sweep as run
    from verl_speculator.sweep.trial import DONE

    console = wide_console()
    if dry_run:
        print_trials(plan(settings), console)
        return
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        rows = run(settings, lambda line: typer.echo(line, err=True))
    except (KeyboardInterrupt, SystemExit) as error:  # Ray replaces the code of an exit
        typer.echo(f"interrupted: what is done is kept in {settings.out}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED) from None
    if plots:
        plot_sweep(settings.out)
    print_results(rows, console)
    typer.echo(settings.out / "results.csv")
    if failed := sum(row["status"] != DONE for row in rows):
        typer.echo(f"{failed} of {len(rows)} points failed; the same command tries them again", err=True)
        raise typer.Exit(1)


def _raise_exit(number: int, frame: Any) -> None:
    """Leave by an exception, so that subprocesses are ended."""
    raise SystemExit(TERMINATED)
