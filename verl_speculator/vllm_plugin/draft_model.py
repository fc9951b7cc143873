"""The draft model that vLLM's V2 runner loads for sum_rnn, sum_lstm and Medusa (`method: mtp`). Imported by vLLM alone.

vLLM runs it as it runs multi-token prediction: at every depth over all rows of the batch, each row's token shifted by
one, and samples from the logits of each request's last row. A row stands for the same position at all depths, so the
state of the drafts rests in tensors with a row for each token of the batch. They and the parameters are allocated once:
captured CUDA graphs keep their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.checkpoint.format import DRAFT_TO_TARGET, TOKEN_MAP, parse_checkpoint_info
from verl_speculator.interop.engine_formats import first_few
from verl_speculator.models import build_speculator
from verl_speculator.models.layers import Table
from verl_speculator.models.speculator import DraftState
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.acceptance import AcceptanceStats
from verl_speculator.vllm_plugin.compat import check_draft_model
from verl_speculator.vllm_plugin.sharding import VocabularyShard, rows_loader, shard_tables


class SpeculatorDraftModel(nn.Module):
    """A speculator with the interface of vLLM's multi-token prediction models.

    Args:
        vllm_config: vLLM's own; its draft model is the directory that `verl-speculator export --format vllm` wrote.
        prefix: of the names of layers; there are none that need it.

    Raises:
        UserError: for settings, a speculator or a base model that do not fit.
    """

    # vLLM would share the target's embedding and LM head otherwise.
    has_own_embed_tokens = has_own_lm_head = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        draft = vllm_config.speculative_config.draft_model_config
        info = parse_checkpoint_info(draft.model, draft.hf_config.speculator)
        check_draft_model(vllm_config, info)
        speculator = build_speculator(info.config, **info.shape, device="meta")
        self.slots, parameters = speculator.checkpoint_slots(), dict(speculator.named_parameters())
        self.shapes = {name: list(slot.of(parameters).shape) for name, slot in self.slots.items()}
        cell = speculator.start(torch.empty(1, info.hidden_size, device="meta")).cell
        widths = speculator.head(0).shape[1], None if cell is None else cell.shape[1]
        self.shards = shard_tables(speculator)
        speculator.to(torch.get_default_dtype()).to_empty(device=torch.get_default_device())
        self.speculator = speculator.requires_grad_(False).eval()
        for name, parameter in speculator.named_parameters():
            shard = self.shards.get(name)
            parameter.weight_loader = rows_loader(0, None) if shard is None else shard.load
        if (tokens := speculator.draft_tokens) is not None:
            tokens.weight_loader = rows_loader(0, None)
            # A weight update of vLLM's that does not send a persistent buffer would leave it empty.
            speculator.register_buffer("draft_tokens", tokens, persistent=False)
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        # No buffers of the module: vLLM's weight updates would miss values for them.
        self.carried, self.cell = (None if width is None else torch.zeros(rows, width) for width in widths)
        self.loaded, self.depth, self.stats = False, 0, AcceptanceStats()
        # What vLLM compares with the target's, and would set to the target's if it were missing.
        tables = [table for table in self.speculator.modules() if isinstance(table, (Table, VocabularyShard))]
        self.model, self.lm_head = nn.Module(), tables[-1]
        self.model.embed_tokens = tables[0]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Part of vLLM's interface, and never called: `forward` embeds tokens itself, and vLLM asks for embeddings only
        where target and draft both take those of images."""
        raise RuntimeError("vLLM asked a speculator for embeddings, as if it took those of images")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
        intermediate_tensors: Any = None,
        spec_step_idx: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One depth for all rows.

        Args:
            input_ids: [T] the token after each row's position, at depth k the one k further.
            positions: [T] not read.
            hidden_states: [T, D] the target's, after its final norm; read at depth 0 alone.
            inputs_embeds: not read.
            intermediate_tensors: not read.
            spec_step_idx: the depth.

        Returns:
            [T, E] the states that `compute_logits` reads, and `hidden_states` as they are.
        """
        rows, self.depth = len(input_ids), spec_step_idx
        if spec_step_idx == 0:
            state = self.speculator.start(hidden_states)
        else:
            state = DraftState(self.carried[:rows], None if self.cell is None else self.cell[:rows], spec_step_idx)
        state = self.speculator.step(state, input_ids)
        self.carried[:rows] = state.carried
        if self.cell is not None:
            self.cell[:rows] = state.cell
        return state.output, hidden_states

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int | None = None) -> Tensor:
        """[R, V] logits of the states [R, E] of a depth: by default that of the last `forward`, since vLLM up to 0.31
        names none. Tokens outside of the draft vocabulary have −inf."""
        depth = self.depth if spec_step_idx is None else spec_step_idx
        return self.speculator.logits(depth, hidden_states)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors of a checkpoint, by their names there; one of the names of a tied tensor is enough. The first
        call must bring all of them, an update may come in several calls. Part of vLLM's weight updates
        (`start_draft_weight_update`): every copy goes through the parameter's `weight_loader`.

        Returns:
            The names of the parameters that were written.

        Raises:
            UserError: for an unknown, missing or misshapen tensor.
        """
        parameters, done = dict(self.speculator.named_parameters()), set()
        for name, tensor in weights:
            if name == DRAFT_TO_TARGET and self.speculator.draft_tokens is not None:
                buffer = self.speculator.draft_tokens
                buffer.weight_loader(buffer, tensor + torch.arange(len(tensor), device=tensor.device))
                done.add(name)
            elif name == TOKEN_MAP and self.speculator.draft_tokens is not None:
                continue  # the same for vLLM's Medusa
            elif name not in self.slots:
                raise UserError(f"{name}: this speculator has no such tensor; expected {first_few(self.slots, ', ')}")
            elif list(tensor.shape) != self.shapes[name]:
                raise UserError(f"{name} is {list(tensor.shape)}, the speculator's is {self.shapes[name]}")
            else:
                slot = self.slots[name]
                parameter = parameters[slot.parameter]
                parameter.weight_loader(parameter, tensor, slot.part)
                done.add(slot)
        missing = [name for name, slot in self.slots.items() if slot not in done]
        missing += [DRAFT_TO_TARGET] if self.speculator.draft_tokens is not None and DRAFT_TO_TARGET not in done else []
        if missing and not self.loaded:
            raise UserError(f"the draft model's file has no {first_few(missing, ', ')}: export the speculator again")
        self.loaded = True
        return {f"speculator.{slot.parameter}" for slot in done if slot != DRAFT_TO_TARGET}
