"""`verl-speculator prepare`: public data sets as the parquet files that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.data.prepare import AUTO, DEFAULT_VAL_SHARE, FORMATS, PrepareSettings


def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="json, jsonl, parquet or text files, or owner/name[:config][:split]")
    ],
    out: Annotated[Path, typer.Option(help="directory of train.parquet, val.parquet and prepare.json")],
    format_: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}")] = AUTO,
    text_column: Annotated[str | None, typer.Option(help="column of plain text [text]")] = None,
    val_share: Annotated[float | None, typer.Option(help=f"share that is held out [{DEFAULT_VAL_SHARE}]")] = None,
    val_rows: Annotated[int | None, typer.Option(help="number of rows that are held out instead")] = None,
    seed: Annotated[int, typer.Option(help="which rows are held out")] = 0,
    max_rows: Annotated[int | None, typer.Option(help="stop when so many are kept")] = None,
    min_turns: Annotated[int, typer.Option(help="answers that a conversation must have")] = 1,
    max_chars: Annotated[int | None, typer.Option(help="characters that a row may have")] = None,
    keep_system: Annotated[bool, typer.Option(help="keep system messages")] = True,
    dedup: Annotated[bool, typer.Option(help="drop rows that equal an earlier one")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace results that are there")] = False,
) -> None:
    """Turn ShareGPT, UltraChat, OpenAssistant, Alpaca and other data, or plain text, into what training reads."""
    from verl_speculator.data.prepare import prepare as run

    settings = PrepareSettings(
        inputs=tuple(inputs),
        out=out,
        format=format_,
        text_column=text_column,
        val_share=val_share,
        val_rows=val_rows,
        seed=seed,
        max_rows=max_rows,
        min_turns=min_turns,
        max_chars=max_chars,
        keep_system=keep_system,
        dedup=dedup,
        overwrite=overwrite,
    )
    _show(run(settings), out)


def _show(report: dict[str, Any], out: Path) -> None:
    """What was read, dropped and written."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("rows", justify="right")
    for source in report["inputs"]:
        told = "not read" if source["format"] is None else source["format"]
        table.add_row(escape(f"{source['name']} ({told})"), f"{source['read']:,}")
    counts = report["counts"]
    for reason, count in counts["dropped"].items():
        table.add_row(f"  dropped: {reason}", f"{count:,}")
    for change, count in counts["changed"].items():
        table.add_row(f"  {change}", f"{count:,}")
    for name in ("train", "val"):
        if counts[name]:
            table.add_row(escape(str(out / f"{name}.parquet")), f"{counts[name]:,}")
    Console().print(table)
