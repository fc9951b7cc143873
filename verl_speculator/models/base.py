"""The contract that every family keeps. Models compute; they never see a loss or an optimizer."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.config import SpeculatorConfig


class Slot(NamedTuple):
    """Where a tensor of a checkpoint lives in the module.

    Attributes:
        parameter: name of the parameter.
        part: (axis, start, length) of the tensor within it; None for all of it. Tensors that one product or one lookup
            serves are parts of one parameter, and stand apart on disk only.
    """

    parameter: str
    part: tuple[int, int, int] | None = None

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """A view of the tensor in a module's state."""
        whole = state[self.parameter]
        return whole if self.part is None else whole.narrow(*self.part)


class DraftState(NamedTuple):
    """What a draft carries from one depth to the next.

    Attributes:
        output: [T, E] the state that the depth's head reads; [T, D] the base's hidden state before the first step.
        cell: [T, M] the memory of families that have one, None otherwise.
        depth: the depth that the next step will be.
    """

    output: Tensor
    cell: Tensor | None
    depth: int


def _constant(name: str) -> float:
    """What a parameter that is no matrix starts as: a norm's weight or a bias."""
    return 0.0 if name.endswith("bias") else 1.0


class Speculator(nn.Module, abc.ABC):
    """A draft model that lives on one hidden state of the base.

    Shapes: T rows, K depths, D base width, E speculator width, V vocabulary.

    Args:
        config: family and shape.
        hidden_size: D.
        vocab_size: V, the rows of the base's output head.
    """

    method: ClassVar[str]
    reads_tokens: ClassVar[bool] = True
    """Whether `step` looks at its token; a family that does not says the same after any of them."""

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size

    @property
    def n_predict(self) -> int:
        """K."""
        return self.config.n_predict

    def start(self, hidden: Tensor) -> DraftState:
        """The state before the first step, from the base's hidden state [T, D] after its final norm."""
        return DraftState(hidden, None, 0)

    @abc.abstractmethod
    def step(self, state: DraftState, token: Tensor) -> DraftState:
        """One depth on: `token` [T] is the newest token. `head(state.depth)` of the state given reads the output of the
        state returned."""

    @abc.abstractmethod
    def head(self, depth: int) -> Tensor:
        """[V, E] the weight whose product with the depth's state gives its logits."""

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """All depths at once, for training.

        Args:
            hidden: [T, D] the base's hidden state at position t, after its final norm.
            tokens: [T, K] the tokens x_{t+1} … x_{t+K}.

        Returns:
            [K, T, E] the state of every depth; `states[k] @ head(k).T` are its logits.
        """
        state, outputs = self.start(hidden), []
        for token in tokens.unbind(1):
            state = self.step(state, token)
            outputs.append(state.output)
        return torch.stack(outputs)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """`unroll`, under the name by which torch calls a module with other parameters."""
        return self.unroll(hidden, tokens)

    def checkpoint_slots(self) -> dict[str, Slot]:
        """Every tensor name of a checkpoint, with the place in the module that holds it.

        A tied tensor stands under each of its names; the first of them is the one whose value is loaded.
        """
        return {name: Slot(name) for name, _ in self.named_parameters()}

    def is_untrained(self) -> bool:
        """Whether it holds what `reset_parameters` gave it: every constant is still exactly the constant.

        The first optimizer step moves every norm, whatever the seed of the matrices was.
        """
        constants = [(name, p) for name, p in self.named_parameters() if p.dim() == 1]
        return all(bool((p == _constant(name)).all()) for name, p in constants)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices N(0, 1/√min(shape)); norms 1 and 0 (Snowflake's initialisation)."""
        state = dict(self.named_parameters())
        for slot in dict.fromkeys(self.checkpoint_slots().values()):
            tensor = slot.of(state)
            if tensor.dim() == 2:
                std = 1 / math.sqrt(min(tensor.shape))
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
            else:
                tensor.fill_(_constant(slot.parameter))
