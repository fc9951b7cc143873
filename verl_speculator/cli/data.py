"""`verl-speculator prepare`: public data sets as the parquet files that training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.data.prepare import AUTO, DEFAULT_VAL_SHARE, FORMATS, PrepareSettings
from verl_speculator.data.regenerate import RegenerateSettings
from verl_speculator.data.regenerate import regenerate as run
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import restart_with_allocator


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


def regenerate(
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    data: Annotated[Path, typer.Option(help="parquet with a column messages, turns or prompt")],
    out: Annotated[Path, typer.Option(help="parquet to write; the same command goes on after a kill")],
    backend: Annotated[str, typer.Option(help="hf (Hugging Face's generate) or vllm")] = "hf",
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of the probability that is kept")] = 1.0,
    top_k: Annotated[int, typer.Option(help="number of tokens kept, 0 for all")] = 0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="keep rows whose answer did not end; training sees an end there")
    ] = False,
    num_rows: Annotated[int, typer.Option(help="rows of the file, at even distances; 0 for all")] = 0,
    batch_size: Annotated[int, typer.Option(help="prompts at a time (hf)")] = 16,
    shard_rows: Annotated[int, typer.Option(help="rows that a kill costs at most")] = 512,
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    vllm_args: Annotated[str, typer.Option(help='JSON of vllm.LLM\'s, such as {"tensor_parallel_size": 4}')] = "{}",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the file, and shards of other settings")
    ] = False,
) -> None:
    """Answer the prompts of a parquet with the base: the same columns, ready for training."""
    restart_with_allocator()
    settings = RegenerateSettings(
        base=base,
        data=data,
        out=out,
        backend=backend,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        keep_unfinished=keep_unfinished,
        num_rows=num_rows,
        batch_size=batch_size,
        shard_rows=shard_rows,
        dtype=dtype,
        device=device,
        vllm_args=_object(vllm_args),
        overwrite=overwrite,
    )
    account = run(settings)
    typer.echo(f"{out}: {account.summary()[0]}")
    for line in account.summary()[1:]:
        typer.echo(line)


def _object(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f'vllm_args={text}: expected a JSON object such as {{"tensor_parallel_size": 4}}')
    return value
