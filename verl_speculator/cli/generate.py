"""`verl-speculator generate`: text from a base and a speculator, and what the speculator brought."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_speculator.cli.options import (
    GGUF_HELP,
    QUANTIZATION_HELP,
    check_form,
    check_speculator,
    load,
    read_drafts,
)
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import restart_with_allocator

if TYPE_CHECKING:
    from verl_speculator.decoding import Generation


def generate(
    base: Annotated[str, typer.Option(help="base model: a directory or a hub name")],
    speculator: Annotated[str | None, typer.Option(help="checkpoint or run; without it the base is alone")] = None,
    prompt: Annotated[str | None, typer.Option(help="what the user says; standard input without it")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    chat: Annotated[bool, typer.Option(help="write the prompt with the chat template; otherwise go on from it")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of the answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of the probability that is kept")] = 1.0,
    top_k: Annotated[int, typer.Option(help="number of tokens kept, 0 for all")] = 0,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    draft_length: Annotated[
        str | None, typer.Option(help="drafts per round, at most n_predict, or auto [n_predict]")
    ] = None,
    draft_tree: Annotated[Path | None, typer.Option(help="file of a tree to draft instead; greedy only")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be given again")] = None,
    compare: Annotated[bool, typer.Option(help="run the base alone too, and show both")] = False,
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, else bf16), fp32, bf16, fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    quantization: Annotated[str | None, typer.Option(help=QUANTIZATION_HELP)] = None,
    gguf_file: Annotated[str | None, typer.Option(help=GGUF_HELP)] = None,
    allow_other_base: Annotated[bool, typer.Option(help="a base with other weights than at training")] = False,
) -> None:
    """Generate text; tokens per second, τ and the accepted share follow on standard error."""
    restart_with_allocator()
    # All that can be wrong without a model is said before one loads.
    SamplingPolicy(temperature, top_p, top_k)
    length, tree = read_drafts(draft_length, draft_tree, temperature)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected a number ≥ 1")
    if compare and speculator is None:
        raise UserError("compare: there is no speculator to compare with; expected --speculator")
    for name, value in (("draft_length", draft_length), ("draft_tree", draft_tree)):
        if value is not None and speculator is None:
            raise UserError(f"{name}={value}: there is no speculator to draft with; expected --speculator")
    form = check_form(base, quantization, gguf_file)
    if speculator is not None:
        check_speculator(speculator, base, length, allow_other_base, tree, form)
    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("prompt: empty; expected a text, as --prompt or on standard input")
    if stop and "" in stop:
        raise UserError("stop: an empty text ends every answer at once; expected one that is not empty")

    loaded = load(base, speculator, device=device, dtype=dtype, form=form)
    model, tokenizer, draft = loaded.base, loaded.tokenizer, loaded.speculator
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
        "tokenizer": tokenizer,
        "input_ids": _tokens(tokenizer, prompt, system, chat),
        "eos_token_id": loaded.ends,
    }
    drafts = {"draft_length": length, "draft_tree": tree}
    if compare:
        # The first call of anything is slow: neither of the two should pay for it.
        _warm_up(model, None, settings)
        _warm_up(model, draft, settings | drafts)
    runs: list[_Shown] = []
    if compare or speculator is None:
        runs.append(_Shown("base alone", _stream(model, None, settings, tokenizer)))
    if draft is not None:
        if compare:
            typer.echo("\n— with the speculator —\n")
        name = "with speculator" if tree is None else f"with a tree of {len(tree.paths)}"
        runs.append(_Shown(name, _stream(model, draft, settings | drafts, tokenizer)))
    _report(runs, greedy=temperature == 0)


@dataclass(frozen=True)
class _Shown:
    """A finished generation under its name."""

    name: str
    generation: Generation


def _tokens(tokenizer: Any, prompt: str, system: str | None, chat: bool) -> list[int]:
    from verl_speculator.base_model.chat_template import tokenize_prompt

    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "system", "content": system}] if system else []
    return tokenize_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])


def _warm_up(model: Any, draft: Any, settings: dict[str, Any]) -> None:
    from verl_speculator.decoding import speculative_generate

    short = settings | {"max_new_tokens": min(8, settings["max_new_tokens"])}
    speculative_generate(model, draft, short.pop("input_ids"), **short)


def _stream(model: Any, draft: Any, settings: dict[str, Any], tokenizer: Any) -> Generation:
    """Generate, writing the text as it comes."""
    import torch
    from transformers import TextStreamer

    from verl_speculator.decoding import speculative_stream

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    writer = Writer(tokenizer, skip_special_tokens=True)
    settings = dict(settings)
    stream = speculative_stream(model, draft, settings.pop("input_ids"), **settings)
    for one in stream:
        for token in one.tokens:
            writer.put(torch.tensor([token]))
    writer.end()
    return stream.generation


def _report(runs: list[_Shown], *, greedy: bool) -> None:
    """What each run took, on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(("", "tokens", "tokens/s", "prefill", "decode tokens/s", "τ", "accepted")):
        table.add_column(name, justify="right" if i else "left")
    rates = []
    for run in runs:
        done = run.generation
        rates.append(len(done.tokens) / (done.seconds.prefill + done.seconds.decode))
        decode = done.decode_tokens_per_second
        table.add_row(
            run.name,
            str(len(done.tokens)),
            f"{rates[-1]:.1f}",
            f"{done.seconds.prefill * 1000:.0f} ms",
            "–" if decode is None else f"{decode:.1f}",
            f"{done.accepted + 1:.2f}" if done.drafted else "–",
            f"{done.accepted / done.drafted:.1%} of {done.drafted:.3g}" if done.drafted else "–",
        )
    console = Console(stderr=True)
    console.print()
    console.print(table)
    if len(runs) == 2:
        same = runs[0].generation.tokens == runs[1].generation.tokens
        told = f", the {'same' if same else 'NOT the same'} text" if greedy else ", of texts drawn apart"
        console.print(f"speedup {rates[1] / rates[0]:.2f}{told}")
