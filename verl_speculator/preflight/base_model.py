"""Checks of the base and of the checkpoints that go with it. Of weights, only the speculator's are read."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_speculator.base_model.chat_template import end_token_ids, ensure_chat_template
from verl_speculator.base_model.loading import BaseModelFormat, check_language_model
from verl_speculator.checkpoint.format import (
    BASE_DIRECTORY,
    CONFIG_FILE,
    STATE_DIRECTORY,
    STATE_FILES,
    CheckpointInfo,
    find_resume_path,
    read_checkpoint_info,
    read_weights,
)
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.config.schema import PREFIX, SpeculatorConfig, split_settings
from verl_speculator.data.run_record import RECORD, compare_records, earlier_record, record_settings
from verl_speculator.utils.errors import UserError

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class Base:
    """What the checks need of the base: its shape, tokenizer and end tokens, the shapes of the parameters of the block
    that an early exit trains, none without one, and the soft cap of the logits of a speculator that starts from it."""

    hidden_size: int
    vocab_size: int
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    block_shapes: dict[str, list[int]]
    logit_cap: float | None


def _load(setting: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """What `load` makes of a directory or hub name."""
    try:
        return load(name, **options)
    except Exception as error:  # OSError, ValueError, ImportError and, of a broken tokenizer.json, a bare Exception
        reason = " ".join(str(error).split())[:200]
        where = "" if Path(name).exists() else "no directory, and not to be had from the hub: "
        raise UserError(f"{setting}: {where}{reason}") from None


def _check_files(setting: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"{setting}: no model there (no config.json)")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{setting}: no weights there (no *.safetensors, no *.bin)")


def _check_form(setting: str, hf_config: Any, form: BaseModelFormat) -> None:
    """A base whose weights lie in 4 bits goes the way of one that is quantised here: verl would cast it."""
    lies = getattr(hf_config, "quantization_config", None) or {}
    method = lies.get("quant_method") if isinstance(lies, dict) else getattr(lies, "quant_method", None)
    if method == "bitsandbytes" and form.quantization is None:
        raise UserError(f"{setting}: its weights are quantised by bitsandbytes; expected model.quantization=bnb4")


def check_base(config: DictConfig) -> Base:
    """Whether the base's configuration and tokenizer load. No weight is read."""
    name, form = config.model.path, BaseModelFormat(config.model.quantization, config.model.gguf_file)
    setting = f"model.partial_pretrain={name}"
    path = Path(name)
    if not path.exists() and not HUB_NAME.match(name):
        raise UserError(f"{setting}: no such directory")
    form.check_file(name, "model.")
    if path.exists() and form.gguf_file is None:
        _check_files(setting, path)

    from transformers import AutoConfig, AutoTokenizer

    options = {"trust_remote_code": config.model.trust_remote_code}
    if form.gguf_file is not None:
        setting = f"model.gguf_file={form.gguf_file}"
    if named := config.model.hf_config_path:
        hf_config = _load(setting, AutoConfig.from_pretrained, named, **options)
    else:
        hf_config = _load(setting, AutoConfig.from_pretrained, name, **form.read_options, **options)
    _check_form(setting, hf_config, form)
    check_language_model(setting, hf_config)
    if named := config.model.tokenizer_path:
        tokenizer = _load(f"model.tokenizer_path={named}", AutoTokenizer.from_pretrained, named, **options)
    else:
        tokenizer = _load(setting, form.read_tokenizer, name, **options)
    if config.model.custom_chat_template is not None:
        tokenizer.chat_template = config.model.custom_chat_template
    ensure_chat_template(tokenizer)
    text_config = hf_config.get_text_config()
    return Base(
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        tokenizer=tokenizer,
        end_token_ids=end_token_ids(tokenizer, form.read_generation_config(name, hf_config)),
        block_shapes=_check_parts(config, hf_config),
        logit_cap=_logit_cap(config, hf_config),
    )


def _logit_cap(config: DictConfig, hf_config: Any) -> float | None:
    """The soft cap of the speculator's logits, where its heads are like the base's."""
    from verl_speculator.models import family_class
    from verl_speculator.models.logits import logit_transform

    copies = family_class(config.model.speculator.method).keeps_head_scale
    return logit_transform(hf_config).cap if copies else None


def _check_parts(config: DictConfig, hf_config: Any) -> dict[str, list[int]]:
    """Whether the base has the parts that a speculator copies; the shapes of its block, if it copies one."""
    from verl_speculator.models import family_class

    wanted, training = split_settings(dict(config.model.speculator))
    copies_head = training.path is None and training.init == "base" and family_class(wanted.method).keeps_head_scale
    if not (wanted.needs_base_modules or copies_head):
        return {}
    if blocks := getattr(hf_config.get_text_config(), "num_hidden_layers", None):
        wanted.check_blocks(blocks)
    import torch
    from transformers import AutoModelForCausalLM

    from verl_speculator.base_model.hidden_states import block_of, final_norm
    from verl_speculator.models.layers import block_shapes, check_copied_head

    with torch.device("meta"):  # the modules, without a weight
        shape = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=config.model.trust_remote_code)
    if copies_head:
        check_copied_head(shape)
    if wanted.needs_base_modules:
        final_norm(shape)
    if wanted.exit_layer is not None:
        block_of(shape, wanted.exit_layer)
    return block_shapes(shape, wanted)


def check_checkpoints(config: DictConfig, base: Base, train_rows: int) -> None:
    """Whether the checkpoints to start from and to resume are whole, and of the speculator that is asked for."""
    wanted, training = split_settings(dict(config.model.speculator))
    logit_cap = base.logit_cap
    if training.path is not None:  # it keeps the cap that it was trained with
        logit_cap = _check_speculator(f"{PREFIX}path={training.path}", training.path, wanted, base).logit_cap
    resumed = find_resume_path(Path(config.trainer.default_local_dir), config.trainer)
    if resumed is None:
        if training.init == "base" and training.path is None:
            _check_start(wanted, base)
        return
    setting = f"resume={resumed}"
    otherwise = "; start another run in a new <save_path> (model.speculator.path takes over the weights)"
    info = _check_speculator(setting, resumed, wanted, base, otherwise)
    _check_record(setting, info, config, base, train_rows, otherwise, info.differences(wanted, logit_cap))
    for name in STATE_FILES:
        file = resumed / STATE_DIRECTORY / name
        if not file.is_file():
            raise UserError(f"{file}: no such file{otherwise}")
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file}: truncated, or not a file of tensors")
    if not config.model.freeze_base_model and not (resumed / BASE_DIRECTORY / CONFIG_FILE).is_file():
        raise UserError(f"{resumed / BASE_DIRECTORY}: the trained base is not there{otherwise}")


def _check_start(wanted: SpeculatorConfig, base: Base) -> None:
    """Whether tables and heads are as wide as those of the base that they are to start from."""
    from verl_speculator.models import build_speculator
    from verl_speculator.models.layers import vocabulary_slots

    shape = build_speculator(
        wanted,
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        block_shapes=base.block_shapes,
        device="meta",
    )
    for _ in vocabulary_slots(shape):
        pass


def _check_speculator(
    setting: str, path: Any, wanted: SpeculatorConfig, base: Base, otherwise: str = ""
) -> CheckpointInfo:
    info = read_checkpoint_info(path)
    if differing := info.config.differences(wanted):
        raise UserError(f"{setting}: the checkpoint differs (its own, this run's): {', '.join(differing)}{otherwise}")
    info.check_base(base.hidden_size, base.vocab_size)
    read_weights(info)
    return info


def _check_record(
    setting: str,
    info: CheckpointInfo,
    config: DictConfig,
    base: Base,
    train_rows: int,
    otherwise: str,
    others: Sequence[str],
) -> None:
    """Whether the run goes on as what it began; values that may change on the way are named in one line.

    Args:
        others: differences between checkpoint and run that the record does not hold.
    """
    found = compare_records(*_records(info.provenance, config, base, train_rows))
    if refused := (*found.refused, *others):
        raise UserError(f"{setting}: the run differs (its own, this run's): {', '.join(refused)}{otherwise}")
    if found.adjusted:
        adjusted = ", ".join(found.adjusted)
        logger.warning("note: %s: goes on with this run's values (its own, this run's): %s", setting, adjusted)
    if found.unrecorded:
        names = ", ".join(found.unrecorded)
        logger.warning("note: %s: not compared, the checkpoint does not record %s", setting, names)


def _records(
    provenance: Mapping[str, Any], config: DictConfig, base: Base, train_rows: int
) -> tuple[dict[str, Any], ...]:
    """The record of a checkpoint and that of this run, with the base model's weights and the number of rows."""
    recorded = earlier_record(provenance) | provenance.get(RECORD, {})
    own = record_settings(config, base.tokenizer)
    # None of a base model that was trained: it is no longer the one that the run began with.
    if weights := provenance.get("base", {}).get("weights_fingerprint"):
        recorded["the base's weights"] = weights
        own["the base's weights"] = weights_fingerprint(config.model.path, config.model.gguf_file) or weights
    rows = provenance.get("data", {}).get("train_rows")
    if rows and not config.data.custom_cls.get("path"):
        recorded["rows of data.train_files"] = rows
        own["rows of data.train_files"] = train_rows
    return recorded, own
