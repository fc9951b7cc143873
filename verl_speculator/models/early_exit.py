"""Early exit: the draft is the base model cut after one of its decoder layers, with an LM head of its own.

It reads every token, and shares decoder layers and KV cache with the base model in decoding
(`decoding.self_speculative`). The speculator holds only the parameters that are the draft's own.
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
from verl_speculator.models.layers import NORM_CONSTANTS, OutputHead
from verl_speculator.models.speculator import DraftState, Speculator, TokenBatch
from verl_speculator.utils.settings import UserError


def parameter_tree(shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Modules that hold parameters under these dotted names, without the code that uses them."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(torch.empty(tuple(shape))))
    return root


class EarlyExit(Speculator):
    """logits = W · norm(h), where h is the output of decoder layer ℓ, or of a trained copy of that layer ("block").

    Trained at one depth: row t against the base model's distribution of token t + 1. The norm is a frozen copy of the
    final norm.
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
        # Not `lm_head`: verl makes every module of that name a sharding unit.
        self.exit_head = OutputHead(self.head_size, hidden_size)
        self.block = None
        if config.trainable == "head_and_block":
            if not block_shapes:
                raise ValueError("trainable=head_and_block: needs block_shapes, the base model's parameter shapes")
            self.block = parameter_tree(block_shapes)
        # The decoder layer's code, with its parameters on the meta device. Set past nn.Module, so it is no submodule.
        self.__dict__["_code"] = None

    @property
    def hidden_state_source(self) -> str:
        return f"{BLOCK_OUTPUT if self.block is None else BLOCK_INPUT}.{self.config.exit_layer}"

    @property
    def shared_layers(self) -> int:
        return self.config.exit_layer + (self.block is None)

    def attach(self, base: nn.Module, *, tables: bool = True) -> None:
        """Take the decoder layer's code from a base model.

        Raises:
            UserError: if the base model has no such layer, or its parameters differ from the trained copy's.
        """
        layer = block_of(base, self.config.exit_layer)
        if self.block is None or self._code is not None:
            return
        trained, expected = ({n: list(p.shape) for n, p in m.named_parameters()} for m in (self.block, layer))
        for name in {**trained, **expected}:
            if trained.get(name) != expected.get(name):
                raise UserError(
                    f"model.speculator.exit_layer={self.config.exit_layer}: {name} of the trained block is "
                    f"{trained.get(name)}, the base's {expected.get(name)}"
                )
        # The memo makes deepcopy share the tensors; the copy then drops them, so the layer is never held twice.
        code = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
        for module in code.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        self.__dict__["_code"] = code

    @torch.no_grad()
    def copy_block(self, base: nn.Module) -> None:
        if self.block is not None:
            trained = dict(self.block.named_parameters())
            for name, parameter in block_of(base, self.config.exit_layer).named_parameters():
                trained[name].copy_(parameter)

    def run_block(self, state: Tensor, **arguments: object) -> Tensor:
        """The trained layer's output for a state [B, T, D] and the arguments of the base model's own call."""
        output = functional_call(self._code, dict(self.block.named_parameters()), (state,), arguments)
        return output if isinstance(output, Tensor) else output[0]

    def draft_states(
        self,
        taken: Tensor | BlockCall,
        tokens: Tensor,
        batch: TokenBatch,
        tables: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if self.block is not None:
            taken = self.run_block(taken.state.to(next(self.block.parameters()).dtype), **taken.arguments)
        return super().draft_states(taken, tokens, batch)

    def unroll_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("block.")}

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        return DraftState(self.norm(state.output), None, state.depth + 1)

    def head(self, depth: int) -> Tensor:
        return self.exit_head.weight

    def frozen(self) -> frozenset[str]:
        return frozenset(NORM_CONSTANTS)

    def constants(self) -> dict[str, float]:
        """The norm alone: head and block are copied from the base model."""
        return dict(NORM_CONSTANTS)
