"""Checks of the data: files and columns from their footers, then every row against the tokenizer."""

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
from verl_speculator.utils.process import spread


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
        left = self.count
        for file in self.files:
            first = 0
            for batch in read_parquet(file, (self.column, *others), file):
                rows = batch[:left]
                if not rows:
                    return
                yield file, first, rows
                first, left = first + len(rows), left - len(rows)


def _rows(config: DictConfig, key: str, max_samples: int) -> Rows:
    data, files = config.data, list(OmegaConf.select(config, key))
    if not files:
        raise UserError(f"{key} is not set: expected one parquet file or a list of them")
    count, texts = 0, set()
    for file in files:
        with open_parquet(file, f"{key}={file}") as parquet:
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


def check_rows(config: DictConfig, base: Base, rows: Rows, key: str) -> None:
    """Whether rows fit `data.max_length`, and whether any has something to draft."""
    data, useful = config.data, False
    must_fit = data.truncation == "error"
    for file, first, batch in rows.read(data.tools_key, data.enable_thinking_key):
        for i, row in enumerate(batch, first):
            where = f"{key}: {file}, row {i}: {rows.column}"
            if rows.text:
                check_text(row[rows.column], where, empty=True)
            else:
                check_messages(row[rows.column], where)
        if must_fit:
            texts = [
                row[rows.column] if rows.text else _render(config, base.tokenizer, row, f"{key}: {file}, row {i}")
                for i, row in enumerate(batch, first)
            ]
            for i, ids in enumerate(tokenize_texts(base.tokenizer, texts, plain=rows.text), first):
                if len(ids) > data.max_length:
                    raise UserError(
                        f"{key}: {file}, row {i} has {len(ids)} tokens, data.max_length is {data.max_length}; "
                        "raise it, or cut with data.truncation=right"
                    )
        useful = useful or rows.text or any(_has_target(config, base, row) for row in batch)
        if useful and not must_fit and not rows.text:
            return
    if not useful:
        raise UserError(
            f"{key}: no row has anything to draft: expected assistant messages of more than one token within "
            f"data.max_length={data.max_length}"
        )


def _render(config: DictConfig, tokenizer: Any, row: dict[str, Any], where: str, **options: Any) -> str:
    from jinja2 import TemplateError

    data = config.data
    options = {"add_generation_prompt": False, **data.apply_chat_template_kwargs, **options}
    thinking = row.get(data.enable_thinking_key, data.enable_thinking_default)
    if thinking is not None:  # as verl's dataset reads it
        options["enable_thinking"] = bool(thinking)
    try:
        return tokenizer.apply_chat_template(
            row[data.messages_key], tools=row.get(data.tools_key), tokenize=False, **options
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def _has_target(config: DictConfig, base: Base, row: dict[str, Any]) -> bool:
    """Whether an assistant's turn leaves two tokens within the length, the first of which does not end it."""
    key, limit = config.data.messages_key, config.data.max_length
    for i, message in enumerate(row[key]):
        if message["role"] != "assistant" or i == 0:
            continue
        before, after = (
            _render(config, base.tokenizer, row | {key: row[key][:end]}, "row", add_generation_prompt=prompt)
            for end, prompt in ((i, True), (i + 1, False))
        )
        prompt_ids, all_ids = tokenize_texts(base.tokenizer, [before, after], plain=False)
        response = all_ids[len(prompt_ids) : limit]
        if len(response) > 1 and response[0] not in base.end_token_ids:
            return True
    return False


SAMPLE = 1000


def check_cache(config: DictConfig, base: Base, train: Rows) -> None:
    """Whether the states named by `data.cache_hidden_states` can be read or written. Reads a sample of the rows."""
    if config.data.cache_hidden_states is None:
        return
    directory = Path(config.data.cache_hidden_states)
    if check_directory(directory, identify_states(config, base.tokenizer)) or config.data.custom_cls.get("path"):
        return
    check_space(directory, _count_states(config, base, train) * base.hidden_size * BYTES, estimated=True)


def _count_states(config: DictConfig, base: Base, train: Rows) -> int:
    """About how many states the drafts of all rows read, from a sample."""
    chosen, counts = set(spread(train.count, SAMPLE)), []
    rows = (row for _, _, batch in train.read() for row in batch)
    for i, row in enumerate(rows):
        if i not in chosen:
            continue
        if train.text:
            mask = [1] * len(tokenize_texts(base.tokenizer, [row[train.column]], plain=True)[0])
        else:
            _, mask = tokenize_conversation(base.tokenizer, row[train.column])
        counts.append(sum(mask[: config.data.max_length]))
    return sum(counts) * train.count // len(counts)
