"""`verl-speculator regenerate`: answers of the base's own for the prompts of a parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_speculator.allocator import restart_with_allocator
from verl_speculator.data.regenerate import regenerate as run
from verl_speculator.data.regenerate_settings import RegenerateSettings
from verl_speculator.errors import UserError


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
