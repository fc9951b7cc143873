"""The contract that every family keeps. Models compute; they never see a loss or an optimizer."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import POST_NORM
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.logits import soft_cap


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
        cell: [T, M] what else a family carries on: a memory, or the base's state itself. None where there is none.
        depth: the depth that the next step will be.
    """

    output: Tensor
    cell: Tensor | None
    depth: int


class Speculator(nn.Module, abc.ABC):
    """A draft model that lives on one hidden state of the base.

    Shapes: T rows, K depths, D base width, E speculator width, V vocabulary.

    Args:
        config: family and shape.
        hidden_size: D.
        vocab_size: V, the rows of the base's output head.
    """

    method: ClassVar[str]
    # Whether a depth's state depends on the tokens before it.
    reads_tokens: ClassVar[bool] = True
    # Whether its heads read states like the base's: one that starts from the base's own keeps its scale, the base's
    # logit scale included, and its logits have the base's soft cap.
    keeps_head_scale: ClassVar[bool] = False
    # The soft cap of its logits, of families with `keeps_head_scale` alone. A cap is not linear: no head can hold it.
    logit_cap: float | None = None

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size

    @property
    def n_predict(self) -> int:
        """K."""
        return self.config.n_predict

    @property
    def hidden_state_source(self) -> str:
        """Which of the base's states it starts from (`models.hidden_state`)."""
        return POST_NORM

    @property
    def depths(self) -> int:
        """Depths that training knows, and `unroll` gives."""
        return self.config.depths

    @property
    def shared_blocks(self) -> int | None:
        """How many of the base's first blocks it drafts with, reading every token; None if it lives on one state."""
        return None

    def attach(self, base: nn.Module) -> None:
        """Take what it needs of a base beyond its states, before anything runs."""

    def copy_block(self, base: nn.Module) -> None:
        """Start from a block of the base, where it has one of its own."""

    def prepare_hidden_states(self, taken: Any) -> Tensor:
        """[B, T, D] the states that `unroll` reads, from what `HiddenStateHook` took: the same ones, unless the family
        needs the sequence."""
        return taken

    def unroll_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that `unroll` and `head` use, by name."""
        return dict(self.named_parameters())

    def start(self, hidden: Tensor) -> DraftState:
        """The state before the first step, from the base model's hidden state [T, D] (see `hidden_state_source`)."""
        return DraftState(hidden, None, 0)

    @abc.abstractmethod
    def step(self, state: DraftState, token: Tensor) -> DraftState:
        """One depth on: `token` [T] is the newest token. `head(state.depth)` of the state given reads the output of the
        state returned."""

    @abc.abstractmethod
    def head(self, depth: int) -> Tensor:
        """[V, E] the weight whose product with the depth's state gives its logits, before a soft cap."""

    def logits(self, depth: int, states: Tensor) -> Tensor:
        """[..., V] logits of a depth's states [..., E], for decoding and measuring; `unroll` never gives any."""
        return soft_cap(states @ self.head(depth).T, self.logit_cap)

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """All depths at once, for training.

        Args:
            hidden: [T, D] the base's hidden state at position t, the one that `hidden_state_source` names.
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

    def frozen(self) -> frozenset[str]:
        """Parameters that are saved and never trained."""
        return frozenset()

    def constants(self) -> dict[str, float]:
        """Parameters that start as one number."""
        return {n: 0.0 if n.endswith("bias") else 1.0 for n, p in self.named_parameters() if p.dim() == 1}

    def is_untrained(self) -> bool:
        """Whether it holds what `reset_parameters` gave it: every constant is still exactly the constant.

        The first optimizer step moves every norm, whatever the seed of the matrices was. False where nothing that
        learns starts as a constant: it cannot be told then.
        """
        told = {name: value for name, value in self.constants().items() if name not in self.frozen()}
        return bool(told) and all(bool((self.get_parameter(name) == value).all()) for name, value in told.items())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """`constants`, and matrices N(0, 1/√min(shape)) (Snowflake's initialisation)."""
        state, constants = dict(self.named_parameters()), self.constants()
        for slot in dict.fromkeys(self.checkpoint_slots().values()):
            tensor = slot.of(state)
            if slot.parameter in constants:
                tensor.fill_(constants[slot.parameter])
            elif tensor.dim() < 2:
                tensor.zero_()
            else:
                std = 1 / math.sqrt(min(tensor.shape))
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
