"""Checks of the data: files and columns by their footers, then every row with the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.chat_template import tokenize_conversation, tokenize_texts
from verl_speculator.data.conversations import check_messages, check_text, open_parquet, read_parquet
from verl_speculator.data.hidden_state_cache import BYTES, check_directory, check_space, identify_states
from verl_speculator.preflight.base_model import Base
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import evenly_spaced

SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class Rows:
    """The rows of parquet files that training reads.

    Attributes:
        setting: the setting that names the files.
        files: paths, in order.
        column: the column that holds the rows.
        is_text: whether it holds plain text; conversations otherwise.
        count: number of rows that are used.
    """

    setting: str
    files: list[str]
    column: str
    is_text: bool
    count: int

    def read(self, *more_columns: str) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
        """Batches of rows with the place of each: `column`, and those of `more_columns` that exist."""
        remaining = self.count
        for file in self.files:
            first = 0
            for batch in read_parquet(file, (self.column, *more_columns), file):
                rows = batch[:remaining]
                if not rows:
                    return
                yield [f"{self.setting}: {file}, row {i}" for i in range(first, first + len(rows))], rows
                first, remaining = first + len(rows), remaining - len(rows)


def _open_rows(config: DictConfig, setting: str, max_samples: int) -> Rows:
    data, files = config.data, list(OmegaConf.select(config, setting))
    if not files:
        raise UserError(f"{setting} is not set: expected one parquet file or a list of them")
    count, text_flags = 0, set()
    for file in files:
        with open_parquet(file, f"{setting}={file}") as parquet:
            count += parquet.metadata.num_rows
            names = parquet.schema_arrow.names
        if data.messages_key not in names and data.text_key not in names:
            raise UserError(
                f"{setting}={file}: no column {data.messages_key!r} (conversations) and none {data.text_key!r} (plain "
                f"text); it has {', '.join(names)}; set data.messages_key or data.text_key"
            )
        text_flags.add(data.messages_key not in names)
    if len(text_flags) > 1:
        raise UserError(f"{setting}: some files hold conversations and some plain text; expected one kind")
    (is_text,) = text_flags
    column = data.text_key if is_text else data.messages_key
    return Rows(setting, files, column, is_text, min(count, max_samples) if max_samples > 0 else count)


def check_data(config: DictConfig) -> tuple[Rows, Rows | None]:
    """Check files, columns and row counts by the files' footers; training and validation rows."""
    data = config.data
    train = _open_rows(config, "data.train_files", data.train_max_samples)
    val = _open_rows(config, "data.val_files", data.val_max_samples) if data.val_files else None
    if val is not None and val.is_text != train.is_text:
        kinds = ("conversations", "plain text")
        raise UserError(f"data.val_files hold {kinds[val.is_text]}, data.train_files {kinds[train.is_text]}")
    if train.count < data.train_batch_size:
        raise UserError(
            f"data.train_batch_size={data.train_batch_size}: the training files have only {train.count} rows"
        )
    return train, val


def check_rows(config: DictConfig, base: Base, rows: Rows) -> None:
    """Check that rows fit `data.max_length`, and that at least one has a token to draft."""
    data, has_target = config.data, rows.is_text
    must_fit = data.truncation == "error"
    for places, batch in rows.read(data.tools_key, data.enable_thinking_key):
        for place, row in zip(places, batch, strict=True):
            where = f"{place}: {rows.column}"
            if rows.is_text:
                check_text(row[rows.column], where, empty=True)
            else:
                check_messages(row[rows.column], where)
        if must_fit:
            _check_lengths(config, base, rows, places, batch)
        has_target = has_target or any(_has_target(config, base, row) for row in batch)
        if has_target and not must_fit and not rows.is_text:
            return
    if not has_target:
        raise UserError(
            f"{rows.setting}: no row has anything to draft: expected assistant messages of more than one token within "
            f"data.max_length={data.max_length}"
        )


def _check_lengths(config: DictConfig, base: Base, rows: Rows, places: list[str], batch: list[dict[str, Any]]) -> None:
    texts = [
        row[rows.column] if rows.is_text else _render(config, base.tokenizer, row, place)
        for place, row in zip(places, batch, strict=True)
    ]
    limit = config.data.max_length
    for place, ids in zip(places, tokenize_texts(base.tokenizer, texts, plain=rows.is_text), strict=True):
        if len(ids) > limit:
            raise UserError(
                f"{place} has {len(ids)} tokens, data.max_length is {limit}; raise it, or cut with "
                "data.truncation=right"
            )


def _render(config: DictConfig, tokenizer: Any, row: dict[str, Any], place: str, **options: Any) -> str:
    """A conversation as verl's dataset renders it, with the row's tools and thinking mode."""
    from jinja2 import TemplateError

    data = config.data
    options = {"add_generation_prompt": False, **data.apply_chat_template_kwargs, **options}
    thinking = row.get(data.enable_thinking_key, data.enable_thinking_default)
    if thinking is not None:
        options["enable_thinking"] = bool(thinking)
    try:
        return tokenizer.apply_chat_template(
            row[data.messages_key], tools=row.get(data.tools_key), tokenize=False, **options
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{place}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def _has_target(config: DictConfig, base: Base, row: dict[str, Any]) -> bool:
    """Whether an assistant's turn has two tokens within the length, the first of which does not end the turn."""
    key = config.data.messages_key
    for i, message in enumerate(row[key]):
        if message["role"] != "assistant" or i == 0:
            continue
        texts = [
            _render(config, base.tokenizer, row | {key: row[key][:end]}, "row", add_generation_prompt=end == i)
            for end in (i, i + 1)
        ]
        prompt_ids, ids = tokenize_texts(base.tokenizer, texts, plain=False)
        response = ids[len(prompt_ids) : config.data.max_length]
        if len(response) > 1 and response[0] not in base.end_token_ids:
            return True
    return False


def check_cache(config: DictConfig, base: Base, train: Rows) -> None:
    """Check that the directory of `data.cache_hidden_states` can be read or written. Reads a sample of the rows."""
    if config.data.cache_hidden_states is None:
        return
    directory = Path(config.data.cache_hidden_states)
    if check_directory(directory, identify_states(config, base.tokenizer)) or config.data.custom_cls.get("path"):
        return
    check_space(directory, _estimate_states(config, base, train) * base.hidden_size * BYTES, estimated=True)


def _estimate_states(config: DictConfig, base: Base, train: Rows) -> int:
    """The number of hidden states that the drafts of all rows read, estimated from a sample."""
    sample, counts = set(evenly_spaced(train.count, SAMPLED_ROWS)), []
    values = (row[train.column] for _, batch in train.read() for row in batch)
    for i, value in enumerate(values):
        if i not in sample:
            continue
        if train.is_text:
            mask = [1] * len(tokenize_texts(base.tokenizer, [value], plain=True)[0])
        else:
            _, mask = tokenize_conversation(base.tokenizer, value)
        counts.append(sum(mask[: config.data.max_length]))
    return sum(counts) * train.count // len(counts)
