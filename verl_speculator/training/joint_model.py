"""Base and speculator side by side in one module, so that one sharding wrapper holds both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import POST_NORM, PRE_NORM, BlockCall, HiddenStateHook, final_norm
from verl_speculator.losses import DraftLoss
from verl_speculator.training.quantized_base import keep_types
from verl_speculator.training.teacher import BaseHead

BASE_PREFIX = "base."
DRAFT_PREFIX = "draft."


class ModelWithSpeculator(nn.Module):
    """A Hugging Face causal language model and the speculator that drafts for it.

    Shapes: R rows to draft for, D base width, K depths.

    Args:
        base: the language model.
        draft: the speculator and its loss.
        freeze_base: keep the base as it is: no graph, no gradient, always in eval mode, and its output head is never
            multiplied with.
        shard_base: let sharding wrappers see the base. False for one that stays whole on every process, and is on its
            device already.
        detach_hidden: if the base is trained, keep the speculator's gradient away from it.
        copied_head: the speculator's head starts as the base's own, so what the base does to its logits has to be known
            whatever the loss asks for.
    """

    def __init__(
        self,
        base: nn.Module,
        draft: DraftLoss,
        *,
        freeze_base: bool,
        detach_hidden: bool,
        shard_base: bool = True,
        copied_head: bool = False,
    ) -> None:
        super().__init__()
        if shard_base:
            self.base = base
        else:  # an attribute, but no submodule: wrappers, casts and state dicts go by submodules
            object.__setattr__(self, "base", base.eval())
        self.draft = draft
        self.head = BaseHead(base) if draft.objective.needs_teacher else None
        # Settings that do without each use of the base's logits, until the check of what is known of them.
        without = {"model.speculator.loss=ce": self.head is not None, "model.speculator.init=random": copied_head}
        self._unchecked = [setting for setting, used in without.items() if used]
        self.freeze_base = freeze_base
        self.detach_hidden = detach_hidden
        self.hidden_state_source = draft.speculator.hidden_state_source
        draft.speculator.attach(base)
        # What sharding wrappers and verl ask of a model: its configuration, and the classes of its sharding units.
        self.config = base.config
        self._no_split_modules = [*(base._no_split_modules or [] if shard_base else []), DraftLoss.__name__]
        if freeze_base:
            base.requires_grad_(False)
            base.gradient_checkpointing_disable()
            if shard_base:
                keep_types(base)

    def train(self, mode: bool = True) -> ModelWithSpeculator:
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def can_generate(self) -> bool:
        """As the base says."""
        return self.base.can_generate()

    def forward(self, *, draft: dict[str, Tensor] | None = None, **base_inputs: Any) -> Any:
        """
        Args:
            draft: `rows` [R] and `teacher_rows` [K, R], indices into the flattened batch of `base_inputs`, and the
                `tokens`, `targets`, `valid` and `counts` of `DraftLoss`. None runs the base alone. With a cache of
                states the indices are into its states instead: either `states` [S, D] themselves, and the base rests,
                or `kept` [S], where in the flattened batch they are.
            base_inputs: of the base's own forward.

        Returns:
            The base's output without `draft`. With it `(found, base_output)`: what `DraftLoss` gives, with `states`
            [S, D] in bf16 if they are to be kept, and the base's output if it is trained (None if it is frozen: its
            logits are never computed).
        """
        if draft is None:
            with self._types_of_base(base_inputs):
                return self.base(**base_inputs)
        taken, taught, output = draft.get("states"), None, None
        if taken is None:
            taken, taught, output = self._run_base(base_inputs)
        kept = {}
        if "kept" in draft:  # rounded as they are kept, so that every epoch trains on the same
            taken, taught = taken.flatten(0, 1)[draft["kept"]].to(torch.bfloat16), None
            kept["states"] = taken
        rows = {name: draft[name] for name in ("tokens", "targets", "valid", "rows", "counts")}
        self._check_head(base_inputs)
        if self.head is None:
            return self.draft(taken, **rows) | kept, output
        if taught is None:
            taught = self._after_norm(taken.detach())
        teacher = {"teacher_hidden": taught.reshape(-1, taught.shape[-1]), "teacher_rows": draft["teacher_rows"]}
        with self.head.gathered() as head:
            return self.draft(taken, **rows, **teacher, base_head=head) | kept, output

    def _types_of_base(self, base_inputs: dict[str, Any]) -> AbstractContextManager:
        """A frozen base computes each product in the type that its own code asks for, fp32 for some: no autocast."""
        if not self.freeze_base:
            return nullcontext()
        return torch.autocast(base_inputs["input_ids"].device.type, enabled=False)

    def _run_base(self, base_inputs: dict[str, Any]) -> tuple[Any, Tensor | None, Any]:
        """What the speculator reads, the states [B, T, D] that the base's head reads if a teacher is asked for and they
        are others, and the base's output if it is trained."""
        other = self.head is not None and self.hidden_state_source not in (POST_NORM, PRE_NORM)
        with (
            HiddenStateHook(self.base, self.hidden_state_source) as tap,
            HiddenStateHook(self.base, POST_NORM) as final,
        ):
            if self.freeze_base:
                with torch.no_grad(), self._types_of_base(base_inputs):
                    self.base.base_model(**base_inputs)
                output = None
            else:
                output = self.base(**base_inputs)
            taken, taught = tap.take(), final.take()
        if output is not None and self.detach_hidden:
            taken = BlockCall(taken.state.detach(), taken.arguments) if isinstance(taken, BlockCall) else taken.detach()
        return taken, taught.detach() if other else None, output

    @torch.no_grad()
    def _after_norm(self, states: Tensor) -> Tensor:
        """The states that the base's head reads, from those that the speculator does."""
        return final_norm(self.base)(states) if self.hidden_state_source == PRE_NORM else states

    def _check_head(self, base_inputs: dict[str, Any]) -> None:
        """Once, on a few tokens: whether the head gives what the base itself gives. Here its weights are whole."""
        if not self._unchecked:
            return
        expected, self._unchecked = " and ".join(self._unchecked), []
        few = {name: base_inputs[name][..., :8] for name in ("input_ids", "position_ids") if name in base_inputs}
        training = self.base.training
        self.base.eval()  # two passes are compared, and dropout makes each another one
        with torch.no_grad(), self._types_of_base(few):
            hidden = self.base.base_model(**few, use_cache=False).last_hidden_state
            logits = self.base(**few, use_cache=False).logits
            with (self.head or BaseHead(self.base)).gathered() as head:
                head.check(hidden.flatten(0, 1), logits.flatten(0, 1), expected)
        self.base.train(training)
