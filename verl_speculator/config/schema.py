"""Every `model.speculator.*` setting, declared once: type, bounds, choices, default and help.

The section of `speculator_sft.yaml`, the launcher's `--help` and the table of docs/configuration.md are generated from
these declarations (`make docs-tables`). Imports no torch and no verl.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic

from verl_speculator.config.draft_vocabulary import DraftVocabulary
from verl_speculator.config.families import BASE, FAMILIES, HEADS, HIDDEN_STATES, OWN, TABLES, TRAINABLE
from verl_speculator.config.objective import LOSS_FORMS, Objective
from verl_speculator.utils.settings import UserError, nearest

PREFIX = "model.speculator."
DIM_KEYS = ("inner_dim", "emb_dim", "proj_dim")
NUM_AUX_LAYERS = 3
# Types of RoPE whose frequencies do not depend on the length of the sequence, or on a part of the head.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DEFAULT_POSITIONS = 8192

Count = Annotated[int, pydantic.Field(ge=1)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveNumber = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Directory = Annotated[str, pydantic.Field(min_length=1, description="a directory")]
File = Annotated[str, pydantic.Field(min_length=1, description="a file")]
# Checked by parse_dims and by Objective.parse, whose errors say more than a type does.
Width = Annotated[Any, pydantic.Field(description='an integer, or several layers as "1024.2048"')]
Loss = Annotated[Any, pydantic.Field(description=LOSS_FORMS)]
Layers = Annotated[list[NonNegativeInt] | tuple[int, ...], pydantic.Field(description="three integers, [a, b, c]")]
DepthWeights = Annotated[Any, pydantic.Field(description="a list of numbers, reach, gain")]


# Settings that config.json has only where they have another value, or another default: engines may refuse a key that
# they do not know.
OPTIONAL = {"draft_vocab_size": None, "embedding": OWN, "head": OWN, "layer": None}
BOUNDS = {"gt": "> {:g}", "ge": "of at least {:g}", "le": "and at most {:g}"}


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the only type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _text_choices(annotation: Any) -> list[str]:
    """The words that a type accepts anywhere in it, in a list of them as well."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for part in get_args(annotation) for choice in _text_choices(part)]


def describe_values(annotation: Any) -> str:
    """The accepted values of an annotation in words, such as "an integer of at least 1, or null"."""
    ranges, constants = [], []
    for member in _members(annotation):
        if get_origin(member) is Annotated:
            kind, field = get_args(member)
            bounds = [BOUNDS[n].format(getattr(b, n)) for n in BOUNDS for b in field.metadata if hasattr(b, n)]
            ranges.append(field.description or " ".join(["an integer" if kind is int else "a number", *bounds]))
        else:
            constants += {bool: (True, False), NoneType: (None,)}.get(member) or get_args(member)  # or of a Literal
    names = list(map(as_written, constants))
    if ranges:
        return ", or ".join([*ranges, *names])
    if any(isinstance(constant, str) for constant in constants):
        return f"one of {', '.join(names)}"
    return f"{', '.join(names[:-1])} or {names[-1]}"


def as_written(value: Any) -> str:
    """A value as it is written on a command line."""
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def check_value(setting: str, value: Any, annotation: Any) -> None:
    """Check a plain value, not a node of OmegaConf, against a type with pydantic, without converting it.

    The type is `Annotated[…, pydantic.Field(…)]`, `Literal`, `bool`, None, or a union of these.

    Raises:
        UserError: naming the setting, the value received, the values accepted, and the nearest name.
    """
    try:
        pydantic.TypeAdapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        hint = nearest(str(error.errors()[0]["input"]), _text_choices(annotation))
        raise UserError(f"{setting}={as_written(value)}: expected {describe_values(annotation)}{hint}") from None


def parse_dims(setting: str, value: Any) -> tuple[int, ...]:
    """Widths from a single integer or the text `"a.b.c"`. A float is refused: `1024.2560` has lost its last digit.

    Raises:
        UserError: naming the setting (by its full name), the value and what is accepted.
    """
    is_width = isinstance(value, (int, str)) and not isinstance(value, bool)
    parts = str(value).strip().split(".") if is_width else [""]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f'{setting}={value} is no width: expected a positive integer, or several joined by dots such as "1024.2048"'
        )
    return tuple(map(int, parts))


@functools.cache
def _declarations(cls: type) -> dict[str, tuple[Any, str]]:
    """The type and the help of each setting in a dataclass, declared as `Annotated[type, help]`."""
    hints = get_type_hints(cls, include_extras=True).items()
    parts = {name: get_args(hint) for name, hint in hints if get_origin(hint) is Annotated}
    return {name: (Annotated[tuple(kind)] if kind[1:] else kind[0], text) for name, (*kind, text) in parts.items()}


def _check_fields(settings: Any, names: Iterable[str]) -> None:
    for name in names:
        check_value(PREFIX + name, getattr(settings, name), _declarations(type(settings))[name][0])


@dataclass(frozen=True)
class LayerShape:
    """The shape of a decoder layer as Llama has it, in the widths and heads of a base model.

    Attributes:
        head_dim: width of a head.
        rope: `rope_parameters` of transformers.
        positions: the longest sequence.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    positions: int

    @classmethod
    def of(cls, base: Any) -> LayerShape:
        """The shape of a base model's layers, by its Hugging Face configuration.

        Raises:
            UserError: naming what the configuration lacks.
        """
        config = base.get_text_config()
        heads, width = getattr(config, "num_attention_heads", None), config.hidden_size
        head_dim = getattr(config, "head_dim", None) or (heads and width // heads)
        if not heads or not head_dim or head_dim % 2:
            raise UserError(
                f"{PREFIX}method=eagle3: {config.model_type} has num_attention_heads={heads} and head_dim={head_dim}; "
                "expected a base model with attention heads of an even width"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        # A rotation of part of a head, or of several axes, is the base model's own affair.
        known = rope.get("rope_type") in ROPE_TYPES and "mrope_section" not in rope
        return cls(
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * width,
            rms_norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-6),
            rope=dict(rope) if known else {"rope_type": "default", "rope_theta": float(rope.get("rope_theta", 1e4))},
            positions=getattr(config, "max_position_embeddings", None) or DEFAULT_POSITIONS,
        )

    def llama_config(self, hidden_size: int, **more: Any) -> Any:
        """transformers' configuration of a Llama with such layers of width `hidden_size`."""
        from transformers import LlamaConfig

        values = asdict(self)
        rope, positions = dict(values.pop("rope")), values.pop("positions")
        return LlamaConfig(
            hidden_size=hidden_size, rope_parameters=rope, max_position_embeddings=positions, **values, **more
        )


def default_aux_layers(count: int) -> list[int]:
    """EAGLE-3's three of `count` decoder layers, as vLLM chooses them; at equal distances where those are too close.

    Raises:
        UserError: for a base model of a single layer.
    """
    layers = [2, count // 2, count - 3]
    if layers != sorted(set(layers)):
        layers = [int(count * part / 4 + 0.5) for part in (1, 2, 3)]
    if layers != sorted(set(layers)):
        layers = [count - 2, count - 1, count]
    if layers[0] < 0:
        raise UserError(f"{PREFIX}method=eagle3: the base has {count} decoder layer; expected at least 2")
    return layers


@dataclass(frozen=True)
class SpeculatorConfig:
    """The family and the shape of a speculator, the same for training, decoding and serving.

    Settings that the family does not read are reset to their defaults.

    Raises:
        UserError: on construction, for the first setting that cannot be used.
    """

    method: Annotated[Literal[*FAMILIES], "family of the speculator"] = "sum_rnn"
    n_predict: Annotated[Count | None, "number of draft tokens, K"] = None
    draft_vocab_size: Annotated[
        Count | None,
        "number of tokens that can be drafted: all end tokens, and those that the training answers use most; the heads "
        "shrink to them and cost less; null: the whole vocabulary",
    ] = None
    inner_dim: Annotated[
        Width | None,
        "width of the state; medusa: of a bottleneck in each residual block, commonly half the base model's width",
    ] = None
    emb_dim: Annotated[Width | None, "width of the token embedding"] = None
    proj_dim: Annotated[Width | None, "width of the projection of the state, ending in the last width of emb_dim"] = (
        None
    )
    embedding: Annotated[
        Literal[*TABLES] | None,
        "token embedding: own has weights of its own, base starts as the base model's and is trained, base_frozen is "
        "the base model's and not saved; a projection follows where the first width of emb_dim is not the base model's",
    ] = None
    scale_input: Annotated[bool, "normalise the base model's hidden state and divide it by √2 at the first depth"] = (
        False
    )
    tie_weights: Annotated[bool, "share embedding, norm and LM head between the depths; sum_lstm needs true"] = True
    tie_lstm_embs: Annotated[bool, "use one embedding for all four gates"] = False
    num_layers: Annotated[Count, "number of residual blocks of each head; eagle3: of decoder layers"] = 1
    head: Annotated[
        Literal[*TABLES, *HEADS] | None,
        "LM head; sum_rnn, sum_lstm, eagle3: own, base, base_frozen, as for embedding; medusa, whose heads start as "
        "the base model's: copy has one for each depth, shared one for all, frozen_shared one that is never trained",
    ] = None
    hidden_state: Annotated[
        Literal[*HIDDEN_STATES],
        "hidden state of the base model to read: after the final norm, or before it and through a frozen copy of the "
        "norm, for engines that pass on the state before it",
    ] = "post_norm"
    exit_layer: Annotated[
        NonNegativeInt | None, "index of the base model's decoder layer after which the draft exits; must be set"
    ] = None
    trainable: Annotated[Literal[*TRAINABLE], "train the LM head alone, or the exit's decoder layer with it"] = "head"
    aux_layers: Annotated[
        Layers | None,
        "three decoder layers of the base model, of L, whose inputs the draft reads, as [a, b, c]; L is the input of "
        "the final norm; null: [2, L//2, L-3], in a small base model layers at equal distances",
    ] = None
    ttt_steps: Annotated[
        Count | None, "steps of training, each on the draft's own state of the one before; null: n_predict"
    ] = None
    norm_before_residual: Annotated[bool, "add the layer's output to the normalised state instead of the state"] = False
    # Not a setting: the fields of `LayerShape`, which `for_base` takes from the base model.
    layer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_fields(self, ["method"])
        family = FAMILIES[self.method]
        names = self.read_settings(self.method)
        for setting in fields(self):
            if setting.name not in names:
                object.__setattr__(self, setting.name, setting.default)
        names = [name for name in names if name in _declarations(SpeculatorConfig)]
        if self.n_predict is None:
            object.__setattr__(self, "n_predict", family.defaults["n_predict"])
        for name, choices in family.choices.items():
            value = family.defaults[name] if getattr(self, name) is None else getattr(self, name)
            try:
                check_value(PREFIX + name, value, Literal[choices])
            except UserError as error:
                raise UserError(f"{error}, with {PREFIX}method={self.method}") from None
            object.__setattr__(self, name, value)
        _check_fields(self, names)
        self._check_tables()
        if "exit_layer" in names and self.exit_layer is None:
            raise UserError(f"{PREFIX}exit_layer=None: expected a block of the base, an integer of at least 0")
        for name in DIM_KEYS:
            value = family.defaults.get(name) if getattr(self, name) is None else getattr(self, name)
            if value is None:
                continue
            dims = parse_dims(PREFIX + name, value)
            if family.single_widths and len(dims) > 1:
                raise UserError(f"{PREFIX}{name}={value}: {PREFIX}method={self.method} has a single width there")
            object.__setattr__(self, name, dims[0] if len(dims) == 1 else ".".join(map(str, dims)))
        if family.merges_widths and self.emb_dims[-1] != self.proj_dims[-1]:
            raise UserError(
                f"{PREFIX}emb_dim={self.emb_dim} and {PREFIX}proj_dim={self.proj_dim} must end in the same width: "
                f"they are summed there, got {self.emb_dims[-1]} and {self.proj_dims[-1]}"
            )
        if self.aux_layers is not None:
            if len(self.aux_layers) != NUM_AUX_LAYERS or sorted(set(self.aux_layers)) != list(self.aux_layers):
                raise UserError(f"{PREFIX}aux_layers={list(self.aux_layers)}: expected three layers, ascending")
            object.__setattr__(self, "aux_layers", list(self.aux_layers))
        for name, value in family.requires.items():
            if getattr(self, name) != value:
                setting = f"{PREFIX}{name}={as_written(getattr(self, name))}"
                raise UserError(f"{setting}: {PREFIX}method={self.method} needs {PREFIX}{name}={as_written(value)}")

    def _check_tables(self) -> None:
        """Refuse tables of the base model where each depth or gate has a table of its own."""
        for name in self.base_tables:
            setting = f"{PREFIX}{name}={getattr(self, name)}"
            if not self.tie_weights:
                raise UserError(f"{setting}: one table for all depths; expected {PREFIX}tie_weights=true")
            if name == "embedding" and self.method == "sum_lstm" and not self.tie_lstm_embs:
                raise UserError(f"{setting}: one table for all gates; expected {PREFIX}tie_lstm_embs=true")

    @property
    def base_tables(self) -> list[str]:
        """Which of the settings `embedding` and `head` take the base model's table: base or base_frozen."""
        return [name for name in ("embedding", "head") if getattr(self, name) in TABLES[1:]]

    @property
    def frozen_tables(self) -> list[str]:
        """Which of them use it as it is: base_frozen."""
        return [name for name in self.base_tables if getattr(self, name) != BASE]

    @property
    def inner_dims(self) -> tuple[int, ...]:
        """Widths of the inner chain, outermost last."""
        return parse_dims(PREFIX + "inner_dim", self.inner_dim)

    @property
    def emb_dims(self) -> tuple[int, ...]:
        """Widths of the embedding chain; the last is the merge width M."""
        return parse_dims(PREFIX + "emb_dim", self.emb_dim)

    @property
    def proj_dims(self) -> tuple[int, ...]:
        """Widths of the projection chain; the last is the merge width M."""
        return parse_dims(PREFIX + "proj_dim", self.proj_dim)

    @property
    def needs_base_modules(self) -> bool:
        """Whether it copies the final norm or a decoder layer of the base model, or reads the state between layers."""
        reads_layers = self.exit_layer is not None or FAMILIES[self.method].reads_sequence
        return self.hidden_state == "pre_norm" or reads_layers

    @property
    def depths(self) -> int:
        """Depths in training: `ttt_steps` or K, or 1 for a family that is trained one token at a time."""
        return 1 if FAMILIES[self.method].single_depth else self.ttt_steps or self.n_predict

    @property
    def drafts_trees(self) -> bool:
        """Whether several drafts may follow the same draft token."""
        return not FAMILIES[self.method].single_depth

    @property
    def reads_sequence(self) -> bool:
        """Whether a draft reads the states of all positions, `Family.reads_sequence`."""
        return FAMILIES[self.method].reads_sequence

    @property
    def cached_states(self) -> int:
        """How many hidden states of a position a cache keeps: those that the draft reads, and with several the one that
        the LM head reads."""
        return NUM_AUX_LAYERS + 1 if self.reads_sequence else 1

    @property
    def first_offset(self) -> int:
        """How many tokens ahead the first prediction lies, `Family.first_offset`."""
        return FAMILIES[self.method].first_offset

    def for_base(self, base: Any) -> SpeculatorConfig:
        """With what a family takes from the base model's Hugging Face configuration: `aux_layers` and `layer`.

        Raises:
            UserError: for layers that the base model does not have, or if it has no attention heads to go by.
        """
        if not FAMILIES[self.method].reads_sequence:
            return self
        count = base.get_text_config().num_hidden_layers
        self.check_blocks(count)
        layers = default_aux_layers(count) if self.aux_layers is None else self.aux_layers
        layer = asdict(LayerShape.of(base)) if self.layer is None else self.layer
        return replace(self, aux_layers=layers, layer=layer)

    def check_blocks(self, count: int) -> None:
        """Refuse an `exit_layer` or `aux_layers` that a base model with `count` decoder layers does not have.

        Raises:
            UserError: naming both numbers.
        """
        if self.exit_layer is not None and self.exit_layer >= count:
            expected = f"expected 0 to {count - 1}"
            raise UserError(f"{PREFIX}exit_layer={self.exit_layer}: the base has {count} blocks; {expected}")
        if self.aux_layers is not None and self.aux_layers[-1] > count:
            expected = f"expected 0 to {count}, where {count} is the input of the final norm"
            raise UserError(f"{PREFIX}aux_layers={self.aux_layers}: the base has {count} decoder layers; {expected}")

    @staticmethod
    def read_settings(method: str) -> tuple[str, ...]:
        """The settings that a family reads."""
        return ("method", "n_predict", "draft_vocab_size", *FAMILIES[method].settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings that the family reads: a single width as an integer, several as dotted text. Those that are not
        part of every checkpoint are left out at their default."""
        values = {name: getattr(self, name) for name in self.read_settings(self.method)}
        defaults = FAMILIES[self.method].defaults
        usual = {name: value for name, value in OPTIONAL.items() if value == defaults.get(name)}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    def differences(self, other: SpeculatorConfig) -> list[str]:
        """Settings in which two configurations differ, as `name (self's value, other's value)`."""
        left, right = self.to_dict(), other.to_dict()
        names = dict.fromkeys([*left, *right])
        return [f"{n} ({left.get(n)}, {right.get(n)})" for n in names if left.get(n) != right.get(n)]


@dataclass(frozen=True)
class SpeculatorTraining:
    """How a speculator is trained.

    Attributes:
        objective: what `loss`, `kl_temperature`, `lk_eta` and `depth_weights` say together.

    Raises:
        UserError: on construction, for the first setting that cannot be used.
    """

    path: Annotated[Directory | None, "checkpoint of a speculator to start from, or a run (its latest step)"] = None
    detach_hidden: Annotated[
        bool, "joint training: stop the speculator's gradient at the base model's hidden states"
    ] = False
    draft_vocab_file: Annotated[
        File | None, "draft vocabulary of another run, its draft_vocabulary.json, instead of a count of the answers"
    ] = None
    init: Annotated[
        Literal["random", "base"] | None,
        "initial weights; base copies embeddings and LM heads from the base model, whose width the first emb_dim and "
        "the last inner_dim must then have",
    ] = None
    loss: Annotated[Loss, "loss to minimise"] = "ce"
    kl_temperature: Annotated[
        PositiveNumber, "kl: temperature T of both distributions; the loss is multiplied by T²"
    ] = 1.0
    lk_eta: Annotated[PositiveNumber | None, "lk: how fast it turns from KL to TV as acceptance grows"] = None
    depth_weights: Annotated[
        DepthWeights | None,
        "weight of each depth, [w0, w1, ...]; or of each pair of row and depth: reach is the probability that drafting "
        "gets there, gain what its acceptance adds to the expected number of accepted tokens; null weighs all alike",
    ] = None
    loss_chunk_rows: Annotated[
        Count | None, "rows that pass through LM head and loss at a time; null chooses a number that bounds the memory"
    ] = None
    compile: Annotated[
        bool | None, "torch.compile the training; null: on CUDA, and not on a CPU, where it needs a C++ compiler"
    ] = None
    lr: Annotated[
        PositiveNumber | None, "learning rate of the speculator, on the optimizer's schedule; null: optim.lr"
    ] = None
    train: Annotated[
        bool | None, "PPO: whether the actor's update trains the speculator too; null: false. SFT always trains it"
    ] = None
    objective: Objective = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_fields(self, _declarations(SpeculatorTraining))
        names = ("loss", "kl_temperature", "lk_eta", "depth_weights")
        objective = Objective.parse(**{name: getattr(self, name) for name in names}, prefix=PREFIX)
        object.__setattr__(self, "objective", objective)


@dataclass(frozen=True)
class SpeculatorSettings:
    """The `model.speculator.*` keys of a run, parsed."""

    config: SpeculatorConfig
    training: SpeculatorTraining

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SpeculatorSettings:
        """Parse a mapping of `model.speculator.*` keys.

        Raises:
            UserError: for an unknown key or a value that cannot be used.
        """
        check_setting_names(values)
        values = _with_file_size(values)
        config = SpeculatorConfig(**_select(SpeculatorConfig, values))
        defaults = dict(FAMILIES[config.method].defaults)
        for name in config.base_tables:
            if values.get("init") == "random":
                setting = f"{PREFIX}{name}={getattr(config, name)}"
                raise UserError(f"{PREFIX}init=random: {setting} starts as the base model's; expected init=null")
            defaults.pop("init", None)
        values = {**values, **{name: value for name, value in defaults.items() if values.get(name) is None}}
        training = SpeculatorTraining(**_select(SpeculatorTraining, values))
        training.objective.depths(config.depths, prefix=PREFIX)
        if training.init == "random" and config.head == "frozen_shared":
            raise UserError(f"{PREFIX}init=random: {PREFIX}head=frozen_shared never learns; expected {PREFIX}init=base")
        return cls(config, training)

    def to_dict(self) -> dict[str, Any]:
        """The keys that the family reads, with its defaults, in plain values."""
        return self.config.to_dict() | {n: getattr(self.training, n) for n in _declarations(SpeculatorTraining)}


def _with_file_size(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with `draft_vocab_size` as `draft_vocab_file` has it."""
    file, size = values.get("draft_vocab_file"), values.get("draft_vocab_size")
    if file is None:
        return values
    if values.get("path") is not None:
        raise UserError(
            f"{PREFIX}draft_vocab_file={file}: a trained speculator keeps its draft vocabulary; expected null with "
            f"{PREFIX}path"
        )
    check_value(f"{PREFIX}draft_vocab_file", file, File)
    tokens = len(DraftVocabulary.read(file).tokens)
    if size not in (None, tokens):
        raise UserError(f"{PREFIX}draft_vocab_size={size}: {file} has {tokens} tokens; expected that number, or null")
    return {**values, "draft_vocab_size": tokens}


def _select(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _declarations(cls) if name in values}


def known_settings() -> dict[str, Any]:
    """The default of every `model.speculator.*` key, in the order of the documentation."""
    return {name: getattr(cls, name) for cls in (SpeculatorConfig, SpeculatorTraining) for name in _declarations(cls)}


def check_setting_names(names: Iterable[str]) -> None:
    """Refuse a `model.speculator.*` key that does not exist, with the nearest one that does.

    Raises:
        UserError: for the first unknown name.
    """
    known = known_settings()
    for name in names:
        if name not in known:
            settings = ", ".join(PREFIX + setting for setting in known)
            raise UserError(f"{PREFIX}{name} is not a setting{nearest(name, known)}; known: {settings}")


def ignored_settings(values: Mapping[str, Any]) -> list[str]:
    """`name=value` of the keys that are set in a mapping and not read by the family that it names."""
    read = SpeculatorConfig.read_settings(values.get("method", "sum_rnn"))
    return [
        f"{PREFIX}{f.name}={values[f.name]}"
        for f in fields(SpeculatorConfig)
        if f.name not in read and values.get(f.name, f.default) != f.default
    ]


def setting_families(name: str) -> tuple[str, ...]:
    """The families that read a setting."""
    is_shape = name in _declarations(SpeculatorConfig)
    return tuple(m for m in FAMILIES if not is_shape or name in SpeculatorConfig.read_settings(m))


def describe_setting(name: str) -> tuple[str, str]:
    """The accepted values of a setting, and its help with what null means where families have their own defaults."""
    kind, text = (_declarations(SpeculatorConfig) | _declarations(SpeculatorTraining))[name]
    methods: dict[Any, list[str]] = {}
    for method, family in FAMILIES.items():
        if name in family.defaults:
            methods.setdefault(family.defaults[name], []).append(method)
    defaults = (f"{'none' if value is None else value} for {', '.join(names)}" for value, names in methods.items())
    return describe_values(kind), f"{text}; null: {', '.join(defaults)}" if methods else text


def summarise_setting(name: str) -> str:
    """Families, help and accepted values of a setting in a line, for the YAML and `--help`."""
    families, (values, text) = setting_families(name), describe_setting(name)
    readers = "" if len(families) == len(FAMILIES) else f"{', '.join(families)}: "
    return f"{readers}{text} ({values})"
