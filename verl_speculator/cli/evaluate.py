"""`verl-speculator evaluate` and `plot`: how good speculators are, as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_speculator.cli.options import GGUF_HELP, QUANTIZATION_HELP
from verl_speculator.decoding.draft_length import read_length
from verl_speculator.evaluation.settings import BASELINES, OPTIONAL_BASELINES, EvaluationSettings
from verl_speculator.utils.process import restart_with_allocator

WIDTH = 180


def evaluate(
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    prompts: Annotated[list[Path], typer.Option(help="parquet or jsonl of prompts; may be given again")],
    out: Annotated[Path, typer.Option(help="directory of results.csv and plots/; go on in it to add rows")],
    speculator: Annotated[
        list[str] | None, typer.Option(help="checkpoint, run or quoted pattern; may be given again")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="held-out text for CE, KL and accuracy")] = None,
    num_prompts: Annotated[int, typer.Option(help="prompts of each file, at even distances; 0 for all")] = 0,
    num_texts: Annotated[int, typer.Option(help="rows of the held-out text, likewise")] = 0,
    num_trials: Annotated[int, typer.Option(help="runs of each prompt")] = 1,
    warmup_steps: Annotated[int, typer.Option(help="generations before anything is timed")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of the probability that is kept")] = 1.0,
    top_k: Annotated[int, typer.Option(help="number of tokens kept, 0 for all")] = 0,
    draft_length: Annotated[str | None, typer.Option(help="drafts per round, or auto [each one's n_predict]")] = None,
    draft_tree: Annotated[
        list[Path] | None, typer.Option(help="file of a tree: another row of each speculator; may be given again")
    ] = None,
    kl_temperature: Annotated[float | None, typer.Option(help="for kl_training_temperature [as trained, or 1]")] = None,
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    seed: Annotated[int, typer.Option(help="of sampling, the random baseline and the intervals")] = 0,
    baselines: Annotated[
        str, typer.Option(help=f"comma-separated: {', '.join((*BASELINES, *OPTIONAL_BASELINES))}")
    ] = ",".join(BASELINES),
    plots: Annotated[bool, typer.Option(help="draw the pictures too")] = True,
    quantization: Annotated[str | None, typer.Option(help=QUANTIZATION_HELP)] = None,
    gguf_file: Annotated[str | None, typer.Option(help=GGUF_HELP)] = None,
    allow_other_base: Annotated[bool, typer.Option(help="a base with other weights than at training")] = False,
    allow_untrained: Annotated[bool, typer.Option(help="checkpoints that training never changed")] = False,
) -> None:
    """Measure quality, acceptance and speed of speculators, beside the base alone, prompt lookup and a random one."""
    restart_with_allocator()
    settings = EvaluationSettings(
        base=base,
        speculators=tuple(speculator or ()),
        prompts=tuple(prompts),
        out=out,
        texts=text,
        num_prompts=num_prompts,
        num_texts=num_texts,
        num_trials=num_trials,
        warmup_steps=warmup_steps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        draft_length=read_length(draft_length),
        draft_trees=tuple(draft_tree or ()),
        kl_temperature=kl_temperature,
        dtype=dtype,
        device=device,
        seed=seed,
        baselines=tuple(name.strip() for name in baselines.split(",") if name.strip()),
        quantization=quantization,
        gguf_file=gguf_file,
        allow_other_base=allow_other_base,
        allow_untrained=allow_untrained,
    )
    settings.check_output()
    settings.checkpoints()

    from rich.console import Console

    from verl_speculator.evaluation.report import print_results
    from verl_speculator.evaluation.run import evaluate as run

    run(settings)
    if plots:
        plot(out)
    # A file or a pipe has no width of its own, and a narrow one would cut the names.
    console = Console()
    print_results(out, console if console.is_terminal else Console(width=WIDTH))


def plot(
    directory: Annotated[Path, typer.Argument(help="output of an evaluation or a sweep; only its CSV files are read")],
) -> None:
    """Draw the pictures of an evaluation or a sweep, as PNG and PDF."""
    from verl_speculator.evaluation.plots import plot as draw
    from verl_speculator.sweep.report import is_sweep, plot_sweep

    for path in plot_sweep(directory) if is_sweep(directory) else draw(directory):
        if path.suffix == ".png":
            typer.echo(path)
