"""verl's HFModelConfig with a speculator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from verl.workers.config import HFModelConfig

from verl_speculator.base_model.chat_template import end_token_ids, ensure_chat_template
from verl_speculator.base_model.loading import BaseModelFormat, check_language_model, supported_attention
from verl_speculator.checkpoint.format import DRAFT_TOKENS, read_checkpoint_info, read_weights
from verl_speculator.config.draft_vocabulary import DraftVocabulary
from verl_speculator.config.schema import SpeculatorConfig, SpeculatorSettings, SpeculatorTraining
from verl_speculator.utils.settings import UserError

logger = logging.getLogger(__name__)


@dataclass
class SpeculatorModelConfig(HFModelConfig):
    """The base model as verl describes it, and its speculator.

    Attributes:
        partial_pretrain: another name for `path`.
        speculator: the `model.speculator.*` keys. With `path`, missing keys of the shape come from the checkpoint.
        speculator_loss_coeff: weight of the speculator's loss.
        freeze_base_model: whether the base model keeps its weights.
        quantization: None, or `bnb4` for a base model in 4 bits.
        gguf_file: None, or the file inside `path` that the base model is read from.
        form: `quantization` and `gguf_file`, validated.
        use_remove_padding: whether rows are packed without padding; `auto` unless the base model does not keep packed
            documents apart. A bool after construction.
        packing_required: whether such a base model is refused, because the user set `use_remove_padding=true`.
        speculator_config: the shape that `speculator` describes, validated.
        speculator_training: how `speculator` says it is trained, validated.
        end_token_ids: tokens that end an assistant's turn. The trainer sets it to () for plain text.
        draft_tokens: [V′] the draft vocabulary of `speculator.path` or `speculator.draft_vocab_file`; the trainer sets
            it if neither is given. None without a draft vocabulary.
    """

    _mutable_fields = HFModelConfig._mutable_fields | {
        *("form", "packing_required", "use_remove_padding"),
        *("speculator_config", "speculator_training", "end_token_ids", "draft_tokens"),
    }

    partial_pretrain: str | None = None
    speculator: Any = field(default_factory=dict)
    speculator_loss_coeff: float = 1.0
    freeze_base_model: bool = True
    quantization: str | None = None
    gguf_file: str | None = None
    form: BaseModelFormat | None = None
    use_remove_padding: bool | str = "auto"
    packing_required: bool = False
    speculator_config: SpeculatorConfig | None = None
    speculator_training: SpeculatorTraining | None = None
    end_token_ids: tuple[int, ...] = ()
    draft_tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.form = BaseModelFormat(self.quantization, self.gguf_file)
        self.form.check("model.", frozen=self.freeze_base_model)
        self.packing_required = self.use_remove_padding is True
        self.use_remove_padding = self.use_remove_padding in (True, "auto")
        self._read_base_config()
        check_language_model(f"model.path={self.path}", self.hf_config)
        self._adapt_base_config()
        settings: Mapping[str, Any] = dict(self.speculator)
        if path := settings.get("path"):
            trained = read_checkpoint_info(path).config.to_dict()
            trained.pop("layer", None)  # follows from the base model
            settings = trained | settings
        parsed = SpeculatorSettings.parse(settings)
        self.speculator_config, self.speculator_training = parsed.config.for_base(self.hf_config), parsed.training
        self.draft_tokens = self._given_draft_tokens()
        if ensure_chat_template(self.tokenizer):
            logger.info("base %s has no chat template: using the plain default, 'Role: content'", self.path)
        self.end_token_ids = end_token_ids(self.tokenizer, self.generation_config)

    def _given_draft_tokens(self) -> torch.Tensor | None:
        if self.speculator_config.draft_vocab_size is None:
            return None
        if path := self.speculator_training.path:
            return read_weights(read_checkpoint_info(path))[DRAFT_TOKENS]
        if file := self.speculator_training.draft_vocab_file:
            return torch.tensor(DraftVocabulary.read(file).tokens)
        return None

    def _read_base_config(self) -> None:
        """verl's own reading of configuration and tokenizer, which accepts only directories."""
        if self.gguf_file is None:
            super().__post_init__()
            return
        paths = self.hf_config_path, self.tokenizer_path
        with TemporaryDirectory() as folder:
            self.form.write_description(self.path, Path(folder))
            self.hf_config_path, self.tokenizer_path = (path or folder for path in paths)
            super().__post_init__()
        self.hf_config_path, self.tokenizer_path = (path or self.path for path in paths)
        self.local_hf_config_path = self.local_tokenizer_path = self.local_path

    def _adapt_base_config(self) -> None:
        """Changes for architectures that verl does not expect."""
        requested = self.hf_config._attn_implementation
        attention = supported_attention(self.hf_config, requested)
        if attention != requested:
            logger.info("base %s has no attention by %s: using %s", self.path, requested, attention)
            self.hf_config._attn_implementation = attention
        text = self.hf_config.get_text_config()
        # verl reads it of every base model, for sequence parallelism only, and older architectures do not have it.
        if not hasattr(text, "num_key_value_heads") and hasattr(text, "num_attention_heads"):
            text.num_key_value_heads = text.num_attention_heads


@dataclass
class SpeculatorPolicyConfig(SpeculatorModelConfig):
    """The policy of PPO or GRPO, and the speculator that drafts its rollouts (`policy.PolicyEngine`)."""

    freeze_base_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.packing_required = False  # verl's own default for a policy is true
        training = self.speculator_training
        if self.freeze_base_model:
            raise UserError("model.freeze_base_model=true: a policy is trained; expected false")
        if self.lora_rank > 0:
            raise UserError(
                f"model.lora_rank={self.lora_rank}: a policy with a speculator trains whole weights; expected 0"
            )
        if not training.path and not training.train:
            raise UserError(
                "model.speculator.path=null: expected a trained one, or model.speculator.train=true for a fresh one"
            )
        if (size := self.speculator_config.draft_vocab_size) is not None and self.draft_tokens is None:
            raise UserError(
                f"model.speculator.draft_vocab_size={size}: PPO has no answers to count tokens in; expected "
                "model.speculator.draft_vocab_file, the draft_vocabulary.json of a run, or model.speculator.path"
            )
        self.speculator_training = replace(training, train=bool(training.train), detach_hidden=True)
