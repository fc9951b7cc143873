"""Early exit: the draft is the base itself, cut behind one of its blocks, with an output head of its own.

It reads every token, so it has what the other families lack, the sequence; and it lives in the base, which shares
weights and cache with it. The speculator holds only what is the draft's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from verl_speculator.base_model.hidden_states import BLOCK_INPUT, BLOCK_OUTPUT, BlockCall, FrozenNorm, block_of
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models.layers import OutputHead
from verl_speculator.models.speculator import DraftState, Speculator
from verl_speculator.utils.errors import UserError


class ParameterTree(nn.Module):
    """Parameters under dotted names, without the code that uses them.

    Args:
        shapes: of each.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]
            place.register_parameter(last, nn.Parameter(torch.empty(tuple(shape))))


class EarlyExit(Speculator):
    """logits = W · norm(h), h being the state behind block ℓ, or behind a trained copy of that block.

    Trained at one depth: row t against the base's own distribution of the token behind it. The norm is a frozen copy of
    the base's final one.
    """

    method = "early_exit"
    reads_tokens: ClassVar[bool] = False
    keeps_head_scale: ClassVar[bool] = True

    def __init__(
        self,
        config: SpeculatorConfig,
        *,
        hidden_size: int,
        vocab_size: int,
        block_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        self.norm = FrozenNorm(hidden_size)
        # Not lm_head: verl makes every module of that name a sharding unit of its own.
        self.exit_head = OutputHead(vocab_size, hidden_size)
        self.block = None
        if config.trainable == "head_and_block":
            if not block_shapes:
                raise ValueError("trainable=head_and_block: block_shapes of the base's block are needed")
            self.block = ParameterTree(block_shapes)
        # The code of the block, with its parameters on the meta device; not a module of ours.
        self.__dict__["_code"] = None

    @property
    def hidden_state_source(self) -> str:
        return f"{BLOCK_OUTPUT if self.block is None else BLOCK_INPUT}.{self.config.exit_layer}"

    @property
    def shared_blocks(self) -> int:
        """How many of the base's first blocks the draft uses as they are."""
        return self.config.exit_layer + (self.block is None)

    def attach(self, base: nn.Module) -> None:
        """Take the block's code from a base.

        Raises:
            UserError: for a base whose block has other parameters.
        """
        block = block_of(base, self.config.exit_layer)
        if self.block is None or self._code is not None:
            return
        theirs = {name: list(p.shape) for name, p in block.named_parameters()}
        mine = {name: list(p.shape) for name, p in self.block.named_parameters()}
        for name in {**mine, **theirs}:
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"model.speculator.exit_layer={self.config.exit_layer}: {name} of the trained block is "
                    f"{mine.get(name)}, the base's {theirs.get(name)}"
                )
        # A block's copy is as large as the block: share the tensors while copying, then let go of them.
        code = copy.deepcopy(block, {id(p): p for p in block.parameters()})
        for module in code.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                hooks.clear()
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self.__dict__["_code"] = code

    @torch.no_grad()
    def copy_block(self, base: nn.Module) -> None:
        """Start the block as the base's own."""
        if self.block is not None:
            own = dict(self.block.named_parameters())
            for name, parameter in block_of(base, self.config.exit_layer).named_parameters():
                own[name].copy_(parameter)

    def run_block(self, state: Tensor, **arguments: object) -> Tensor:
        """The trained block on a state [B, T, D], called as the base calls its own."""
        output = functional_call(self._code, dict(self.block.named_parameters()), (state,), arguments)
        return output if isinstance(output, Tensor) else output[0]

    def prepare_hidden_states(self, taken: Tensor | BlockCall) -> Tensor:
        if self.block is None:
            return taken
        state = taken.state.to(next(self.block.parameters()).dtype)
        return self.run_block(state, **taken.arguments)

    def unroll_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("block.")}

    def start(self, hidden: Tensor) -> DraftState:
        return DraftState(hidden, None, 0)

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        return DraftState(self.norm(state.output), None, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self.exit_head.weight

    def frozen(self) -> frozenset[str]:
        return frozenset(("norm.weight", "norm.eps"))

    def constants(self) -> dict[str, float]:
        """The norm alone: head and block start as the base's."""
        return {"norm.weight": 1.0, "norm.eps": 1e-6}
