"""Checks of the base and of the checkpoints that go with it. Of weights, only the speculator's are read."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_speculator.checkpoint import (
    STATE_DIRECTORY,
    find_resume_path,
    read_checkpoint_info,
    read_weights,
)
from verl_speculator.config import PREFIX, split_settings
from verl_speculator.errors import UserError
from verl_speculator.tokens import end_token_ids, ensure_chat_template


@dataclass(frozen=True)
class Base:
    """What the checks need of the base: its shape, tokenizer and end tokens."""

    hidden_size: int
    vocab_size: int
    tokenizer: Any
    end_token_ids: tuple[int, ...]


def check_base(config: DictConfig) -> Base:
    """Whether the base's configuration and tokenizer load. No weight is read."""
    name = config.model.path
    setting = f"model.partial_pretrain={name}"
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"{setting}: no such directory")
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{setting}: no model there (no config.json)")
    if path.exists() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{setting}: no weights there (no *.safetensors, no *.bin)")

    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    options = {"trust_remote_code": config.model.trust_remote_code}
    try:
        hf_config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer_path or name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        where = "" if path.exists() else "neither a directory nor a model that the hub gives: "
        raise UserError(f"{setting}: {where}{reason}") from None
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:
        generation = None
    if config.model.custom_chat_template is not None:
        tokenizer.chat_template = config.model.custom_chat_template
    ensure_chat_template(tokenizer)
    text_config = hf_config.get_text_config()
    return Base(
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        tokenizer=tokenizer,
        end_token_ids=end_token_ids(tokenizer, generation),
    )


def check_checkpoints(config: DictConfig, base: Base) -> None:
    """Whether the checkpoints to start from and to resume are whole, and of the speculator that is asked for."""
    wanted, training = split_settings(dict(config.model.speculator))
    resumed = find_resume_path(Path(config.trainer.default_local_dir), config.trainer)
    for setting, path in ((f"{PREFIX}path", training.path), ("resume", resumed)):
        if path is None:
            continue
        info = read_checkpoint_info(path)
        if differing := info.config.differences(wanted):
            raise UserError(
                f"{setting}={path}: the checkpoint differs (its own, this run's): {', '.join(differing)}"
                + ("; train elsewhere, or with trainer.resume_mode=disable" if setting == "resume" else "")
            )
        info.check_base(base.hidden_size, base.vocab_size)
        read_weights(info)
        for file in (info.directory / STATE_DIRECTORY).glob("*.pt") if setting == "resume" else []:
            if not zipfile.is_zipfile(file):
                raise UserError(f"{file}: truncated, or not a file of tensors")
