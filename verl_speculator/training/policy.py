"""The engine of a policy (PPO, GRPO): everything in which it differs from SFT's `SpeculatorEngine`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_speculator.base_model.loading import UNQUANTIZED
from verl_speculator.checkpoint.provenance import git_commit, versions
from verl_speculator.losses import DraftSums
from verl_speculator.training import MODEL_TYPE
from verl_speculator.training.base_model import from_rank_0
from verl_speculator.training.checkpointing import SEND, gather_speculator, read_speculator, write_speculator
from verl_speculator.training.engine import DRAFT_SUMS, SpeculatorEngine
from verl_speculator.utils.atomic_io import atomic_directory
from verl_speculator.utils.settings import UserError

DIRECTORY = "speculator"  # in the policy's checkpoint directory


class PolicyEngine(SpeculatorEngine):
    """Trains a policy as verl's own engine does, to the bit, and optionally the speculator of its rollouts.

    With `speculator.train` an update computes the speculator's loss on the policy's detached states. No gradient flows
    between the two, and clipping and skipped steps are separate. Without it the speculator is never called, and a
    reference model (a forward-only engine) has none. Metrics are scalars, `actor/…`.

    Raises:
        UserError: on construction, for engine settings that do not work with a speculator.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config) -> None:
        if engine_config.strategy == "fsdp" and not engine_config.forward_only:
            # FSDP1 puts the model's outermost weights into one flat parameter. Neither a checkpoint of the policy alone
            # nor a single tensor of the speculator can be taken from that.
            raise UserError(
                "actor_rollout_ref.actor.strategy=fsdp: a policy with a speculator is sharded by FSDP2; expected fsdp2"
            )
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.trains_draft: bool = model_config.speculator_training.train and not engine_config.forward_only

    # Building

    def _build_base(self) -> nn.Module:
        settings = self.model_config
        if settings.form != UNQUANTIZED:
            return super()._build_base()
        settings.model_type = "language_model"  # verl's method builds known types only
        try:
            return FSDPEngineWithLMHead._build_module(self)
        finally:
            settings.model_type = MODEL_TYPE

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if not (self.trains_draft or self.engine_config.forward_only):
            module.draft.requires_grad_(False)
        module = super()._build_fsdp_module(module)
        if self.scaler is not None and self.trains_draft:
            # With one loss scale for both, an overflow of the speculator would skip a step of the policy.
            raise UserError(
                "mixed_precision.param_dtype=fp16: model.speculator.train=true needs a type without loss scaling; "
                "expected bf16 or fp32"
            )
        return module

    _build_lr_scheduler = FSDPEngineWithLMHead._build_lr_scheduler
    lr_scheduler_step = FSDPEngineWithLMHead.lr_scheduler_step

    def initialize(self) -> None:
        """As verl's; the policy is saved under its own names."""
        super().initialize()
        if not self.engine_config.forward_only:
            self.checkpoint_manager.model = self.base

    # One batch

    def _uses_draft(self, loss_function: Callable | None, forward_only: bool) -> bool:
        return self.trains_draft and not forward_only and super()._uses_draft(loss_function, forward_only)

    def _assistant_mask(self, batch: TensorDict) -> Tensor:
        return response_mask(batch)

    def _report(self, loss: Tensor, base_loss: Tensor, micro_batch: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        return base_loss, {}

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False):
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if DRAFT_SUMS in output["metrics"]:
            sums = DraftSums(*torch.tensor(output["metrics"].pop(DRAFT_SUMS), dtype=torch.float64))
            settings = self.model_config
            has_vocabulary = settings.speculator_config.draft_vocab_size is not None
            metrics = sums.metrics(settings.speculator_training.objective, draft_vocabulary=has_vocabulary)
            # verl concatenates lists over ranks and takes the mean.
            output["metrics"] |= {f"actor/{name}": [value] for name, value in metrics.items()}
        return output

    def optimizer_step(self) -> float:
        """The policy's step, then the speculator's; the policy's gradient norm.

        verl's step runs twice, each time with the gradients of one of the two hidden, so that clipping, norm and the
        refusal of a norm that is not finite see one of them. Optimizers skip parameters without a gradient.
        """
        if not self.trains_draft:
            return super().optimizer_step()
        draft = list(self.draft.parameters())
        # Everything else, not `self.base`: a parameter that a wrapper holds outside of both belongs to the policy.
        draft_ids = {id(parameter) for parameter in draft}
        policy = [parameter for parameter in self.module.parameters() if id(parameter) not in draft_ids]
        with gradients_hidden(draft):
            norm = super().optimizer_step()
        with gradients_hidden(policy):
            self._draft_norm = super().optimizer_step()
        return norm

    def train_batch(self, data: TensorDict, loss_function: Callable) -> Any:
        """As verl's, with the norm of the speculator's gradient in the metrics."""
        output = super().train_batch(data, loss_function)
        if self.trains_draft:
            output["metrics"]["actor/speculator_grad_norm"] = [self._draft_norm]
        return output

    # Checkpoints

    def save_checkpoint(self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, *args, **kwargs):
        """As verl's; a speculator that is trained is saved in a folder of its own."""
        super().save_checkpoint(local_path, hdfs_path, global_step, *args, **kwargs)
        if not self.trains_draft:
            return
        parameters, model = gather_speculator(self), self.model_config
        if dist.get_rank() == 0:
            provenance = {
                "base": {"name": model.path, "trained_jointly": True, "weights_fingerprint": None},
                "training": {"step": global_step, "speculator_loss_coeff": model.speculator_loss_coeff},
                "versions": versions(),
                "git_commit": git_commit(),
            }
            with atomic_directory(Path(local_path) / DIRECTORY) as folder:
                write_speculator(self, folder, parameters, provenance)
        dist.barrier()

    def load_checkpoint(self, local_path: str, *args, **kwargs):
        """As verl's, and the speculator from its folder. Without one, saved by a run that did not train the speculator,
        the speculator stays as it is.

        Raises:
            UserError: on every rank, for a speculator that cannot be read or has another shape.
        """
        super().load_checkpoint(local_path, *args, **kwargs)
        if not self.trains_draft:
            return
        folder, parameters, error = Path(local_path) / DIRECTORY, {}, None
        if dist.get_rank() == 0 and folder.is_dir():
            try:
                parameters = read_speculator(self, folder)
            except UserError as cause:
                error = cause
        exists, error = from_rank_0((bool(parameters), error))
        if error is not None:
            raise error
        if exists:
            set_model_state_dict(self.draft, parameters, options=SEND)


def response_mask(batch: TensorDict) -> Tensor:
    """[T] 1 where the policy generated the token: not the prompt, a tool's answer or padding.

    Args:
        batch: verl's: `input_ids` nested; `prompts` and `response_mask` nested, or padded with an `attention_mask`.
            A row is its prompt followed by its response.
    """
    prompts, responses, offsets = batch["prompts"], batch["response_mask"], batch["input_ids"].offsets()
    is_nested = prompts.is_nested
    lengths = prompts.offsets().diff() if is_nested else batch["attention_mask"][:, : prompts.shape[1]].sum(1)
    mask = torch.zeros_like(batch["input_ids"].values())
    for prompt_length, row, (start, end) in zip(lengths, responses.unbind(), offsets.unfold(0, 2, 1), strict=True):
        begin = start + prompt_length
        mask[begin:end] = row[: end - begin].to(mask)
    return mask


@contextmanager
def gradients_hidden(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Removes the gradients of parameters for the duration of the context."""
    hidden = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in hidden:
        parameter.grad = None
    yield
    for parameter, gradient in hidden:
        parameter.grad = gradient
