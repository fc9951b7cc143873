"""A draft that is a part of the base: its first blocks, on the base's own cache.

The front (the first blocks, and the draft's own behind them) reads a token once, when it is drafted from; the back (all
blocks behind the front) reads the states that the front has left, when the drafts are verified. Together they are the
base: no block runs twice on a token, and no second copy of weights or cache is there for those that are shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from verl_speculator.base_model.hidden_states import NORM_NAMES, block_list
from verl_speculator.decoding.cache import RollbackLayer
from verl_speculator.decoding.drafters import ChainDrafter
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.target import Target
from verl_speculator.models.early_exit import EarlyExit


class _PrecomputedBlock(nn.Module):
    """Stands for a block whose output is known: passes on what it is given, or what it holds."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Some architectures ask a block which mask it wants.
        self.attention_type = getattr(block, "attention_type", None)
        self.state: Tensor | None = None

    def forward(self, state: Tensor, *inputs: Any, **arguments: Any) -> Tensor:
        return state if self.state is None else self.state


class _OwnBlock(nn.Module):
    """The draft's own copy of a block, which leaves its input where verification finds it."""

    def __init__(self, speculator: EarlyExit, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.__dict__["speculator"] = speculator
        self.input: Tensor | None = None

    def forward(self, state: Tensor, *inputs: Any, **arguments: Any) -> Tensor:
        self.input = state
        return self.speculator.run_block(state, **arguments)


def _shallow_replace(module: nn.Module, **modules: nn.Module) -> nn.Module:
    """A second view of a module with some of its modules exchanged; it shares everything else, weights above all."""
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = module._modules | modules
    # Hooks are for the module itself: of a view nobody wants to hear.
    view.__dict__.update({name: type(hooks)() for name, hooks in module.__dict__.items() if name.endswith("_hooks")})
    return view


class SharedTarget(Target):
    """A base whose first blocks draft.

    Args:
        base: any Hugging Face causal language model whose cache holds keys and values of every layer.
        speculator: an early exit, attached to this base.
    """

    def __init__(self, base: nn.Module, speculator: EarlyExit) -> None:
        super().__init__(base)
        speculator.attach(base)
        decoder = base.base_model
        name, blocks = block_list(decoder)
        shared, count = speculator.shared_blocks, len(blocks)
        norm = next(name for name in NORM_NAMES if hasattr(decoder, name))
        own = [] if speculator.block is None else [_OwnBlock(speculator, blocks[shared])]
        self._own = own[0] if own else None
        rest = [_PrecomputedBlock(block) for block in blocks[shared + len(own) :]]
        front = nn.ModuleList([*blocks[:shared], *own, *rest])
        self.front = _shallow_replace(decoder, **{name: front, norm: nn.Identity()})
        given = [_PrecomputedBlock(block) for block in blocks[:shared]]
        self._given = given[-1] if given else None
        back = _shallow_replace(decoder, **{name: nn.ModuleList([*given, *blocks[shared:]])})
        self.back = _shallow_replace(base, **{base.base_model_prefix: back})

        layers = [RollbackLayer() for _ in range(count)]
        drafts = [RollbackLayer() for _ in own]
        self.cache = Cache(layers=layers)
        self._layers = [*layers, *drafts]
        # Positions and masks come from the length of a cache's first layer, so each view has its own there.
        self._front_cache = Cache(layers=[*layers[:shared], *drafts, *layers[shared + len(own) :]])
        first = [layers[shared]] * shared if shared < count else layers
        self._back_cache = Cache(layers=[*first, *layers[shared:]])
        self._states: list[Tensor] = []

    def __enter__(self) -> SharedTarget:
        return self

    def __exit__(self, *error: object) -> None:
        self._states.clear()

    def read_ahead(self, tokens: Tensor) -> Tensor:
        """[N, D] the draft's states for [N] tokens behind those already read, which the back has yet to read."""
        found = self.front(input_ids=tokens.unsqueeze(0), past_key_values=self._front_cache, use_cache=True)
        self._states.append(found.last_hidden_state if self._own is None else self._own.input)
        return found.last_hidden_state[0]

    def read(self, tokens: Tensor, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """`Target.read`; the tokens that were read ahead are the first of these, and are not read again."""
        ahead = sum(state.shape[1] for state in self._states)
        if ahead < len(tokens):
            self.read_ahead(tokens[ahead:])
        if self._given is not None:
            self._given.state = torch.cat(self._states, 1)
        self._states.clear()
        keep = {"logits_to_keep": 1} if last_only and self._last_only else {}
        logits = self.back(
            input_ids=tokens.unsqueeze(0), past_key_values=self._back_cache, use_cache=True, **keep
        ).logits[0]
        logits = logits[-1:] if last_only else logits
        return logits[:, :0], logits  # no state leads to the next draft: it reads tokens

    def roll_back(self, length: int) -> None:
        for layer in self._layers:
            layer.crop(length)


class EarlyExitDrafter(ChainDrafter):
    """Drafts with the front of a base, one token after the other.

    Args:
        speculator: an early exit.
        target: the base that it is a part of.
        policy: the target's policy, which shapes q too.
        sampled: draw the drafts from q; otherwise take the most likely token.
    """

    def __init__(self, speculator: EarlyExit, target: SharedTarget, policy: SamplingPolicy, *, sampled: bool) -> None:
        super().__init__(policy, sampled=sampled)
        self.speculator, self.target = speculator, target
        self.dtype = speculator.head(0).dtype

    def begin(self, hidden: Tensor) -> None:
        """The hidden state is not asked for: every token is read."""

    def logits(self, depth: int, token: Tensor) -> Tensor:
        state = self.speculator.start(self.target.read_ahead(token).to(self.dtype))
        return self.speculator.logits(0, self.speculator.step(state, token).output)
