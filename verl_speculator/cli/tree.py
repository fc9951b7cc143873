"""`verl-speculator tree`: the draft tree that fits a speculator best, chosen on the base's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_speculator.cli.options import check_speculator, load
from verl_speculator.decoding.tree import MOST_NODES
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import restart_with_allocator

if TYPE_CHECKING:
    from verl_speculator.decoding import DraftTree


def tree(
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    speculator: Annotated[str, typer.Option(help="checkpoint or run")],
    prompts: Annotated[Path, typer.Option(help="parquet or jsonl of prompts that the base answers")],
    out: Annotated[Path, typer.Option(help="file of the tree, for --draft-tree")],
    nodes: Annotated[int, typer.Option(help=f"guesses that the base reads in a round, at most {MOST_NODES}")] = 24,
    num_prompts: Annotated[int, typer.Option(help="prompts of the file, at even distances; 0 for all")] = 100,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 128,
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    allow_other_base: Annotated[bool, typer.Option(help="a base with other weights than at training")] = False,
) -> None:
    """Choose a draft tree for a base and a speculator, and write it to a file."""
    restart_with_allocator()
    if not 1 <= nodes <= MOST_NODES:
        raise UserError(f"nodes={nodes}: expected 1 to {MOST_NODES}")
    for name, value, least in (("num_prompts", num_prompts, 0), ("max_new_tokens", max_new_tokens, 2)):
        if value < least:
            raise UserError(f"{name}={value}: expected a number ≥ {least}")
    from verl_speculator.checkpoint.format import read_checkpoint_info
    from verl_speculator.decoding.tree import check_family
    from verl_speculator.evaluation.prompts import read_prompts
    from verl_speculator.utils.atomic_io import check_writable

    if out.is_dir():
        raise UserError(f"out={out}: a directory, expected the name of a file")
    check_writable(f"out={out}", out.parent)
    check_family(read_checkpoint_info(speculator).config)
    check_speculator(speculator, base, None, allow_other_base)
    asked = read_prompts(prompts)

    loaded = load(base, speculator, device=device, dtype=dtype)

    from verl_speculator.decoding.target import windows
    from verl_speculator.decoding.tree import write_tree
    from verl_speculator.evaluation.tree_search import sample_ranks

    windows(loaded.base)  # a base that cannot read a tree needs none
    sample = sample_ranks(
        loaded.base,
        loaded.tokenizer,
        loaded.speculator,
        asked,
        ends=loaded.ends,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
    )
    chosen, measured = sample.chosen(nodes)
    facts = _provenance(base, speculator, prompts) | {"max_new_tokens": max_new_tokens}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tree(out, chosen, measured=measured, provenance=facts)
    _report(chosen, measured)
    typer.echo(out)


def _provenance(base: str, speculator: str, prompts: Path) -> dict[str, Any]:
    """What the tree was chosen for and with."""
    import datetime

    from verl_speculator.checkpoint.format import WEIGHTS_FILE, read_checkpoint_info
    from verl_speculator.checkpoint.provenance import file_fingerprint, git_commit, versions, weights_fingerprint

    info = read_checkpoint_info(speculator)
    return {
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
    }


def _report(chosen: DraftTree, measured: dict[str, Any]) -> None:
    """What each guess is worth by depth, and what chain and tree are expected to bring, on standard error."""
    from rich.console import Console
    from rich.table import Table

    shares = measured["rank_shares"]
    table = Table(box=None, pad_edge=False, title=f"ranks at {measured['positions']} positions of the base's answers")
    names = ("depth", *(f"rank {rank}" for rank in range(len(shares[0]))), "behind", "nodes")
    for name in names:
        table.add_column(name, justify="right")
    for depth, row in enumerate(shares):
        count = sum(len(path) == depth + 1 for path in chosen.paths)
        table.add_row(str(depth), *(f"{share:.1%}" for share in row), f"{1 - sum(row):.1%}", str(count))
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"expected τ: chain of {len(shares)} {measured['tau_chain']:.2f}, "
        f"tree of {len(chosen.paths)} nodes {measured['tau_tree']:.2f}"
    )
