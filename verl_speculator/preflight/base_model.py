"""Checks of the base model and of the checkpoints. Of weights, only the speculator's are read."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_speculator.base_model.chat_template import end_token_ids, ensure_chat_template
from verl_speculator.base_model.loading import BaseModelFormat, check_hub, check_language_model
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
from verl_speculator.config.draft_vocabulary import DraftVocabulary, check_size, vocabulary_digest
from verl_speculator.config.families import OWN
from verl_speculator.config.hydra import RunConfig
from verl_speculator.config.schema import PREFIX, SpeculatorConfig, SpeculatorSettings
from verl_speculator.data.run_record import RECORD, compare_records, earlier_record, record_settings
from verl_speculator.utils.settings import UserError, one_line

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?$")
NEW_RUN = "; start another run in a new <save_path> (model.speculator.path takes over the weights)"


@dataclass(frozen=True)
class Base:
    """What the checks need to know of the base model.

    Attributes:
        config: of the speculator, with what it takes from the base model's configuration.
        block_shapes: of the parameters of the decoder layer that an early exit trains, empty without one.
        logit_cap: the soft cap of a speculator's logits that starts from this base model.
    """

    config: SpeculatorConfig
    hidden_size: int
    vocab_size: int
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    block_shapes: dict[str, list[int]]
    logit_cap: float | None


def _load(setting: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Call `load` with a directory or hub name; its errors become one line."""
    try:
        return load(name, **options)
    except Exception as error:  # OSError, ValueError, ImportError and, for a broken tokenizer.json, a bare Exception
        where = "" if Path(name).exists() else "no directory, and not available from the hub: "
        raise UserError(f"{setting}: {where}{one_line(error)}") from None


def _check_files(setting: str, name: str, form: BaseModelFormat) -> None:
    """Check that a directory of a base model holds a configuration and weights."""
    path = Path(name)
    if not path.exists() and not HUB_NAME.match(name):
        raise UserError(f"{setting}: no such directory")
    form.check_file(name, "model.")
    check_hub(setting, name, form.gguf_file or "config.json")
    if not path.exists() or form.gguf_file is not None:
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{setting}: no model there (no config.json)")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{setting}: no weights there (no *.safetensors, no *.bin)")


def check_base(run: RunConfig) -> Base:
    """Check that the base model's configuration and tokenizer load. No weight is read."""
    model = run.tree.model
    name, form = model.path, BaseModelFormat(model.quantization, model.gguf_file)
    setting = f"model.partial_pretrain={name}"
    _check_files(setting, name, form)

    from transformers import AutoConfig, AutoTokenizer

    options = {"trust_remote_code": model.trust_remote_code}
    if form.gguf_file is not None:
        setting = f"model.gguf_file={form.gguf_file}"
    source, more = (model.hf_config_path, {}) if model.hf_config_path else (name, form.read_options)
    hf_config = _load(setting, AutoConfig.from_pretrained, source, **more, **options)
    quantized = getattr(hf_config, "quantization_config", None) or {}
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    if method == "bitsandbytes" and form.quantization is None:  # verl would cast the weights
        raise UserError(f"{setting}: its weights are quantised by bitsandbytes; expected model.quantization=bnb4")
    check_language_model(setting, hf_config)
    if path := model.tokenizer_path:
        tokenizer = _load(f"model.tokenizer_path={path}", AutoTokenizer.from_pretrained, path, **options)
    else:
        tokenizer = _load(setting, form.read_tokenizer, name, **options)
    if model.custom_chat_template is not None:
        tokenizer.chat_template = model.custom_chat_template
    ensure_chat_template(tokenizer)
    text_config, generation_config = hf_config.get_text_config(), form.read_generation_config(name, hf_config)
    config = run.speculator.config.for_base(hf_config)
    sizes = (config, text_config.hidden_size, text_config.vocab_size)
    copied = _check_copied_modules(replace(run.speculator, config=config), hf_config, **options)
    ends = end_token_ids(tokenizer, generation_config)
    check_size(run.speculator.config.draft_vocab_size, text_config.vocab_size, ends)
    if file := run.speculator.training.draft_vocab_file:
        DraftVocabulary.read(file).check(file, text_config.vocab_size, vocabulary_digest(tokenizer), ends)
    return Base(*sizes, tokenizer, ends, *copied)


def _check_copied_modules(
    settings: SpeculatorSettings, hf_config: Any, **options: Any
) -> tuple[dict[str, list[int]], float | None]:
    """Check that the base model has the modules that a speculator copies; `Base.block_shapes` and `Base.logit_cap`."""
    from verl_speculator.models import family_class
    from verl_speculator.models.speculator import logit_transform

    config, training = settings.config, settings.training
    keeps_head_scale = family_class(config.method).keeps_head_scale
    logit_cap = logit_transform(hf_config).cap if keeps_head_scale else None
    copies_head = training.path is None and training.init == "base" and keeps_head_scale
    if not (config.needs_base_modules or config.base_tables or copies_head):
        return {}, logit_cap
    if layers := getattr(hf_config.get_text_config(), "num_hidden_layers", None):
        config.check_blocks(layers)
    import torch
    from transformers import AutoModelForCausalLM

    from verl_speculator.base_model.hidden_states import block_of, final_norm, layer_or_norm
    from verl_speculator.models.layers import block_shapes, check_copied_head

    with torch.device("meta"):  # the modules, without a weight
        model = AutoModelForCausalLM.from_config(hf_config, **options)
    if copies_head:
        check_copied_head(model)
    if "head" in config.base_tables:
        check_copied_head(model, f"{PREFIX}head={config.head}", f"{PREFIX}head=own")
    if config.needs_base_modules and not (config.reads_sequence and config.head == OWN):
        final_norm(model)
    if config.exit_layer is not None:
        block_of(model, config.exit_layer)
    for layer in config.aux_layers or ():
        layer_or_norm(model, layer)
    return block_shapes(model, config), logit_cap


def check_checkpoints(run: RunConfig, base: Base, train_rows: int) -> None:
    """Check that the checkpoints to start from and to resume are complete, and fit this run."""
    tree, config, training = run.tree, base.config, run.speculator.training
    logit_cap = base.logit_cap
    if training.path is not None:  # it keeps the cap that it was trained with
        logit_cap = _check_speculator(f"{PREFIX}path={training.path}", training.path, config, base).logit_cap
    checkpoint = find_resume_path(Path(tree.trainer.default_local_dir), tree.trainer)
    if checkpoint is None:
        if training.init == "base" and training.path is None:
            _check_initial_widths(config, base)
        return
    setting = f"resume={checkpoint}"
    info = _check_speculator(setting, checkpoint, config, base, NEW_RUN)
    _check_record(setting, info, run, base, train_rows, logit_cap)
    for file in (checkpoint / STATE_DIRECTORY / name for name in STATE_FILES):
        if not file.is_file():
            raise UserError(f"{file}: no such file{NEW_RUN}")
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file}: truncated, or not a file of tensors")
    if not tree.model.freeze_base_model and not (checkpoint / BASE_DIRECTORY / CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint / BASE_DIRECTORY}: the trained base is not there{NEW_RUN}")


def _check_initial_widths(config: SpeculatorConfig, base: Base) -> None:
    """Check that embeddings and LM heads have the width of the base model's, from which they are copied."""
    from verl_speculator.models import build_speculator
    from verl_speculator.models.layers import vocabulary_slots

    shape = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size, "block_shapes": base.block_shapes}
    for _ in vocabulary_slots(build_speculator(config, **shape, device="meta")):
        pass


def _check_speculator(
    setting: str, path: Any, config: SpeculatorConfig, base: Base, advice: str = ""
) -> CheckpointInfo:
    info = read_checkpoint_info(path)
    if differences := info.config.differences(config):
        raise UserError(f"{setting}: the checkpoint differs (its own, this run's): {', '.join(differences)}{advice}")
    info.check_base(base.hidden_size, base.vocab_size)
    read_weights(info)
    return info


def _check_record(
    setting: str, info: CheckpointInfo, run: RunConfig, base: Base, train_rows: int, logit_cap: float | None
) -> None:
    """Check that the run continues the one that wrote the checkpoint; one line names values that may change."""
    comparison = compare_records(*_records(info.provenance, run, base, train_rows))
    if refused := (*comparison.refused, *info.differences(base.config, logit_cap)):
        raise UserError(f"{setting}: the run differs (its own, this run's): {', '.join(refused)}{NEW_RUN}")
    for text, names in (
        ("goes on with this run's values (its own, this run's):", comparison.adjusted),
        ("not compared, the checkpoint does not record", comparison.unrecorded),
    ):
        if names:
            logger.warning("note: %s: %s %s", setting, text, ", ".join(names))


def _records(
    provenance: Mapping[str, Any], run: RunConfig, base: Base, train_rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of a checkpoint and that of this run, with the base model's weights and the number of rows."""
    model = run.tree.model
    recorded = earlier_record(provenance) | provenance.get(RECORD, {})
    current = record_settings(run.tree, run.speculator.training, base.tokenizer)
    # A base model that was trained has no fingerprint: it is no longer the one that the run began with.
    if weights := provenance.get("base", {}).get("weights_fingerprint"):
        recorded["the base's weights"] = weights
        current["the base's weights"] = weights_fingerprint(model.path, model.gguf_file) or weights
    rows = provenance.get("data", {}).get("train_rows")
    if rows and not run.tree.data.custom_cls.get("path"):
        recorded["rows of data.train_files"] = rows
        current["rows of data.train_files"] = train_rows
    return recorded, current
