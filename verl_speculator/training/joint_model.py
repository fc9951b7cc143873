"""Base model and speculator in one module, so that one sharding wrapper holds both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from verl_speculator.base_model.hidden_states import POST_NORM, PRE_NORM, BlockCall, HiddenStateHook, final_norm
from verl_speculator.losses import DraftLoss
from verl_speculator.models.speculator import logit_transform
from verl_speculator.training.base_model import keep_types
from verl_speculator.training.model_config import SpeculatorModelConfig
from verl_speculator.utils.settings import UserError

BASE_PREFIX = "base."
DRAFT_PREFIX = "draft."
LOGIT_TOLERANCE = 1e-2


class BaseHead:
    """A base model's LM head with the soft cap or scale that the base model applies. Never carries a gradient.

    Args:
        base: a Hugging Face causal language model.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.transform = logit_transform(base.config)

    def __call__(self, states: Tensor) -> Tensor:
        """[n, V] logits of the next token, from hidden states [n, D] after the final norm."""
        head = self.base.get_output_embeddings()
        weight = head.weight.detach()
        products = F.linear(states.to(weight.dtype), weight, None if head.bias is None else head.bias.detach())
        return self.transform(products)

    @torch.no_grad()
    def check(self, states: Tensor, logits: Tensor, expected: str = "model.speculator.loss=ce") -> None:
        """Compare the head's logits with those of the base model.

        Args:
            states: [n, D]
            logits: [n, V] that the base model computed from `states`.
            expected: settings of a run that does not use the head.

        Raises:
            UserError: if they differ: the architecture changes its logits in a way that is not known here.
        """
        difference = (self(states).float() - logits.float()).abs().max() / logits.float().abs().max().clamp(min=1)
        if difference > LOGIT_TOLERANCE:
            raise UserError(
                f"model.partial_pretrain: {type(self.base).__name__} does something to its logits that is not known "
                f"here, so its distribution can be neither compared with nor copied; expected {expected} for this base"
            )


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Holds the whole weights of those modules that are sharding units of their own (verl makes one of an untied LM
    head, and of its embedding).

    Once for all chunks of a loss: their number depends on a rank's number of rows, and a collective in each would
    deadlock.
    """
    units = [module for module in dict.fromkeys(modules) if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


class ModelWithSpeculator(nn.Module):
    """A Hugging Face causal language model and its speculator.

    Shapes: B rows of T tokens, R rows to draft for, S cached states, D base width, K depths.

    A frozen base model stays as it is: no graph, no gradients, always in eval mode, no LM head product.

    Args:
        base: the language model.
        draft: the speculator and its loss.
        settings: of both.
        shards_base: False for a base model that is whole, and on its device, in every process: sharding wrappers do not
            see it.
    """

    def __init__(
        self, base: nn.Module, draft: DraftLoss, settings: SpeculatorModelConfig, *, shards_base: bool = True
    ) -> None:
        super().__init__()
        if not shards_base:  # an attribute, no submodule: wrappers, casts and state dicts visit submodules
            object.__setattr__(self, "base", base.eval())
        else:
            self.base = base
        self.draft = draft
        self.head = BaseHead(base) if draft.objective.needs_teacher else None
        training = settings.speculator_training
        copied_head = draft.speculator.keeps_head_scale and training.init == "base" and training.path is None
        # For each use of the base model's logits the setting that avoids it; emptied by `_check_head`.
        uses = {"model.speculator.loss=ce": self.head is not None, "model.speculator.init=random": copied_head}
        self._unchecked = [setting for setting, used in uses.items() if used]
        self.freeze_base, self.detach_hidden = settings.freeze_base_model, training.detach_hidden
        self.hidden_state_source = draft.speculator.hidden_state_source
        # Whether a teacher, or a cache of states for any teacher, needs states that the final norm cannot compute from
        # those that the draft reads.
        needs_teacher = self.head is not None or draft.speculator.reads_sequence
        self.needs_head_states = needs_teacher and self.hidden_state_source not in (POST_NORM, PRE_NORM)
        draft.speculator.attach(base, tables=False)
        # Which of the base model's modules each call of the draft needs whole.
        frozen, self.shared = draft.speculator.config.frozen_tables, []
        if "embedding" in frozen:
            self.shared.append(base.get_input_embeddings)
        if "head" in frozen or self.head is not None:
            self.shared.append(base.get_output_embeddings)
        self.config = base.config  # read by verl
        if self.freeze_base:
            base.requires_grad_(False)
            base.gradient_checkpointing_disable()
            if shards_base:
                keep_types(base)

    def train(self, mode: bool = True) -> ModelWithSpeculator:
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def forward(self, *, draft: dict[str, Tensor] | None = None, **base_inputs: Any) -> Any:
        """
        Args:
            draft: the arguments `tokens`, `targets`, `valid`, `counts` and `batch` of `DraftLoss`, with `teacher_rows`
                [K, R], indices into the flattened batch. With a cache of hidden states either `cached_states`
                [B · T, S · D] (S as `SpeculatorConfig.cached_states`), which replace the base model's forward pass, or
                `cache_positions`, the indices of the states to cache. None runs the base model alone.
            base_inputs: of the base model's forward.

        Returns:
            Without `draft` the base model's output. With it the output of `DraftLoss`, with `states_to_cache` in
            bf16 if there are `cache_positions`, and the base model's output (None if it is frozen: its logits are not
            computed).
        """
        if draft is None:
            with self._base_autocast(base_inputs):
                return self.base(**base_inputs)
        states, teacher_hidden, base_output, to_cache = draft.pop("cached_states", None), None, None, {}
        if states is None:
            hidden, teacher_hidden, base_output = self._run_base(base_inputs)
        if "cache_positions" in draft:  # rounded as in the cache, so that every epoch trains on the same states
            parts = [hidden] if teacher_hidden is None else [hidden, teacher_hidden]
            states = torch.cat(parts, dim=-1).flatten(0, 1).to(torch.bfloat16)
            to_cache["states_to_cache"] = states[draft.pop("cache_positions")]
        if states is not None:
            hidden, teacher_hidden = states, None
            if self.needs_head_states:
                hidden, teacher_hidden = states.tensor_split([-self.config.get_text_config().hidden_size], dim=-1)
        self._check_head(base_inputs)
        teacher = {}
        if self.head is not None:
            if teacher_hidden is None:
                teacher_hidden = hidden.detach()
                if self.hidden_state_source == PRE_NORM:
                    with torch.no_grad():
                        teacher_hidden = final_norm(self.base)(teacher_hidden)
            teacher = {"teacher_hidden": teacher_hidden.flatten(0, -2), "base_head": self.head}
        with gathered(*(module() for module in self.shared)):
            tables = self.draft.speculator.frozen_tables(self.base)
            return self.draft(hidden, **draft, **teacher, tables=tables) | to_cache, base_output

    def _base_autocast(self, base_inputs: dict[str, Any]) -> AbstractContextManager:
        """No autocast for a frozen base model: its own code chooses the dtype of each product, fp32 for some."""
        device = base_inputs["input_ids"].device.type
        return torch.autocast(device, enabled=False) if self.freeze_base else nullcontext()

    def _run_base(self, base_inputs: dict[str, Any]) -> tuple[Any, Tensor | None, Any]:
        """What the speculator reads; the states [B, T, D] that the LM head reads, if a teacher needs them and the final
        norm cannot compute them; and the base model's output if it is trained."""
        with (
            HiddenStateHook(self.base, self.hidden_state_source) as draft_hook,
            HiddenStateHook(self.base, POST_NORM) as head_hook,
        ):
            if self.freeze_base:
                with torch.no_grad(), self._base_autocast(base_inputs):
                    self.base.base_model(**base_inputs)
                output = None
            else:
                output = self.base(**base_inputs)
            hidden, head_states = draft_hook.take(), head_hook.take()
        if output is not None and self.detach_hidden:
            is_call = isinstance(hidden, BlockCall)
            hidden = hidden._replace(state=hidden.state.detach()) if is_call else hidden.detach()
        return hidden, head_states.detach() if self.needs_head_states else None, output

    def _check_head(self, base_inputs: dict[str, Any]) -> None:
        """Once, on 8 tokens of the first batch: `BaseHead.check`. The base model's weights are whole here."""
        if not self._unchecked:
            return
        expected, self._unchecked = " and ".join(self._unchecked), []
        inputs = {name: base_inputs[name][..., :8] for name in ("input_ids", "position_ids") if name in base_inputs}
        training = self.base.training
        self.base.eval()  # dropout would make the two passes differ
        with torch.no_grad(), self._base_autocast(inputs):
            hidden = self.base.base_model(**inputs, use_cache=False).last_hidden_state
            logits = self.base(**inputs, use_cache=False).logits
            with gathered(self.base.get_output_embeddings()):
                (self.head or BaseHead(self.base)).check(hidden.flatten(0, 1), logits.flatten(0, 1), expected)
        self.base.train(training)
