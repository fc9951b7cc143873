"""A draft that is a part of the target model: its first decoder layers, on the target's own KV cache.

Let the base model have layers 0 … n−1, of which the draft runs the first s unchanged (`Speculator.shared_layers`) and,
with `trainable=head_and_block`, a trained copy of layer s. Two views of the base model divide the work:

    front   embedding, layers 0 … s−1, trained copy of layer s if any     the draft's head reads its output
    back    layers s … n−1, final norm, LM head                           starts from the output of layer s−1

One round with draft length γ after the newest token y_0:

    draft      front reads y_0 and gives y_1, reads y_1 and gives y_2, …, reads y_{γ−1} and gives y_γ
    verify     front reads y_γ, from which nothing was drafted; back reads the kept outputs of layer s−1 for y_0 … y_γ
    roll back  all layers, and the trained copy, drop the rejected tokens

So every layer reads every token once: a shared layer when the token is drafted from, the others when it is verified.
Shared layers have no second copy of weights or cache; a trained copy has both of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from verl_speculator.base_model.hidden_states import NORM_NAMES, block_list
from verl_speculator.decoding.target import RollbackLayer, Target
from verl_speculator.models.early_exit import EarlyExit


class _LayerStub(nn.Module):
    """Takes the place of a decoder layer in a view, so that the architecture's own forward still finds all its layers.

    Returns the output of `run`, or `output` if that is set, or its input.
    """

    def __init__(self, layer: nn.Module, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        # Architectures with several kinds of layers ask each for its kind to choose a mask.
        self.attention_type = getattr(layer, "attention_type", None)
        self.run = run
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def forward(self, state: Tensor, *inputs: Any, **arguments: Any) -> Tensor:
        if self.run is not None:
            self.input = state
            return self.run(state, **arguments)
        return state if self.output is None else self.output


def _shallow_replace(module: nn.Module, **modules: nn.Module) -> nn.Module:
    """A view of a module with some submodules replaced; it shares everything else, the weights above all."""
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = module._modules | modules
    # Hooks of the module must not fire on the view: their owner expects one call per forward pass.
    view.__dict__.update({name: type(hooks)() for name, hooks in module.__dict__.items() if name.endswith("_hooks")})
    return view


class SelfSpeculativeTarget(Target):
    """A base model whose first decoder layers draft.

    Args:
        base: a Hugging Face causal language model whose layers all cache keys and values.
        speculator: an early exit of this base model.
    """

    def __init__(self, base: nn.Module, speculator: EarlyExit) -> None:
        super().__init__(base)
        speculator.attach(base)
        decoder = base.base_model
        name, layers = block_list(decoder)
        norm = next(name for name in NORM_NAMES if hasattr(decoder, name))
        shared, count = speculator.shared_layers, len(layers)
        copies = [] if speculator.block is None else [_LayerStub(layers[shared], speculator.run_block)]
        skipped = [_LayerStub(layer) for layer in layers[shared + len(copies) :]]
        # No final norm: the draft's head has its own, and the back needs the state before it.
        front = nn.ModuleList([*layers[:shared], *copies, *skipped])
        self.front = _shallow_replace(decoder, **{name: front, norm: nn.Identity()})
        self._copy = copies[0] if copies else None
        # Stubs pass the embedding on; the last one replaces it by the kept output of layer s−1.
        done = [_LayerStub(layer) for layer in layers[:shared]]
        self._last_shared = done[-1] if done else None
        back = _shallow_replace(decoder, **{name: nn.ModuleList([*done, *layers[shared:]])})
        self.back = _shallow_replace(base, **{base.base_model_prefix: back})

        caches = [RollbackLayer() for _ in layers]
        copy_caches = [RollbackLayer() for _ in copies]
        self.cache, self._caches = Cache(layers=caches), [*caches, *copy_caches]
        # transformers takes positions and masks from the length of a cache's first layer. While drafts are verified the
        # shared layers have already read them and the back has not, so its first entries are the cache of layer s.
        self._front_cache = Cache(layers=[*caches[:shared], *copy_caches, *caches[shared + len(copies) :]])
        behind = [caches[shared]] * shared if shared < count else caches
        self._back_cache = Cache(layers=[*behind, *caches[shared:]])
        self._states: list[Tensor] = []

    def __enter__(self) -> SelfSpeculativeTarget:
        return self

    def __exit__(self, *error: object) -> None:
        self._states.clear()

    def read_ahead(self, tokens: Tensor) -> Tensor:
        """Run the front on tokens [N] and keep what the back needs of them; returns the draft's states [N, D]."""
        output = self.front(input_ids=tokens[None], past_key_values=self._front_cache, use_cache=True).last_hidden_state
        self._states.append(output if self._copy is None else self._copy.input)
        return output[0]

    def read(
        self, tokens: Tensor, *, last_only: bool = False, tree: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`Target.read`. The first of the tokens are those of `read_ahead`; the front reads the others only.

        Returns no hidden states, [N, 0]: the next draft starts by reading a token.
        """
        ahead = sum(state.shape[1] for state in self._states)
        if ahead < len(tokens):
            self.read_ahead(tokens[ahead:])
        if self._last_shared is not None:
            self._last_shared.output = torch.cat(self._states, 1)
        self._states.clear()
        logits = self._forward(self.back, self._back_cache, tokens, last_only, tree)
        return logits[:, :0], logits

    def roll_back(self, length: int) -> None:
        for cache in self._caches:
            cache.crop(length)
