"""Commands from settings dataclasses, and what commands that generate load."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from verl_speculator.base_model.loading import BaseModelFormat
from verl_speculator.decoding.options import DraftLength, DraftLengthOption, SamplingPolicy, check_length
from verl_speculator.decoding.tree import DraftTree, check_tree_settings, read_tree
from verl_speculator.utils.settings import (
    AllowOtherBase,
    Device,
    Dtype,
    GgufFile,
    MaxNewTokens,
    Option,
    Quantization,
    Temperature,
    TopK,
    TopP,
    UserError,
    check_minimums,
    settings_options,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from verl_speculator.models import Speculator


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function whose options are declared by `Option`.

    A parameter whose type is a settings dataclass becomes an option for each of the fields, in order; the function
    gets the dataclass. Any other parameter is an option by itself.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    declared: dict[str, tuple[Any, Option, Any]] = {}  # type, option and default by name
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            for field, kind, option in settings_options(groups[name]):
                declared[field.name] = (kind, option, _default(field))
        else:
            declared[name] = (hints[name].__origin__, hints[name].__metadata__[0], parameter.default)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        values = {name: _value(*declared[name], value) for name, value in given.items()}
        for name, settings in groups.items():
            values[name] = settings(**{field.name: values.pop(field.name) for field in fields(settings)})
        for name in values.keys() - groups.keys():
            declared[name][1].check(name, values[name])
        function(**values)

    parameters = [_typer_parameter(name, *declaration) for name, declaration in declared.items()]
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _typer_parameter(name: str, kind: Any, option: Option, default: Any) -> inspect.Parameter:
    """A parameter as typer reads it: lists instead of tuples, and text where the option parses it."""
    if option.parse is not None:
        kind = str | None if default is None else str
        default = ",".join(default) if isinstance(default, tuple) else default
        default = json.dumps(default) if isinstance(default, dict) else default
    elif get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]
        if default == ():
            kind, default = kind | None, None
    # Otherwise rich takes "[n_predict]" for a style.
    text = re.sub(r"\[(?=[a-z#/@])", r"\\[", option.help)
    flags = () if option.flag is None else (option.flag,)
    info = typer.Argument(help=text) if option.positional else typer.Option(*flags, help=text)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _value(kind: Any, option: Option, default: Any, value: Any) -> Any:
    """The value of the declared type from what typer has read."""
    if get_origin(kind) is tuple and option.parse is None:
        return tuple(value or ())
    return value if option.parse is None or value is None else option.parse(value)


def wide_console(width: int = 180) -> Console:
    """Standard output; a file or a pipe has no width, and rich's default of 80 would cut names."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


@dataclass(frozen=True)
class LoadingOptions:
    """How a base model is loaded."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    quantization: Quantization = None
    gguf_file: GgufFile = None
    allow_other_base: AllowOtherBase = False

    def base_format(self, base: str) -> BaseModelFormat:
        """The format in which the base model is read and held.

        Raises:
            UserError: for an unknown value, a package that is not installed, or a file that does not exist.
        """
        base_format = BaseModelFormat(self.quantization, self.gguf_file)
        base_format.check()
        base_format.check_file(base)
        return base_format


@dataclass(frozen=True)
class GenerationOptions:
    """How a text is generated.

    Raises:
        UserError: for a value out of range, or a draft tree together with a draft length or sampling.
    """

    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Annotated[int | None, Option("of sampling")] = None
    draft_length: DraftLengthOption = None
    draft_tree: Annotated[Path | None, Option("file of a tree to draft instead; greedy only")] = None
    stop: Annotated[tuple[str, ...], Option("text that ends the answer; may be given again")] = ()

    def __post_init__(self) -> None:
        SamplingPolicy(self.temperature, self.top_p, self.top_k)
        check_minimums(self)
        if "" in self.stop:
            raise UserError("stop: an empty text ends every answer at once; expected one that is not empty")


@dataclass(frozen=True)
class LoadedModels:
    """A base model in evaluation mode with its tokenizer, a speculator or None, and the tokens that end an answer."""

    base: nn.Module
    tokenizer: Any
    speculator: Speculator | None
    ends: tuple[int, ...]


def read_draft_tree(
    speculator: str | None, draft_length: DraftLength, draft_tree: Path | None, temperature: float = 0.0
) -> DraftTree | None:
    """The tree of `--draft-tree`, checked together with `--draft-length`.

    Raises:
        UserError: if either is given without a speculator, both are given, the file holds no tree, or the temperature
            is above 0.
    """
    if draft_tree is not None:
        check_tree_settings(draft_length, temperature)
    for name, value in (("draft_length", draft_length), ("draft_tree", draft_tree)):
        if value is not None and speculator is None:
            raise UserError(f"{name}={value}: there is no speculator to draft with; expected --speculator")
    return None if draft_tree is None else read_tree(draft_tree)


def check_speculator(
    speculator: str,
    base: str,
    loading: LoadingOptions,
    draft_length: DraftLength = None,
    draft_tree: DraftTree | None = None,
) -> None:
    """Check a checkpoint against the base model's configuration without loading either.

    Raises:
        UserError: for a path that is not a checkpoint, a speculator of another base model, or a draft length above its
            `n_predict`.
    """
    from verl_speculator.base_model.loading import base_shape
    from verl_speculator.checkpoint.format import read_checkpoint_info

    base_format = loading.base_format(base)
    info = read_checkpoint_info(speculator)
    check_length(draft_length, info.config.n_predict)
    if draft_tree is not None:
        draft_tree.check(info.config, info.vocab_size)
    info.check_base(*base_shape(base, base_format))
    info.check_base_weights(base, base_format, allow_other=loading.allow_other_base)
    typer.echo(f"{info.directory}: trained for {info.base_name}", err=True)


def load_models(base: str, speculator: str | None, loading: LoadingOptions) -> LoadedModels:
    """Load what `check_speculator` has accepted; warn of an untrained speculator.

    Raises:
        UserError: for an unknown device or dtype, or a base model that cannot be loaded or decoded with.
    """
    from verl_speculator.base_model.cpu import optimize_speculator_for_cpu
    from verl_speculator.base_model.loading import BaseModelLoader
    from verl_speculator.checkpoint.format import load_speculator

    base_format = loading.base_format(base)
    loader = BaseModelLoader(base, device=loading.device, dtype=loading.dtype, form=base_format)
    tokenizer, model = loader.tokenizer, loader.load()
    draft = None
    if speculator is not None:
        draft = load_speculator(speculator, device=loader.device, dtype=loader.dtype).requires_grad_(False).eval()
        if draft.is_untrained():
            typer.echo(f"warning: {speculator}: no training step has changed its tensors", err=True)
        if loader.device == "cpu":
            optimize_speculator_for_cpu(draft)
    return LoadedModels(model, tokenizer, draft, loader.end_token_ids)
