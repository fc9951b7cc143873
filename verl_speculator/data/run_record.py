"""The record of a run's settings and data, and what a changed value means to a run that resumes it.

The trainer writes the record into a checkpoint's `config.json`; the checks before a run compare it with the run's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_speculator.base_model.loading import BaseModelFormat
from verl_speculator.checkpoint.provenance import data_fingerprint, file_digest
from verl_speculator.config.draft_vocabulary import DraftVocabulary, tokens_digest
from verl_speculator.config.schema import PREFIX, SpeculatorTraining
from verl_speculator.data.hidden_state_cache import IRRELEVANT, tokenizer_digest

if TYPE_CHECKING:
    from omegaconf import DictConfig

RECORD = "settings"  # the record's key in a checkpoint's provenance
TRAIN_CONTENTS, VAL_CONTENTS = "the contents of data.train_files", "the contents of data.val_files"
TOKENIZER, BASE_CONFIGURATION = "the tokenizer or its chat template", "the base model's configuration"
CUSTOM_CODE = "the code of data.custom_cls"
DRAFT_VOCABULARY = "the tokens of model.speculator.draft_vocab_file"
# Recorded as digests, which say nothing to a reader.
DIGESTS = (TRAIN_CONTENTS, VAL_CONTENTS, TOKENIZER, BASE_CONFIGURATION, CUSTOM_CODE, DRAFT_VOCABULARY)
# Entries of a base model's configuration that name its writer, or its dtype, which is a setting here.
WRITER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
# With other values of these settings an optimizer cannot continue from the recorded state.
OPTIMIZER_KIND = ("optim.optimizer", "optim.optimizer_impl")
# Settings of `data` that the number of rows covers, or that have the same value in every run.
UNRECORDED_DATA = {*IRRELEVANT, "train_max_samples", "pad_mode", "custom_cls"}
UNRECORDED_OPTIM = {"_target_", "total_training_steps"}
ADJUSTABLE = (PREFIX + "lr", "trainer.total_epochs", "trainer.total_training_steps", VAL_CONTENTS)


def record_settings(config: DictConfig, training: SpeculatorTraining, tokenizer: Any) -> dict[str, Any]:
    """Every setting that decides what a run computes, by its name, as JSON values.

    A setting that has no effect in this run, such as η without the loss that reads it, is left out.

    Args:
        config: the resolved configuration.
        training: its `model.speculator.*` settings of training.
        tokenizer: of the base model, with the chat template that training uses.
    """
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config)
    record = {
        **_objective(tree["model"], training),
        **_data(tree["data"]),
        "model.custom_chat_template": tree["model"]["custom_chat_template"],
        TOKENIZER: tokenizer_digest(tokenizer),
        BASE_CONFIGURATION: _base_configuration(tree["model"]),
        "trainer.seed": tree["trainer"]["seed"],
        **{f"optim.{name}": value for name, value in tree["optim"].items() if name not in UNRECORDED_OPTIM},
        PREFIX + "lr": tree["optim"]["lr"] if training.lr is None else training.lr,
        **{f"trainer.{name}": tree["trainer"][name] for name in ("total_epochs", "total_training_steps")},
        "engine.model_dtype": tree["engine"]["model_dtype"],
        "engine.mixed_precision.param_dtype": (tree["engine"]["mixed_precision"] or {}).get("param_dtype"),
        "model.override_config": tree["model"]["override_config"],
    }
    return json.loads(json.dumps(record, default=str))


def _objective(model: Mapping[str, Any], training: SpeculatorTraining) -> dict[str, Any]:
    objective, frozen, file = training.objective, model["freeze_base_model"], training.draft_vocab_file
    losses = dict(objective.weights)
    return {
        "model.freeze_base_model": frozen,
        "model.quantization": model["quantization"] or "null",
        "model.speculator_loss_coeff": float(model["speculator_loss_coeff"]),
        PREFIX + "loss": losses,
        PREFIX + "depth_weights": objective.weights_of_depths,
        **({PREFIX + "kl_temperature": objective.kl_temperature} if "kl" in losses else {}),
        **({PREFIX + "lk_eta": objective.lk_eta} if "lk" in losses else {}),
        **({} if frozen else {PREFIX + "detach_hidden": training.detach_hidden}),
        **({} if file is None else {DRAFT_VOCABULARY: tokens_digest(DraftVocabulary.read(file).tokens)}),
    }


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    unread = UNRECORDED_DATA | ({"max_length"} if data["truncation"] == "error" else set())  # nothing is cut there
    custom = data["custom_cls"]
    return {
        "data.train_batch_size": data["train_batch_size"],
        **{f"data.{name}": value for name, value in data.items() if name not in unread},
        TRAIN_CONTENTS: [_digest(file, data_fingerprint) for file in data["train_files"] or []],
        VAL_CONTENTS: [_digest(file, data_fingerprint) for file in data["val_files"] or []],
        # The user's dataset class and a digest of its file; None for verl's class.
        CUSTOM_CODE: [custom.get("name"), _digest(custom["path"], file_digest)] if custom.get("path") else None,
    }


def _digest(file: str, digest: Callable[[Path], str]) -> str:
    """The digest of a file; the name itself if it is no file, since custom datasets may read other things."""
    return digest(Path(file)) if Path(file).is_file() else str(file)


def _base_configuration(model: Mapping[str, Any]) -> str:
    """A digest of the base model's configuration file."""
    from transformers import PretrainedConfig

    reading = {} if model["hf_config_path"] else BaseModelFormat(None, model["gguf_file"]).read_options
    values, _ = PretrainedConfig.get_config_dict(model["hf_config_path"] or model["path"], **reading)
    values = {name: value for name, value in values.items() if name not in WRITER}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def earlier_record(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the record that other sections of a provenance hold, for checkpoints without a record."""
    base, training = (provenance.get(section, {}) for section in ("base", "training"))
    joint = base.get("trained_jointly")
    known = {
        "model.freeze_base_model": None if joint is None else not joint,
        # A checkpoint that names none was trained on the hidden states of the unquantized base model.
        "model.quantization": base.get("quantization") or "null",
        "data.train_batch_size": training.get("train_batch_size"),
        "optim.lr": training.get("lr"),
        PREFIX + "lr": training.get("speculator_lr") or training.get("lr"),
        "trainer.seed": training.get("seed"),
        "model.speculator_loss_coeff": training.get("speculator_loss_coeff"),
        **{PREFIX + name: training.get(name) for name in ("loss", "kl_temperature", "depth_weights")},
    }
    return {name: value for name, value in known.items() if value is not None}


class Comparison(NamedTuple):
    """A checkpoint's record compared with that of a run which resumes it; the checkpoint's value is named first.

    Attributes:
        refused: settings with which the run would be another one: its objective, its rows or their order.
        adjusted: settings that a run may continue with in another value.
        unrecorded: names of settings that the checkpoint does not record.
    """

    refused: tuple[str, ...]
    adjusted: tuple[str, ...]
    unrecorded: tuple[str, ...]


def compare_records(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> Comparison:
    """Compare a checkpoint's record with that of the current run."""
    differing = {
        name: name if name in DIGESTS else f"{name} ({_format(recorded[name])}, {_format(current[name])})"
        for name in current
        if name in recorded and recorded[name] != current[name]
    }
    return Comparison(
        refused=tuple(text for name, text in differing.items() if not _is_adjustable(name)),
        adjusted=tuple(text for name, text in differing.items() if _is_adjustable(name)),
        unrecorded=tuple(name for name in current if name not in recorded),
    )


def _is_adjustable(name: str) -> bool:
    optimizer = name.startswith("optim.") and name not in OPTIMIZER_KIND
    return optimizer or name in ADJUSTABLE or name.startswith(("engine.", "model.override_config"))


def _format(value: Any) -> str:
    """A value as it is written on a command line."""
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
