"""Commands that decode: `generate` writes a text and the speed, `serve` is an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_speculator.cli.options import (
    GenerationOptions,
    LoadingOptions,
    check_speculator,
    load_models,
    read_draft_tree,
)
from verl_speculator.server.settings import VARIABLE, ServeSettings, bind, listen
from verl_speculator.utils.process import restart_with_allocator
from verl_speculator.utils.settings import BaseModel, Option, UserError

if TYPE_CHECKING:
    from verl_speculator.decoding import Generation
    from verl_speculator.decoding.generate import Difference


def generate(
    *,
    base: BaseModel,
    speculator: Annotated[str | None, Option("checkpoint or run; without it the base is alone")] = None,
    prompt: Annotated[str | None, Option("what the user says; standard input without it")] = None,
    system: Annotated[str | None, Option("system message")] = None,
    chat: Annotated[bool, Option("write the prompt with the chat template; otherwise go on from it")] = True,
    options: GenerationOptions,
    compare: Annotated[bool, Option("run the base alone too, and show both")] = False,
    loading: LoadingOptions,
) -> None:
    """Generate text; tokens per second, τ and the accepted share follow on standard error."""
    restart_with_allocator()
    # Everything that can be wrong without a model is checked before one is loaded.
    if compare and speculator is None:
        raise UserError("compare: there is no speculator to compare with; expected --speculator")
    tree = read_draft_tree(speculator, options.draft_length, options.draft_tree, options.temperature)
    loading.base_format(base)
    if speculator is not None:
        check_speculator(speculator, base, loading, options.draft_length, tree)
    prompt = sys.stdin.read() if prompt is None else prompt
    if not prompt:
        raise UserError("prompt: empty; expected a text, as --prompt or on standard input")

    models = load_models(base, speculator, loading)
    settings = asdict(options) | {
        "draft_tree": tree,
        "tokenizer": models.tokenizer,
        "input_ids": _prompt_tokens(models.tokenizer, prompt, system, chat),
        "eos_token_id": models.ends,
    }
    base_settings = settings | {"draft_length": None, "draft_tree": None}
    if compare:
        # The first call is slow in any case; neither run should pay for it.
        _warm_up(models.base, None, base_settings)
        _warm_up(models.base, models.speculator, settings)
    generations: dict[str, Generation] = {}
    if compare or speculator is None:
        generations["base alone"] = _stream(models.base, None, base_settings)
    if speculator is not None:
        if compare:
            typer.echo("\n— with the speculator —\n")
        name = "with speculator" if tree is None else f"with a tree of {len(tree.paths)}"
        generations[name] = _stream(models.base, models.speculator, settings)
    difference = None
    if compare and options.temperature == 0:
        from verl_speculator.decoding.generate import first_difference

        alone, drafted = (generation.tokens for generation in generations.values())
        difference = first_difference(models.base, settings["input_ids"], alone, drafted)
    _report(generations, difference, greedy=options.temperature == 0)
    if compare:
        _print_verdict(speculator, *generations.values())


def _prompt_tokens(tokenizer: Any, prompt: str, system: str | None, chat: bool) -> list[int]:
    from verl_speculator.base_model.chat_template import tokenize_prompt

    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "system", "content": system}] if system else []
    return tokenize_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])


def _warm_up(base: Any, speculator: Any, settings: dict[str, Any]) -> None:
    from verl_speculator.decoding import speculative_generate

    speculative_generate(base, speculator, **settings | {"max_new_tokens": min(8, settings["max_new_tokens"])})


def _stream(base: Any, speculator: Any, settings: dict[str, Any]) -> Generation:
    """Generate, writing the text as it comes."""
    import torch
    from transformers import TextStreamer

    from verl_speculator.decoding import speculative_stream

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    writer = Writer(settings["tokenizer"], skip_special_tokens=True)
    stream = speculative_stream(base, speculator, **settings)
    for round_ in stream:
        for token in round_.tokens:
            writer.put(torch.tensor([token]))
    writer.end()
    return stream.generation


def _report(generations: dict[str, Generation], difference: Difference | None, *, greedy: bool) -> None:
    """Print speed and acceptance of each run to standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(("", "tokens", "tokens/s", "prefill", "decode tokens/s", "τ", "accepted")):
        table.add_column(name, justify="right" if i else "left")
    rates = []
    for name, generation in generations.items():
        rates.append(len(generation.tokens) / (generation.seconds.prefill + generation.seconds.decode))
        decode, accepted, drafted = generation.decode_tokens_per_second, generation.accepted, generation.drafted
        table.add_row(
            name,
            str(len(generation.tokens)),
            f"{rates[-1]:.1f}",
            f"{generation.seconds.prefill * 1000:.0f} ms",
            "–" if decode is None else f"{decode:.1f}",
            f"{accepted + 1:.2f}" if drafted else "–",
            f"{accepted / drafted:.1%} of {drafted:.3g}" if drafted else "–",
        )
    console = Console(stderr=True)
    console.print()
    console.print(table)
    if len(generations) == 2:
        text = "the same text" if greedy else "of texts drawn apart"
        if difference is not None:
            text = (
                f"NOT the same text: at token {difference.position + 1} the logits of the two are {difference.gap:.3g} "
                "apart"
            )
        console.print(f"speedup {rates[1] / rates[0]:.2f}, {text}")


def _print_verdict(speculator: str, alone: Generation, drafted: Generation) -> None:
    """Print whether the speculator pays, by the speed of the rounds."""
    from verl_speculator.checkpoint.format import read_checkpoint_info
    from verl_speculator.evaluation.metrics import verdict

    rates = alone.decode_tokens_per_second, drafted.decode_tokens_per_second
    if drafted.accepted is not None and all(rates):
        share = read_checkpoint_info(speculator).data_share
        typer.echo(f"decoding is {verdict(drafted.accepted + 1, rates[1] / rates[0], share)}", err=True)


def serve(settings: ServeSettings, loading: LoadingOptions) -> None:
    """Serve OpenAI's chat completions and completions, and a page that shows what was drafted. Not for production."""
    restart_with_allocator()
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve: needs {' and '.join(missing)}; expected: pip install {' '.join(missing)}")
    loading.base_format(settings.base)
    speculator = _find_speculator(settings.speculator)
    tree = read_draft_tree(speculator, settings.draft_length, settings.draft_tree)
    if speculator is not None:
        check_speculator(speculator, settings.base, loading, settings.draft_length, tree)
    with bind(settings.host, settings.port) as bound:
        address, port = bound.getsockname()[:2]
        models = load_models(settings.base, speculator, loading)

        from verl_speculator.server.app import create_app
        from verl_speculator.server.engine import Engine

        engine = Engine(
            models.base,
            models.tokenizer,
            models.speculator,
            ends=models.ends,
            draft_length=settings.draft_length,
            draft_tree=tree,
            max_waiting=settings.max_waiting,
        )
        engine.warm_up()
        if not ipaddress.ip_address(address).is_loopback:
            warning = "anyone who reaches this machine can use it; there are no keys"
            typer.echo(f"warning: host={settings.host}: {warning}", err=True)
        # From here on a connection waits instead of being refused.
        bound.listen()
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        typer.echo(f"serving {settings.model}: page {url}, API {url}/v1 (Ctrl-C ends it)", err=True)
        listen(create_app(engine, settings), bound, engine.stop)


def _find_speculator(path: str | None) -> str | None:
    """The checkpoint of `--speculator`, or of the environment variable; None, with a warning, where neither is one.

    Raises:
        UserError: if `--speculator` names no checkpoint.
    """
    from verl_speculator.checkpoint.format import resolve_checkpoint

    if path is not None:
        return str(resolve_checkpoint(path))
    variable = os.environ.get(VARIABLE)
    if not variable:
        typer.echo(f"no speculator (--speculator, {VARIABLE}): the base alone", err=True)
        return None
    try:
        return str(resolve_checkpoint(variable))
    except UserError as error:
        typer.echo(f"warning: {VARIABLE}: {error}: the base alone", err=True)
        return None
