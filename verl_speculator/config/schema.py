"""Every `model.speculator.*` setting: frozen, validated once, with its help beside it. Imports no torch, no verl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from verl_speculator.config.families import FAMILIES, HEADS, HIDDEN_STATES, TRAINABLE
from verl_speculator.config.objective import LOSSES, Objective, is_number
from verl_speculator.utils.errors import UserError, nearest

PREFIX = "model.speculator."
DIM_KEYS = ("inner_dim", "emb_dim", "proj_dim")


def parse_dims(setting: str, value: Any) -> tuple[int, ...]:
    """Widths from a single integer or the text `"a.b.c"`.

    Args:
        setting: the full name of the setting, for the error message.
        value: an int, or a string of positive integers joined by dots. A float is refused: `1024.2560` has become
            1024.256 by the time it is one, so what was meant can't be told.

    Raises:
        UserError: naming the setting, the value and what is accepted.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        parts = [str(value)]
    elif isinstance(value, str):
        parts = value.strip().split(".")
    else:
        parts = [""]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f'{setting}={value} is no width: expected a positive integer, or several joined by dots such as "1024.2048"'
        )
    return tuple(int(part) for part in parts)


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True)
class SpeculatorConfig:
    """What a speculator is: its family and its shape. The same for training, decoding and serving.

    Raises:
        UserError: on construction, for the first setting that cannot be used.
    """

    method: str = _setting("sum_rnn", "family of the speculator: " + ", ".join(FAMILIES))
    n_predict: int = _setting(5, "number of draft tokens, K")
    inner_dim: int | str | None = _setting(None, 'width of the state, or several layers as "a.b.c"')
    emb_dim: int | str | None = _setting(None, 'width of the token embedding, or several layers as "a.b.c"')
    proj_dim: int | str | None = _setting(None, 'width of the state projection, or several layers as "a.b.c"')
    scale_input: bool = _setting(False, "normalise the base's hidden state and divide it by sqrt(2) at the first step")
    tie_weights: bool = _setting(True, "share embedding, norm and head between the depths")
    tie_lstm_embs: bool = _setting(False, "sum_lstm: one embedding for all four gates")
    num_layers: int = _setting(1, "medusa: residual blocks of each head")
    head: str = _setting(
        "copy", "medusa: " + ", ".join(HEADS) + ": a head of its own for each depth, one, or one at rest"
    )
    hidden_state: str = _setting(
        "post_norm", "medusa: " + ", ".join(HIDDEN_STATES) + ": which of the base's states it reads"
    )
    exit_layer: int | None = _setting(None, "early_exit: the base's block that the draft leaves behind, from 0")
    trainable: str = _setting("head", "early_exit: what learns, " + " or ".join(TRAINABLE))

    def __post_init__(self) -> None:
        if self.method not in FAMILIES:
            raise UserError(
                f"{PREFIX}method={self.method}: expected one of {', '.join(FAMILIES)}"
                + nearest(str(self.method), FAMILIES)
            )
        family = FAMILIES[self.method]
        for setting in fields(self):
            if setting.name not in self.read_settings(self.method):
                object.__setattr__(self, setting.name, setting.default)
        for name in ("n_predict", "num_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{PREFIX}{name}={value}: expected an integer of at least 1")
        for name in ("scale_input", "tie_weights", "tie_lstm_embs"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{PREFIX}{name}={getattr(self, name)}: expected true or false")
        for name, known in (("head", HEADS), ("hidden_state", HIDDEN_STATES), ("trainable", TRAINABLE)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"{PREFIX}{name}={value}: expected one of {', '.join(known)}{nearest(str(value), known)}"
                )
        layer = self.exit_layer
        if "exit_layer" in family.settings and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise UserError(f"{PREFIX}exit_layer={layer}: expected a block of the base, an integer of at least 0")
        for name, default in family.dim_defaults.items():
            value = getattr(self, name) if getattr(self, name) is not None else default
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
        for name, needed in family.requires.items():
            if getattr(self, name) != needed:
                raise UserError(
                    f"{PREFIX}{name}={str(getattr(self, name)).lower()}: {PREFIX}method={self.method} "
                    f"needs {PREFIX}{name}={str(needed).lower()}"
                )

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
        """Whether it copies a norm or a block of the base, and so needs a base that has one where it is looked for."""
        return self.hidden_state == "pre_norm" or self.exit_layer is not None

    @property
    def depths(self) -> int:
        """Depths that training knows: K, or 1 for a family that is trained one token at a time."""
        return 1 if FAMILIES[self.method].single_depth else self.n_predict

    @property
    def drafts_trees(self) -> bool:
        """Whether several drafts may follow the same one: of families that live on one state."""
        return not FAMILIES[self.method].single_depth

    @property
    def first_offset(self) -> int:
        """How many tokens ahead the first prediction lies, `Family.first_offset`."""
        return FAMILIES[self.method].first_offset

    def check_blocks(self, count: int) -> None:
        """Refuse a block that a base with so many does not have.

        Raises:
            UserError: naming both numbers.
        """
        if self.exit_layer is not None and self.exit_layer >= count:
            raise UserError(
                f"{PREFIX}exit_layer={self.exit_layer}: the base has {count} blocks; expected 0 to {count - 1}"
            )

    @staticmethod
    def read_settings(method: str) -> tuple[str, ...]:
        """The settings that a family reads; all others are ignored."""
        return ("method", "n_predict", *FAMILIES[method].settings)

    def to_dict(self) -> dict[str, Any]:
        """What the family reads, in plain values: several widths as the dotted text, a single one as an integer."""
        return {name: getattr(self, name) for name in self.read_settings(self.method)}

    def differences(self, other: SpeculatorConfig) -> list[str]:
        """Settings in which two configurations differ, as `name (self's value, other's value)`."""
        mine, theirs = self.to_dict(), other.to_dict()
        names = dict.fromkeys([*mine, *theirs])
        return [f"{n} ({mine.get(n)}, {theirs.get(n)})" for n in names if mine.get(n) != theirs.get(n)]


@dataclass(frozen=True)
class SpeculatorTraining:
    """How a speculator is trained: what the command line sets beside its shape."""

    path: str | None = _setting(None, "trained speculator to start from: a checkpoint, or a run (its latest step)")
    detach_hidden: bool = _setting(False, "joint training: keep the speculator's gradient away from the base")
    init: str | None = _setting(None, "random, or base: tables and heads from the base's own; null: the family's own")
    loss: Any = field(
        default="ce",
        metadata={"help": f"what is minimised: {', '.join(LOSSES)}, or weights such as {{ce: 0.1, kl: 1.0}}"},
    )
    kl_temperature: float = _setting(1.0, "kl: softens both distributions; the loss is multiplied by its square")
    lk_eta: float | None = _setting(
        None, "lk: how fast it turns from KL to TV as acceptance grows; null: 10 for medusa, 3 for the others"
    )
    depth_weights: Any = field(
        default=None,
        metadata={"help": "weight of each depth's loss, [w0, w1, ...], or of each pair: reach, gain"},
    )
    loss_chunk_rows: int | None = _setting(None, "rows that go through head and loss at a time; null bounds the memory")
    compile: bool | None = _setting(None, "fuse the speculator's training with torch.compile; null: on CUDA")
    lr: float | None = _setting(None, "learning rate of the speculator; null: the optimizer's, optim.lr")
    train: bool | None = _setting(None, "PPO: the actor's update trains it too; null: no. SFT always trains it")

    def __post_init__(self) -> None:
        if not isinstance(self.detach_hidden, bool):
            raise UserError(f"{PREFIX}detach_hidden={self.detach_hidden}: expected true or false")
        if self.path is not None and not isinstance(self.path, str):
            raise UserError(f"{PREFIX}path={self.path}: expected a directory")
        if self.init not in (None, "random", "base"):
            raise UserError(
                f"{PREFIX}init={self.init}: expected random, base or null{nearest(str(self.init), ('random', 'base'))}"
            )
        rows = self.loss_chunk_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise UserError(f"{PREFIX}loss_chunk_rows={rows}: expected an integer of at least 1, or null")
        if self.compile is not None and not isinstance(self.compile, bool):
            raise UserError(f"{PREFIX}compile={self.compile}: expected true, false or null")
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise UserError(f"{PREFIX}lr={self.lr}: expected a number > 0, or null")
        if self.train is not None and not isinstance(self.train, bool):
            raise UserError(f"{PREFIX}train={self.train}: expected true, false or null")
        if self.depth_weights is not None and not isinstance(self.depth_weights, Sequence):
            raise UserError(
                f"{PREFIX}depth_weights={self.depth_weights}: expected a list of numbers, reach, gain, or null"
            )
        self.objective  # noqa: B018

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective.parse(
            self.loss,
            prefix=PREFIX,
            kl_temperature=self.kl_temperature,
            lk_eta=self.lk_eta,
            depth_weights=self.depth_weights,
        )


def known_settings() -> dict[str, Field]:
    """Every `model.speculator.*` key with its dataclass field, in the order of the documentation."""
    return {f.name: f for cls in (SpeculatorConfig, SpeculatorTraining) for f in fields(cls)}


def default_of(setting: Field) -> Any:
    """The default of a field from `known_settings`."""
    return None if setting.default is MISSING else setting.default


def check_setting_names(names: Any) -> None:
    """Refuse a `model.speculator.*` key that does not exist, with the nearest one that does.

    Raises:
        UserError: for the first unknown name.
    """
    known = known_settings()
    for name in names:
        if name not in known:
            raise UserError(
                f"{PREFIX}{name} is not a setting{nearest(name, known)}; known: {', '.join(PREFIX + k for k in known)}"
            )


def split_settings(values: Mapping[str, Any]) -> tuple[SpeculatorConfig, SpeculatorTraining]:
    """The two configurations from one mapping of `model.speculator.*` keys.

    Raises:
        UserError: for an unknown key or a value that cannot be used.
    """
    check_setting_names(values)
    shape, training = (
        cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        for cls in (SpeculatorConfig, SpeculatorTraining)
    )
    training.objective.depths(shape.depths, prefix=PREFIX)
    family = FAMILIES[shape.method]
    eta = family.lk_eta if training.lk_eta is None else training.lk_eta
    training = replace(training, init=training.init or family.init, lk_eta=eta)
    if training.init == "random" and shape.head == "frozen_shared":
        raise UserError(f"{PREFIX}init=random: {PREFIX}head=frozen_shared never learns; expected {PREFIX}init=base")
    return shape, training


def ignored_settings(values: Mapping[str, Any]) -> list[str]:
    """`name=value` of what is set in a mapping of `model.speculator.*` keys and not read by the family it names."""
    read = SpeculatorConfig.read_settings(values.get("method", "sum_rnn"))
    return [
        f"{PREFIX}{f.name}={values[f.name]}"
        for f in fields(SpeculatorConfig)
        if f.name not in read and values.get(f.name, f.default) != f.default
    ]
