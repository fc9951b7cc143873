"""verl's FSDP engine for a base model with a speculator: SFT with a frozen or a jointly trained base model.

An actor of PPO is `policy.PolicyEngine`, a subclass: all that differs for a policy is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import convert_weight_keys
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import detach_tree

from verl_speculator.base_model.cpu import pack_linears, packing_pays
from verl_speculator.base_model.hidden_states import POST_NORM, HiddenStateHook
from verl_speculator.base_model.loading import check_frozen_type
from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights
from verl_speculator.data.alignment import DraftRows, align, padded_positions, states_read
from verl_speculator.data.hidden_state_cache import StateCache
from verl_speculator.losses import DraftLoss, pair_counts
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.models.layers import block_shapes, copy_base_tables, copy_norm, start_from_base
from verl_speculator.models.speculator import TokenBatch, logit_transform
from verl_speculator.training import MODEL_TYPE
from verl_speculator.training.base_model import (
    PACKING_TOLERANCE,
    leave_inputs_and_buffers,
    load_base,
    packing_error,
    probe_documents,
)
from verl_speculator.training.joint_model import BASE_PREFIX, DRAFT_PREFIX, ModelWithSpeculator
from verl_speculator.utils.settings import UserError

logger = logging.getLogger(__name__)

DRAFT_SUMS = "draft_sums"
BASE_SUMS = "base_sums"


class SpeculatorEngine(FSDPEngineWithLMHead):
    """Trains a speculator on the hidden states of its base model, alone or jointly with the base model.

    Frozen base model: only the speculator has gradients, optimizer state and fp32 master weights; clipping and the
    reported norm include nothing else. Joint training: the total is the loss function that verl sets +
    speculator_loss_coeff · speculator loss. A forward-only engine is the base model alone.

    Metrics of a batch are sums over its micro-batches and all ranks: `draft_sums` for `DraftSums` and, in joint
    training, `base_sums`, the base model's summed loss and number of tokens.

    Raises:
        UserError: on construction, for engine settings that do not work with a speculator.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config) -> None:
        if (size := engine_config.ulysses_sequence_parallel_size) > 1:
            raise UserError(f"engine.ulysses_sequence_parallel_size={size}: {MODEL_TYPE} supports 1 only")
        if model_config.form.is_quantized and engine_config.forward_only:
            raise UserError(f"model.quantization={model_config.quantization}: not for a forward-only engine")
        if model_config.freeze_base_model and not engine_config.forward_only:
            compute_dtype = (engine_config.mixed_precision or {}).get("param_dtype", "bf16")
            check_frozen_type(engine_config.model_dtype or "fp32", compute_dtype)
        if engine_config.strategy == "fsdp" and not engine_config.forward_only:
            # The loss needs the speculator's parameters by name, and a flat parameter has no names.
            engine_config = replace(engine_config, use_orig_params=True)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        # Whether rows are packed without padding; `initialize` sets it to False for some base models.
        self.packs: bool = model_config.use_remove_padding
        # Set by a trainer whose batches have `row`, the index in the training set: hidden states are cached by it.
        self.state_cache: StateCache | None = None

    @property
    def speculator(self) -> Speculator:
        """The speculator inside the sharded model. Its parameters are shards outside of the model's forward."""
        return self.draft.speculator

    @property
    def draft(self) -> nn.Module:
        """The sharding unit that holds the speculator and its loss."""
        return _unwrap(self.module).draft

    @property
    def base(self) -> nn.Module:
        """The base model inside the sharded model."""
        return _unwrap(self.module) if self.engine_config.forward_only else _unwrap(self.module).base

    # Building

    def _build_base(self) -> nn.Module:
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype or torch.float32)
        # As in verl: a model that is built without its weights would lose the ties between tensors.
        is_sender = self.device_mesh.get_coordinate()[-1] == 0
        receives_weights = not (is_sender or self.model_config.hf_config.tie_word_embeddings)
        return load_base(self.model_config, dtype, receives_weights=receives_weights)

    def _build_module(self) -> nn.Module:
        base = self._build_base()
        if self.engine_config.forward_only:
            return base
        training = self.model_config.speculator_training
        speculator = self._build_speculator(base)
        packs = self._packs_weights(base, speculator)
        shards_base = not (packs or self.model_config.form.is_quantized)
        # The sharding units: the speculator with its loss, and those of the user or else of the base model.
        policy, key = self.engine_config.wrap_policy, "transformer_layer_cls_to_wrap"
        units = (policy.get(key) or base._no_split_modules or []) if shards_base else []
        policy[key] = [*([units] if isinstance(units, str) else units), DraftLoss.__name__]
        compiled = get_device_name() == "cuda" if training.compile is None else training.compile
        draft = DraftLoss(speculator, training.objective, training.loss_chunk_rows, compiled=compiled)
        module = ModelWithSpeculator(base, draft, self.model_config, shards_base=shards_base)
        if packs:
            pack_linears(base)
        return module

    def _packs_weights(self, base: nn.Module, speculator: Speculator) -> bool:
        """Whether the base model's weights are packed for a CPU: those of a frozen one that a single process holds, and
        of which the speculator runs no layer."""
        is_alone = get_device_name() == "cpu" and torch.distributed.get_world_size() == 1
        is_base_alone = self.model_config.freeze_base_model and speculator.shared_layers is None
        return is_alone and is_base_alone and packing_pays(base)

    def _build_speculator(self, base: nn.Module) -> Speculator:
        """The speculator with its first weights: a checkpoint's, the base model's, or random ones."""
        training, head = self.model_config.speculator_training, base.get_output_embeddings().weight
        info = None if training.path is None else read_checkpoint_info(training.path)
        speculator = build_speculator(
            self.model_config.speculator_config,
            hidden_size=base.config.get_text_config().hidden_size,
            vocab_size=head.shape[0],
            draft_tokens=self.model_config.draft_tokens,
            block_shapes=block_shapes(base, self.model_config.speculator_config),
            # A trained speculator keeps the cap that it was trained with.
            logit_cap=logit_transform(base.config).cap if info is None else info.logit_cap,
            seed=self.engine_config.seed,
        )
        if info is not None and self.rank == 0:  # verl sends rank 0's weights to the other ranks
            info.check_base(speculator.hidden_size, speculator.vocab_size)
            if differing := info.config.differences(speculator.config):
                raise UserError(f"model.speculator.path={training.path} differs: {', '.join(differing)}")
            speculator.load_state_dict(read_weights(info))
            logger.info("speculator starts from %s", info.directory)
        elif not head.is_meta:
            copy_base_tables(speculator, base)
            if training.init == "base":
                start_from_base(speculator, base)
            copy_norm(speculator, base)
            speculator.copy_block(base)
        return speculator

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        module = super()._build_fsdp_module(module)
        if self.model_config.freeze_base_model and not self.engine_config.forward_only:
            leave_inputs_and_buffers(module, _unwrap(module).base)
        return module

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        trained = [p for p in module.parameters() if p.requires_grad]
        lr = self.model_config.speculator_training.lr
        if lr is None:
            return build_optimizer(trained, self.optimizer_config)
        draft = {id(p) for p in _unwrap(module).draft.parameters()}
        base = [p for p in trained if id(p) not in draft]
        groups = [{"params": base}] if base else []
        groups.append({"params": [p for p in trained if id(p) in draft], "lr": lr})
        return build_optimizer(groups, self.optimizer_config)

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        settings = self.optimizer_config
        if settings.zero_indexed_step or settings.lr_scheduler_type != "constant":
            return super()._build_lr_scheduler(optimizer)
        # verl's constant schedule ignores zero_indexed_step=false: the first step of a warm-up has rate 0. A cosine of
        # no cycles is constant and respects it. `warmup_style`, the type's older name, would override the type.
        self.optimizer_config = replace(settings, lr_scheduler_type="cosine", warmup_style=None, num_cycles=0.0)
        try:
            return super()._build_lr_scheduler(optimizer)
        finally:
            self.optimizer_config = settings

    def lr_scheduler_step(self) -> float:
        """As verl's; the rate of the step that was made, where verl gives that of the next one."""
        lr = self.optimizer.param_groups[0]["lr"]
        super().lr_scheduler_step()
        return lr

    # Packing

    def initialize(self) -> None:
        """As verl's. If the base model does not keep packed documents apart, rows are padded, on all ranks.

        Raises:
            UserError: for such a base model if the settings require packing.
        """
        super().initialize()
        settings = self.model_config
        if not self.packs:
            return
        documents = probe_documents(settings.tokenizer, settings.hf_config.get_text_config())
        with self.eval_mode():
            error = torch.tensor(packing_error(self._packed_states, documents), device=get_device_id())
        torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX)
        if error <= PACKING_TOLERANCE:  # False for NaN
            return
        reason = f"{type(self.base).__name__} does not keep the documents of a packed row apart"
        if settings.packing_required:
            raise UserError(f"model.use_remove_padding=true: {reason}; expected auto or false, which pad the rows")
        self.packs = False
        if self.rank == 0:
            logger.warning("%s (their states differ by %.0f %%): rows are padded instead", reason, 100 * error)

    def _packed_states(self, documents: Sequence[Tensor]) -> Tensor:
        """[T, D] the states of documents in one packed row, prepared like any batch."""
        rows = [
            {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": torch.ones_like(ids)}
            for ids in documents
        ]
        pad_mode = DatasetPadMode.NO_PADDING
        settings = {"use_remove_padding": True, "pad_mode": pad_mode, "temperature": 1.0}
        batch = tu.get_tensordict(SFTTensorCollator(pad_mode)(rows), settings).to(get_device_id())
        inputs, _ = self.prepare_model_inputs(batch)
        if "logits_to_keep" in signature(self.base.forward).parameters:  # the logits are not used
            inputs["logits_to_keep"] = 1
        with self._autocast(), HiddenStateHook(self.base, POST_NORM) as hook:
            self.module(**inputs, use_cache=False)
            return hook.take().flatten(0, 1)[: sum(map(len, documents))]

    # What differs for a policy (`PolicyEngine`)

    def _uses_draft(self, loss_function: Callable | None, forward_only: bool) -> bool:
        """Whether a batch is one for the speculator: any batch with a loss."""
        return loss_function is not None and not self.engine_config.forward_only

    def _assistant_mask(self, batch: TensorDict) -> Tensor:
        """[T] 1 where the tokens of the flattened batch are the assistant's."""
        if "response_mask" in batch:  # a rollout: the frozen base model of SFT would never see the loss of PPO
            raise UserError(
                "actor_rollout_ref.model._target_: an actor's base is a policy; "
                "expected verl_speculator.training.model_config.SpeculatorPolicyConfig"
            )
        return batch["loss_mask"].values()

    def _report(self, loss: Tensor, base_loss: Tensor, micro_batch: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """The loss to report if the base model is trained, from the total and from what verl's loss function returned,
        and metrics that verl's function does not give."""
        tokens, total_tokens = micro_batch["loss_mask"].values().sum(), micro_batch["batch_num_tokens"]
        share = base_loss.detach() * total_tokens / self.get_data_parallel_size()
        share = share if total_tokens else torch.zeros_like(share)  # verl's loss is 0/0 then
        return loss, {BASE_SUMS: torch.stack([share, tokens]).float()}

    # One batch

    def _align(self, batch: TensorDict) -> DraftRows:
        tokens, config = batch["input_ids"], self.model_config.speculator_config
        return align(
            tokens.values(),
            self._assistant_mask(batch),
            tokens.offsets(),
            config.depths,
            self.model_config.end_token_ids,
            first_offset=config.first_offset,
        )

    def _all_reduce_sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self.get_data_parallel_group())
        return values

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False):
        if not self.packs:
            tu.assign_non_tensor(data, use_remove_padding=False)
        if not self._uses_draft(loss_function, forward_only):
            return super().forward_backward_batch(data, loss_function, forward_only)
        # Each micro-batch divides by the pairs of the global batch, so they are counted before the first one: loss and
        # gradient do not depend on the micro-batches. All ranks must agree on skipping the base model's forward pass:
        # it gathers shards.
        is_uncached = self.state_cache is None or "row" not in data or not self.state_cache.has(_row_numbers(data))
        rows, device = self._align(data), get_device_id()
        counts = pair_counts(self.speculator, rows.targets.to(device), rows.valid.to(device))
        sums = self._all_reduce_sum(torch.cat([counts.flatten(), counts.new_tensor([is_uncached])]))
        self._batch_pairs, self._skip_base_forward = sums[:-1].view_as(counts), not sums[-1]
        output = super().forward_backward_batch(data, loss_function, forward_only)
        for name in (DRAFT_SUMS, BASE_SUMS):
            if name in output["metrics"]:
                total = torch.stack(output["metrics"][name]).sum(0)
                output["metrics"][name] = self._all_reduce_sum(total).tolist()
        return output

    def _autocast(self) -> AbstractContextManager:
        dtype = self._autocast_dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool):
        """The loss of one micro-batch, on which verl calls `backward`, and what is reported of it."""
        if not self._uses_draft(loss_function, forward_only):
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        base_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        rows = self._align(micro_batch)
        draft = {"tokens": rows.tokens, "targets": rows.targets, "valid": rows.valid, "counts": self._batch_pairs}
        draft |= self._states(rows, micro_batch, base_inputs["input_ids"])
        with self._autocast():
            # One call of the wrapped module runs base model, unroll, head and loss: only there are parameters whole.
            draft_output, base_output = self.module(**base_inputs, use_cache=False, draft=draft)
            if "states_to_cache" in draft_output:
                self._write_cache(micro_batch, draft_output["states_to_cache"])
            # The loss is this rank's part of a mean over the pairs of all ranks. FSDP averages gradients over ranks and
            # verl averages the reported loss; the factor turns these averages into sums.
            draft_loss = draft_output["total"] * self.get_data_parallel_size()
            loss = reported_loss = self.model_config.speculator_loss_coeff * draft_loss
            metrics: dict[str, Any] = {DRAFT_SUMS: draft_output["sums"]}
            model_output = {}
            if base_output is not None:  # the base model is trained: the rest is verl's own forward_step
                model_output = self.prepare_model_outputs(base_output, output_args, micro_batch, loss_function)
                group = self.get_data_parallel_group()
                base_loss, base_metrics = loss_function(model_output=model_output, data=micro_batch, dp_group=group)
                loss = loss + base_loss
                reported_loss, more_metrics = self._report(loss, base_loss, micro_batch)
                metrics |= base_metrics | more_metrics
        reported = {"model_output": detach_tree(model_output), "loss": reported_loss.detach().item()}
        return loss, reported | {"metrics": metrics}

    def _states(self, rows: DraftRows, micro_batch: TensorDict, base_ids: Tensor) -> dict[str, Tensor]:
        """Where the states that the rows read are in the base model's flattened batch, and the states of a cache."""
        offsets = micro_batch["input_ids"].offsets()
        is_packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)

        def in_batch(positions: Tensor) -> Tensor:
            return positions if is_packed else padded_positions(positions, offsets, base_ids.shape[1])

        documents = torch.stack([in_batch(offsets[:-1]), offsets.diff()], dim=1)
        batch = TokenBatch(base_ids.flatten(), documents, in_batch(rows.positions))
        indices = {"batch": batch, "teacher_rows": in_batch(rows.teachers)}
        if self.state_cache is not None and "row" in micro_batch:
            mask = micro_batch["loss_mask"].values()
            whole = self.model_config.speculator_config.reads_sequence
            positions = in_batch(states_read(mask, offsets, whole=whole))
            if not self._skip_base_forward:
                return indices | {"cache_positions": positions}
            states = self.state_cache.read(_row_numbers(micro_batch)).to(get_device_id())
            whole = states.new_zeros(base_ids.numel(), states.shape[1])  # no valid pair reads the others
            indices["cached_states"] = whole.index_copy_(0, positions, states)
        return indices

    def _write_cache(self, micro_batch: TensorDict, states: Tensor) -> None:
        numbers = _row_numbers(micro_batch)
        for row, part in zip(numbers, states.split(self.state_cache.lengths[numbers].tolist()), strict=True):
            self.state_cache.write(row, part)

    # Weights for a rollout

    def get_per_tensor_param(self, *args, **kwargs):
        """The base model's weights under its own names, for the server of a rollout."""
        parameters, peft_config = super().get_per_tensor_param(*args, **kwargs)
        return self._base_only(parameters), peft_config

    def get_per_tensor_param_shard(self, **kwargs):
        """As `get_per_tensor_param`, each rank its own shard."""
        parameters, peft_config = super().get_per_tensor_param_shard(**kwargs)
        return self._base_only(parameters), peft_config

    def _base_only(self, parameters: Any) -> Iterator[tuple]:
        for name, *rest in parameters:
            if not name.startswith(DRAFT_PREFIX):
                # Some architectures have other names on disk. verl asks the whole model for them, which has none.
                ((name, rest),) = convert_weight_keys({name.removeprefix(BASE_PREFIX): rest}, self.base).items()
                yield (name, *rest)


def _unwrap(module: nn.Module) -> nn.Module:
    return getattr(module, "_fsdp_wrapped_module", module)


def _row_numbers(batch: TensorDict) -> list[int]:
    """The indices of a batch's rows in the training set."""
    return batch["row"].values().tolist()
