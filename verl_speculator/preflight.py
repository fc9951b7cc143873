"""Everything that can be wrong with a training run, found before the base model loads and before anything is written.

The checks run in one light process, from the cheapest to the dearest. Each raises `UserError` with one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_speculator.chat import end_token_ids, ensure_chat_template
from verl_speculator.checkpoint import (
    STATE_DIRECTORY,
    WEIGHTS_FILE,
    find_resume_path,
    read_checkpoint_info,
    read_weights,
)
from verl_speculator.config import PREFIX, split_settings
from verl_speculator.errors import UserError, nearest
from verl_speculator.settings import flash_attention_installed

ROWS_AT_A_TIME = 512
# Features of verl's engine that change the module or the forward pass which the speculator is attached to.
UNSUPPORTED = {
    "engine.ulysses_sequence_parallel_size": 1,
    "engine.forward_only": False,
    "engine.qat.enable": False,
    "model.lora_rank": 0,
    "model.lora_adapter_path": None,
    "model.use_fused_kernels": False,
    "data.pad_mode": "no_padding",
}


def check_run(config: DictConfig, *, processes: int, processes_per_node: int) -> None:
    """All checks of a resolved configuration.

    Args:
        config: from `settings.load_settings`.
        processes: over all nodes.
        processes_per_node: on this one.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_settings(config)
    check_device(config, processes_per_node)
    check_batch(config, processes)
    train, val = check_data(config)
    base = check_base(config)
    check_checkpoints(config, base)
    if not config.data.custom_cls.get("path"):
        check_rows(config, base, train, "data.train_files")
        if val is not None:
            check_rows(config, base, val, "data.val_files")


# Settings


def _get(config: DictConfig, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = None if node is None else node.get(part)
    return node


def _whole(config: DictConfig, key: str, least: int, also: Sequence[Any] = ()) -> None:
    value = _get(config, key)
    if value in also and not isinstance(value, bool):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = "".join(f" or {a}" for a in also if a is not None)
        raise UserError(f"{key}={value}: expected an integer of at least {least}{more}")


def _number(config: DictConfig, key: str, *, positive: bool) -> None:
    value = _get(config, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (positive and value == 0):
        raise UserError(f"{key}={value}: expected a {'positive ' if positive else 'non-negative '}number")


def check_settings(config: DictConfig) -> None:
    """Values of single settings."""
    for key in ("data.train_batch_size", "data.micro_batch_size_per_gpu", "data.max_length", "trainer.total_epochs"):
        _whole(config, key, 1)
    _whole(config, "data.num_workers", 0)
    _whole(config, "trainer.total_training_steps", 1, also=(None,))
    for key in ("trainer.save_freq", "trainer.test_freq"):
        _whole(config, key, -1, also=("after_each_epoch",))
    _whole(config, "trainer.max_ckpt_to_keep", 1, also=(None,))
    _number(config, "optim.lr", positive=True)
    _number(config, "model.speculator_loss_coeff", positive=config.model.freeze_base_model)
    for key in ("model.freeze_base_model", "data.use_dynamic_bsz", "model.use_remove_padding"):
        if not isinstance(_get(config, key), bool):
            raise UserError(f"{key}={_get(config, key)}: expected true or false")
    modes = ("auto", "disable", "resume_path")
    if config.trainer.resume_mode not in modes:
        raise UserError(
            f"trainer.resume_mode={config.trainer.resume_mode}: expected one of {', '.join(modes)}"
            + nearest(str(config.trainer.resume_mode), modes)
        )
    if config.data.truncation not in ("error", "left", "right"):
        raise UserError(f"data.truncation={config.data.truncation}: expected error, left or right")
    for key, only in UNSUPPORTED.items():
        if _get(config, key) != only:
            raise UserError(f"{key}={_get(config, key)}: a speculator trains with {key}={json.dumps(only)} only")


def check_device(config: DictConfig, processes_per_node: int) -> None:
    """Whether the device has what is asked of it."""
    device, strategy = config.trainer.device, config.engine.strategy
    if strategy not in ("fsdp", "fsdp2"):
        raise UserError(f"engine.strategy={strategy}: expected fsdp2 or fsdp" + nearest(strategy, ("fsdp2", "fsdp")))
    if device == "cpu" and strategy == "fsdp":
        raise UserError("engine.strategy=fsdp: torch has no FSDP1 for the CPU; use engine.strategy=fsdp2")
    attention = config.model.override_config.get("attn_implementation")
    if attention == "flash_attention_2" and not flash_attention_installed():
        raise UserError(
            "model.override_config.attn_implementation=flash_attention_2: the package flash-attn is not installed; "
            "install it or use sdpa"
        )
    if attention == "flash_attention_2" and device == "cpu":
        raise UserError("model.override_config.attn_implementation=flash_attention_2: not on a CPU; use sdpa")
    if device in ("cuda", "npu"):
        import torch

        available = getattr(torch, device).device_count() if hasattr(torch, device) else 0
        if available < processes_per_node:
            raise UserError(
                f"nproc_per_node={processes_per_node}: this machine has {available} {device} device(s); "
                "trainer.device=cpu trains without any"
            )


def check_batch(config: DictConfig, processes: int) -> None:
    """Whether the global batch can be cut as asked."""
    data = config.data
    if data.train_batch_size % processes:
        raise UserError(f"data.train_batch_size={data.train_batch_size}: not divisible by {processes} processes")
    per_rank = data.train_batch_size // processes
    if not data.use_dynamic_bsz and per_rank % data.micro_batch_size_per_gpu:
        raise UserError(
            f"data.train_batch_size={data.train_batch_size}: its {per_rank} rows per process are not divisible by "
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu}"
        )


# Data


@dataclass(frozen=True)
class Rows:
    """The column of some parquet files that training reads.

    Attributes:
        files: paths, in order.
        column: the one that holds the rows.
        text: whether that is plain text; conversations otherwise.
        count: rows that are used.
    """

    files: list[str]
    column: str
    text: bool
    count: int

    def read(self, *others: str) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
        """Rows as dictionaries with `column` and those of `others` that exist: (file, index of the first, rows)."""
        import pyarrow.parquet as pq

        left = self.count
        for file in self.files:
            parquet, first = pq.ParquetFile(file), 0
            columns = [name for name in (self.column, *others) if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=columns):
                rows = batch.to_pylist()[:left]
                if not rows:
                    return
                yield file, first, rows
                first, left = first + len(rows), left - len(rows)


def _rows(config: DictConfig, key: str, max_samples: int) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, files = config.data, list(_get(config, key))
    if not files:
        raise UserError(f"{key} is not set: expected one parquet file or a list of them")
    count, texts = 0, set()
    for file in files:
        path = Path(file)
        if not path.exists():
            raise UserError(f"{key}={file}: no such file")
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{key}={file}: not a parquet file ({str(error).splitlines()[0]})") from None
        if parquet.metadata.num_rows == 0:
            raise UserError(f"{key}={file}: holds no rows")
        count += parquet.metadata.num_rows
        names = parquet.schema_arrow.names
        if data.messages_key not in names and data.text_key not in names:
            raise UserError(
                f"{key}={file}: no column {data.messages_key!r} (conversations) and none {data.text_key!r} (plain "
                f"text); it has {', '.join(names)}; set data.messages_key or data.text_key"
            )
        texts.add(data.messages_key not in names)
    if len(texts) > 1:
        raise UserError(f"{key}: some files hold conversations and some plain text; expected one kind")
    text = texts.pop()
    if max_samples > 0:
        count = min(count, max_samples)
    return Rows(files, data.text_key if text else data.messages_key, text, count)


def check_data(config: DictConfig) -> tuple[Rows, Rows | None]:
    """Files, columns and row counts, read from the files' footers."""
    data = config.data
    train = _rows(config, "data.train_files", data.train_max_samples)
    val = _rows(config, "data.val_files", data.val_max_samples) if data.val_files else None
    if val is not None and val.text != train.text:
        kinds = ("conversations", "plain text")
        raise UserError(f"data.val_files hold {kinds[val.text]}, data.train_files {kinds[train.text]}")
    if train.count < data.train_batch_size:
        raise UserError(
            f"data.train_batch_size={data.train_batch_size}: the training files have only {train.count} rows"
        )
    return train, val


# Base


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
    import zipfile

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
        states = (info.directory / STATE_DIRECTORY).glob("*.pt") if setting == "resume" else []
        for file in (info.directory / WEIGHTS_FILE, *states):
            if not zipfile.is_zipfile(file):
                raise UserError(f"{file}: truncated, or not a file of tensors")


# Rows


def check_rows(config: DictConfig, base: Base, rows: Rows, key: str) -> None:
    """Whether rows fit `data.max_length`, and whether any has something to draft."""
    data, useful = config.data, False
    must_fit = data.truncation == "error"
    for file, first, batch in rows.read(data.tools_key):
        if must_fit:
            texts = [
                row[rows.column] if rows.text else _render(config, base.tokenizer, row, f"{key}: {file}, row {i}")
                for i, row in enumerate(batch, first)
            ]
            for i, ids in enumerate(base.tokenizer(texts, add_special_tokens=rows.text)["input_ids"]):
                length = len(ids) + (rows.text and ids[-1:] != [base.tokenizer.eos_token_id])
                if length > data.max_length:
                    raise UserError(
                        f"{key}: {file}, row {first + i} has {length} tokens, data.max_length is {data.max_length}; "
                        "raise it, or cut with data.truncation=right"
                    )
        useful = useful or rows.text or any(_has_target(config, base, row) for row in batch)
        if useful and not must_fit:
            return
    if not useful:
        raise UserError(
            f"{key}: no row has anything to draft: expected assistant messages of more than one token within "
            f"data.max_length={data.max_length}"
        )


def _render(config: DictConfig, tokenizer: Any, row: dict[str, Any], where: str, **options: Any) -> str:
    from jinja2 import TemplateError

    messages = row[config.data.messages_key]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
        raise UserError(f"{where}: {config.data.messages_key} is no list of messages with a role and a content")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=row.get(config.data.tools_key),
            tokenize=False,
            **{"add_generation_prompt": False, **config.data.apply_chat_template_kwargs, **options},
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def _has_target(config: DictConfig, base: Base, row: dict[str, Any]) -> bool:
    """Whether an assistant's turn leaves two tokens within the length, the first of which does not end it."""
    key, limit = config.data.messages_key, config.data.max_length
    for i, message in enumerate(row[key]):
        if message["role"] != "assistant" or not message.get("content") or i == 0:
            continue
        before, after = (
            _render(config, base.tokenizer, row | {key: row[key][:end]}, "row", add_generation_prompt=prompt)
            for end, prompt in ((i, True), (i + 1, False))
        )
        start = len(base.tokenizer(before, add_special_tokens=False)["input_ids"])
        response = base.tokenizer(after, add_special_tokens=False)["input_ids"][start:limit]
        if len(response) > 1 and response[0] not in base.end_token_ids:
            return True
    return False
