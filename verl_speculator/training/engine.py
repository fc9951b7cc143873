"""`language_model_with_speculator`: verl's FSDP engine for a base with a speculator attached."""

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
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import detach_tree

from verl_speculator.base_model.hidden_states import POST_NORM, HiddenStateHook
from verl_speculator.base_model.loading import UNQUANTIZED, check_frozen_type
from verl_speculator.checkpoint.format import read_checkpoint_info, read_weights
from verl_speculator.data.alignment import DraftRows, align, padded_positions, states_read
from verl_speculator.data.hidden_state_cache import StateCache
from verl_speculator.losses import DraftLoss, DraftSums
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.models.layers import block_shapes, copy_norm, start_from_base
from verl_speculator.models.logits import logit_transform
from verl_speculator.training.joint_model import BASE_PREFIX, DRAFT_PREFIX, ModelWithSpeculator
from verl_speculator.training.packing import TOLERANCE, packing_error, probe_documents
from verl_speculator.training.policy import gradients_hidden, load_companion, response_mask, save_companion
from verl_speculator.training.quantized_base import leave_inputs_and_buffers, load_base
from verl_speculator.utils.errors import UserError

logger = logging.getLogger(__name__)

MODEL_TYPE = "language_model_with_speculator"
DRAFT_SUMS = "draft_sums"
BASE_SUMS = "base_sums"


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class SpeculatorEngine(FSDPEngineWithLMHead):
    """Trains a speculator on the hidden states of its base, alone or together with the base.

    Frozen base: only the speculator has gradients, optimizer state and fp32 master weights; clipping and the reported
    norm see nothing else. Joint: the base's loss is whatever loss function verl sets, and the total is
    that loss + speculator_loss_coeff · speculator loss. A forward-only engine is the base alone.

    Policy (`SpeculatorPolicyConfig`): the base is trained as verl's own engine would, to the bit, by whatever loss verl
    sets. With `speculator.train` an update computes the speculator's loss on the policy's states, detached; it has a
    group of its own in the optimizer and is clipped apart. Otherwise the speculator rests.

    Metrics of a batch are sums over all its micro-batches and ranks: `draft_sums`, what `DraftSums.unstack` reads, and
    in joint training `base_sums`, the base's summed loss and its number of tokens. A policy's are scalars, `actor/…`.

    Raises:
        UserError: on construction, for engine features that a speculator does not go with.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config) -> None:
        if engine_config.ulysses_sequence_parallel_size > 1:
            raise UserError(
                f"engine.ulysses_sequence_parallel_size={engine_config.ulysses_sequence_parallel_size}: "
                f"{MODEL_TYPE} supports 1 only"
            )
        if model_config.form.is_quantized and engine_config.forward_only:
            raise UserError(f"model.quantization={model_config.quantization}: not for a forward-only engine")
        if model_config.freeze_base_model and not engine_config.forward_only:
            compute = (engine_config.mixed_precision or {}).get("param_dtype", "bf16")
            check_frozen_type(engine_config.model_dtype or "fp32", compute)
        if engine_config.strategy == "fsdp" and not engine_config.forward_only:
            if model_config.is_policy:
                # Its outermost weights would lie in a unit of the whole model: no checkpoint of the policy alone, and
                # no single tensor of the speculator to send.
                raise UserError(
                    "actor_rollout_ref.actor.strategy=fsdp: a policy with a speculator is sharded by FSDP2; "
                    "expected fsdp2"
                )
            # The losses ask the speculator for its parameters by name; a flat parameter has no such names.
            engine_config = replace(engine_config, use_orig_params=True)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        # A policy's speculator that no update trains is carried along; a reference has none.
        self.draft_is_frozen = model_config.is_policy and (
            engine_config.forward_only or not model_config.speculator_training.train
        )
        # Whether rows are packed without padding; with padding where the base does not keep packed documents apart.
        self.packs: bool = model_config.use_remove_padding
        # Set by whoever numbers the rows of its data: batches with `row` are then kept there, or read.
        self.state_cache: StateCache | None = None

    @property
    def speculator(self) -> Speculator:
        """The speculator inside the sharded model. Its parameters are shards outside the model's forward."""
        return self.draft.speculator

    @property
    def draft(self) -> nn.Module:
        """The sharding unit that holds the speculator and its loss."""
        return getattr(self.module, "_fsdp_wrapped_module", self.module).draft

    @property
    def base(self) -> nn.Module:
        """The base inside the sharded model."""
        whole = getattr(self.module, "_fsdp_wrapped_module", self.module)
        return whole if self.engine_config.forward_only else whole.base

    # Building

    def _build_base(self) -> nn.Module:
        settings = self.model_config
        if not settings.is_policy or settings.form != UNQUANTIZED:
            dtype = PrecisionType.to_dtype(self.engine_config.model_dtype or torch.float32)
            # As verl has it: ties between tensors are lost where a model is made without its weights.
            sent = self.device_mesh.get_coordinate()[-1] != 0 and not settings.hf_config.tie_word_embeddings
            return load_base(settings, dtype, sent=sent)
        # A policy is verl's own, to the bit.
        # verl's engine builds language_model and value_model only; the base is the former.
        settings.model_type = "language_model"
        try:
            return super()._build_module()
        finally:
            settings.model_type = MODEL_TYPE

    def _build_module(self) -> nn.Module:
        base = self._build_base()
        if self.engine_config.forward_only:  # a reference model has nothing to draft
            return base
        if named := self.engine_config.wrap_policy.get("transformer_layer_cls_to_wrap"):
            # The user's list of sharding units replaces the model's own, which names ours.
            named = [named] if isinstance(named, str) else list(named)
            named = [] if self.model_config.form.is_quantized else named
            self.engine_config.wrap_policy["transformer_layer_cls_to_wrap"] = [*named, DraftLoss.__name__]
        head = base.get_output_embeddings().weight
        training = self.model_config.speculator_training
        info = None if training.path is None else read_checkpoint_info(training.path)
        speculator = build_speculator(
            self.model_config.speculator_config,
            hidden_size=base.config.get_text_config().hidden_size,
            vocab_size=head.shape[0],
            block_shapes=block_shapes(base, self.model_config.speculator_config),
            # A trained speculator keeps the cap that it was trained with.
            logit_cap=logit_transform(base.config).cap if info is None else info.logit_cap,
            seed=self.engine_config.seed,
        )
        if info is not None and self.rank == 0:  # the other ranks are sent rank 0's weights
            info.check_base(speculator.hidden_size, speculator.vocab_size)
            if differing := info.config.differences(speculator.config):
                raise UserError(f"model.speculator.path={training.path} differs: {', '.join(differing)}")
            speculator.load_state_dict(read_weights(info))
            logger.info("speculator starts from %s", info.directory)
        elif not head.is_meta:  # verl loads the weights on rank 0 alone, and sends them
            if training.init == "base":
                start_from_base(speculator, base)
            copy_norm(speculator, base)
            speculator.copy_block(base)
        return ModelWithSpeculator(
            base,
            DraftLoss(
                speculator,
                training.objective,
                training.loss_chunk_rows,
                compiled=get_device_name() == "cuda" if training.compile is None else training.compile,
            ),
            freeze_base=self.model_config.freeze_base_model,
            shard_base=not self.model_config.form.is_quantized,
            detach_hidden=training.detach_hidden,
            copied_head=speculator.keeps_head_scale and training.init == "base" and info is None,
        )

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if self.draft_is_frozen and not self.engine_config.forward_only:
            module.draft.requires_grad_(False)
        frozen = module.base if isinstance(module, ModelWithSpeculator) and module.freeze_base else None
        module = super()._build_fsdp_module(module)
        if frozen is not None:
            leave_inputs_and_buffers(module, frozen)
        if self.scaler is not None and self.model_config.is_policy and not self.draft_is_frozen:
            # One scale for both would let a speculator's overflow skip a step of the policy.
            raise UserError(
                "mixed_precision.param_dtype=fp16: model.speculator.train=true needs a type without loss scaling; "
                "expected bf16 or fp32"
            )
        return module

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        trained = [p for p in module.parameters() if p.requires_grad]
        lr = self.model_config.speculator_training.lr
        if lr is None:
            return build_optimizer(trained, self.optimizer_config)
        drafts = {id(p) for p in getattr(module, "_fsdp_wrapped_module", module).draft.parameters()}
        groups = [
            {"params": [p for p in trained if id(p) not in drafts]},
            {"params": [p for p in trained if id(p) in drafts], "lr": lr},
        ]
        return build_optimizer([group for group in groups if group["params"]], self.optimizer_config)

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        settings = self.optimizer_config
        if self.model_config.is_policy or settings.zero_indexed_step or settings.lr_scheduler_type != "constant":
            return super()._build_lr_scheduler(optimizer)
        # verl's constant schedule counts from 0 whatever is asked, so that a first step of a warm-up learns nothing.
        # A cosine of no cycles is as constant, and counts as it is told. `warmup_style`, the older name of the type,
        # would overwrite it again.
        self.optimizer_config = replace(settings, lr_scheduler_type="cosine", warmup_style=None, num_cycles=0.0)
        try:
            return super()._build_lr_scheduler(optimizer)
        finally:
            self.optimizer_config = settings

    # Packing

    def initialize(self) -> None:
        """As verl's. A base that does not keep packed documents apart is given padded rows, on all ranks; a sharded
        policy is saved under its own names.

        Raises:
            UserError: for such a base where packing is asked for by name.
        """
        super().initialize()
        if self.model_config.is_policy and not self.engine_config.forward_only:
            self.checkpoint_manager.model = self.base
        if self.packs:
            self._check_packing()

    def _check_packing(self) -> None:
        settings = self.model_config
        documents = probe_documents(settings.tokenizer, settings.hf_config.get_text_config())
        with self.eval_mode():
            error = torch.tensor(packing_error(self._packed_states, documents), device=get_device_id())
        torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX)
        # What is not a number is no reason to pack.
        if error <= TOLERANCE:
            return
        reason = f"{type(self.base).__name__} does not keep the documents of a packed row apart"
        if settings.packing_required:
            raise UserError(f"model.use_remove_padding=true: {reason}; expected auto or false, which pad the rows")
        self.packs = False
        if self.rank == 0:
            logger.warning("%s (their states differ by %.0f %%): rows are padded instead", reason, 100 * error)

    def _packed_states(self, documents: Sequence[Tensor]) -> Tensor:
        """[T, D] the states of documents in one packed row, prepared as any batch is."""
        rows = [
            {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": torch.ones_like(ids)}
            for ids in documents
        ]
        packed = {"use_remove_padding": True, "pad_mode": DatasetPadMode.NO_PADDING, "temperature": 1.0}
        batch = tu.get_tensordict(SFTTensorCollator(DatasetPadMode.NO_PADDING)(rows), packed).to(get_device_id())
        inputs, _ = self.prepare_model_inputs(micro_batch=batch)
        if "logits_to_keep" in signature(self.base.forward).parameters:  # nobody reads them
            inputs["logits_to_keep"] = 1
        with self._autocast(), HiddenStateHook(self.base, POST_NORM) as tap:
            self.module(**inputs, use_cache=False)
            return tap.take().flatten(0, 1)[: sum(map(len, documents))]

    # One batch

    def _align(self, batch: TensorDict) -> DraftRows:
        tokens, shape = batch["input_ids"], self.model_config.speculator_config
        return align(
            tokens.values(),
            response_mask(batch) if self.model_config.is_policy else batch["loss_mask"].values(),
            tokens.offsets(),
            shape.depths,
            self.model_config.end_token_ids,
            first_offset=shape.first_offset,
        )

    def _all_reduce_sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self.get_data_parallel_group())
        return values

    def _drafts(self, loss_function: Callable | None, forward_only: bool) -> bool:
        """Whether the speculator takes part: in whatever has a loss, and of a policy's in updates that train it."""
        if self.model_config.is_policy and (self.draft_is_frozen or forward_only):
            return False
        return loss_function is not None and not self.engine_config.forward_only

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False):
        if not self.packs:
            tu.assign_non_tensor(data, use_remove_padding=False)
        if not self._drafts(loss_function, forward_only):
            return super().forward_backward_batch(data, loss_function, forward_only)
        if "response_mask" in data and not self.model_config.is_policy:
            raise UserError(
                "actor_rollout_ref.model._target_: an actor's base is a policy; "
                "expected verl_speculator.training.model_config.SpeculatorPolicyConfig"
            )
        # The divisor of every micro-batch is the batch's own number of pairs, on all ranks, known before the first.
        # Whether the base may rest is settled for all ranks too: its forward pass gathers their shards.
        uncached = self.state_cache is None or "row" not in data or not self.state_cache.has(_numbers(data))
        pairs = self._align(data).valid.sum(1)
        known = self._all_reduce_sum(torch.cat([pairs, pairs.new_tensor([uncached])]).to(get_device_id()))
        self._batch_pairs, self._skip_base_forward = known[:-1], not known[-1]
        output = super().forward_backward_batch(data, loss_function, forward_only)
        for name in (DRAFT_SUMS, BASE_SUMS):
            if name in output["metrics"]:
                total = torch.stack(output["metrics"][name]).sum(0)
                output["metrics"][name] = self._all_reduce_sum(total).tolist()
        if self.model_config.is_policy:
            sums = DraftSums.unstack(torch.tensor(output["metrics"].pop(DRAFT_SUMS), dtype=torch.float64))
            found = sums.metrics(self.model_config.speculator_training.objective)
            # verl strings lists together over ranks, and takes the mean
            output["metrics"] |= {f"actor/{name}": [value] for name, value in found.items()}
        return output

    def _autocast(self) -> AbstractContextManager:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool):
        """One micro-batch: the loss to run backward on, and what is reported of it."""
        if not self._drafts(loss_function, forward_only):  # the base, as in any language model engine
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        base_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        rows = self._align(micro_batch)
        draft = self._places(rows, micro_batch, base_inputs["input_ids"].shape[1]) | {
            "tokens": rows.tokens,
            "targets": rows.targets,
            "valid": rows.valid,
            # FSDP averages gradients over ranks, and the divisor counts the pairs of all of them.
            "counts": self._batch_pairs,
        }
        with self._autocast():
            found, base_output = self.module(**base_inputs, use_cache=False, draft=draft)
            if "states" in found:
                self._keep(micro_batch, found.pop("states"))
            draft_loss = found.pop("total") * self.get_data_parallel_size()
            sums = DraftSums(**found)
            loss = self.model_config.speculator_loss_coeff * draft_loss
            reported, model_output = loss, {}
            metrics: dict[str, Any] = {DRAFT_SUMS: sums.stack()}
            if base_output is not None:
                model_output = self.prepare_model_outputs(
                    output=base_output,
                    output_args=output_args,
                    micro_batch=micro_batch,
                    logits_processor_func=loss_function,
                )
                base_loss, base_metrics = loss_function(
                    model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group()
                )
                loss = reported = loss + base_loss
                metrics |= base_metrics
                if self.model_config.is_policy:
                    reported = base_loss
                else:
                    metrics[BASE_SUMS] = self._base_sums(base_loss, micro_batch)
        output = {"model_output": detach_tree(model_output), "loss": reported.detach().item(), "metrics": metrics}
        return loss, output

    def optimizer_step(self):
        """One step; a policy's norm, clipping and refusal of what is not finite are those without a speculator."""
        if self.draft_is_frozen or not self.model_config.is_policy:
            return super().optimizer_step()
        drafts = list(self.draft.parameters())
        # The rest, not `self.base`: a parameter that a wrapper holds in neither still takes one step, the policy's.
        own = {id(parameter) for parameter in drafts}
        rest = [parameter for parameter in self.module.parameters() if id(parameter) not in own]
        with gradients_hidden(drafts):
            norm = super().optimizer_step()
        with gradients_hidden(rest):
            self._draft_norm = super().optimizer_step()
        return norm

    def train_batch(self, data: TensorDict, loss_function: Callable) -> Any:
        """As any engine's; a policy's metrics have the norm of the speculator's gradient too."""
        output = super().train_batch(data, loss_function)
        if self.model_config.is_policy and not self.draft_is_frozen:
            output["metrics"]["actor/speculator_grad_norm"] = [self._draft_norm]
        return output

    def _places(self, rows: DraftRows, micro_batch: TensorDict, width: int) -> dict[str, Tensor]:
        """Where the states are that the rows read: in the base's flattened batch, or among those of the cache."""
        offsets = micro_batch["input_ids"].offsets()
        packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)

        def in_batch(positions: Tensor) -> Tensor:
            return positions if packed else padded_positions(positions, offsets, width)

        if self.state_cache is None or "row" not in micro_batch:
            return {"rows": in_batch(rows.positions), "teacher_rows": in_batch(rows.teachers)}
        mask = micro_batch["loss_mask"].values()
        kept = states_read(mask, offsets)
        place = torch.zeros_like(mask, dtype=torch.long)  # what no valid pair reads points at the first one
        place[kept] = torch.arange(len(kept), device=place.device)
        places = {"rows": place[rows.positions], "teacher_rows": place[rows.teachers]}
        if not self._skip_base_forward:
            return places | {"kept": in_batch(kept)}
        return places | {"states": self.state_cache.read(_numbers(micro_batch)).to(get_device_id())}

    def _keep(self, micro_batch: TensorDict, states: Tensor) -> None:
        numbers = _numbers(micro_batch)
        lengths = self.state_cache.lengths[numbers].tolist()
        for row, part in zip(numbers, states.split(lengths), strict=True):
            self.state_cache.write(row, part)

    def _base_sums(self, base_loss: Tensor, micro_batch: TensorDict) -> Tensor:
        """[2] this micro-batch's share of the base's summed loss and of the batch's tokens."""
        tokens = micro_batch["loss_mask"].values().sum()
        share = base_loss.detach() * micro_batch["batch_num_tokens"] / self.get_data_parallel_size()
        share = share if micro_batch["batch_num_tokens"] else torch.zeros_like(share)  # verl's loss is 0/0 then
        return torch.stack([share, tokens]).float()

    # A policy on disk

    def save_checkpoint(self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, *args, **kwargs):
        """As verl's, and the speculator in a folder of its own, if it learns."""
        super().save_checkpoint(local_path, hdfs_path, global_step, *args, **kwargs)
        if self.model_config.is_policy and not self.draft_is_frozen:
            save_companion(self, local_path, global_step)

    def load_checkpoint(self, local_path: str, *args, **kwargs):
        """As verl's, and the speculator from its folder."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.model_config.is_policy and not self.draft_is_frozen:
            load_companion(self, local_path)

    # Weights for others

    def get_per_tensor_param(self, *args, **kwargs):
        """The base's weights under the base's own names: what a served base is synchronised with."""
        parameters, peft_config = super().get_per_tensor_param(*args, **kwargs)
        return self._base_only(parameters), peft_config

    def get_per_tensor_param_shard(self, **kwargs):
        """As `get_per_tensor_param`, each rank its own shard."""
        parameters, peft_config = super().get_per_tensor_param_shard(**kwargs)
        return self._base_only(parameters), peft_config

    def _base_only(self, parameters: Any) -> Iterator[tuple]:
        for name, *rest in parameters:
            if not name.startswith(DRAFT_PREFIX):
                # Some architectures have other names on disk; verl asks the whole model, which does not know them.
                ((name, rest),) = convert_weight_keys({name.removeprefix(BASE_PREFIX): rest}, self.base).items()
                yield (name, *rest)


def _numbers(batch: TensorDict) -> list[int]:
    """Which rows of the training set these are."""
    return batch["row"].values().tolist()
