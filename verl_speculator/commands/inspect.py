"""`verl-speculator inspect`: what a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    directory: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder for its latest step")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show what a checkpoint is: family, dims, parameters, base, data, step, versions, and which engine can serve it.
    Reads every weight."""
    from verl_speculator.checkpoint import read_checkpoint_info, read_weights
    from verl_speculator.families import FAMILIES
    from verl_speculator.rollout.contracts import serving_engines

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
            s.engine: "yes" if s.obstacle is None else f"no: {s.obstacle}" for s in serving_engines(info.config)
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
