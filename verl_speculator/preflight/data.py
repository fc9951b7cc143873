"""Checks of the data: files and columns by their footers, then every row with the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_speculator.base_model.chat_template import thinking_tokens, tokenize_conversation, tokenize_texts
from verl_speculator.data.conversations import (
    check_messages,
    check_text,
    find_suffix,
    open_parquet,
    open_rows,
    read_parquet,
    read_tools,
)
from verl_speculator.data.formats import CONVERSATION_FORMATS, TEXT, columns_read, recognise
from verl_speculator.data.hidden_state_cache import BYTES, check_directory, check_space, identify_states
from verl_speculator.preflight.base_model import Base
from verl_speculator.utils.process import evenly_spaced
from verl_speculator.utils.settings import UserError, one_line

SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class Rows:
    """The first `count` rows of parquet files, in one column: plain texts or conversations."""

    setting: str  # names the files
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


def _open_rows(config: DictConfig, split: str) -> Rows:
    """Check the files of a split (train or val) and their columns by the footers."""
    data, setting = config.data, f"data.{split}_files"
    files, max_samples = list(data[f"{split}_files"]), data[f"{split}_max_samples"]
    if not files:
        raise UserError(f"{setting} is not set: expected one parquet file or a list of them")
    count, text_flags = 0, set()
    for file in files:
        if Path(file).is_file() and find_suffix(file, hub=False) != ".parquet":
            raise UserError(f"{setting}={file}: expected parquet; {_how_to_convert(config, file, [])}")
        with open_parquet(file, f"{setting}={file}") as parquet:
            count += parquet.metadata.num_rows
            names = parquet.schema_arrow.names
        if data.messages_key not in names and data.text_key not in names:
            raise UserError(
                f"{setting}={file}: no column {data.messages_key!r} (conversations) and none {data.text_key!r} (plain "
                f"text); it has {', '.join(names)}; {_how_to_convert(config, file, names)}"
            )
        text_flags.add(data.messages_key not in names)
    if len(text_flags) > 1:
        raise UserError(f"{setting}: some files hold conversations and some plain text; expected one kind")
    (is_text,) = text_flags
    column = data.text_key if is_text else data.messages_key
    return Rows(setting, files, column, is_text, min(count, max_samples) if max_samples > 0 else count)


def _how_to_convert(config: DictConfig, file: str, names: list[str]) -> str:
    """The command that makes training data of a file in another format."""
    path = Path(file)
    _, rows = open_rows(file, columns_read(), find_suffix(file, hub=False))
    row = next(rows, {})
    if recognise(row, [*CONVERSATION_FORMATS, TEXT]) is not None:
        out = path.with_suffix("")
        return f"`verl-speculator prepare {file} --out {out}` makes {out}/train.parquet of it"
    if isinstance(row.get("prompt"), (str, list)) or isinstance(row.get("turns"), list):
        out = path.with_suffix(".answers.parquet")
        return f"`verl-speculator regenerate --base {config.model.path} --data {file} --out {out}` answers its prompts"
    return "set data.messages_key or data.text_key" if names else "see docs/data.md for the formats that prepare reads"


def check_data(config: DictConfig) -> tuple[Rows, Rows | None]:
    """Check files, columns and row counts; training and validation rows."""
    data = config.data
    train = _open_rows(config, "train")
    val = _open_rows(config, "val") if data.val_files else None
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
                row[rows.column] = check_messages(row[rows.column], where)
        if must_fit:
            _check_lengths(config, base, rows, places, batch)
        has_target = has_target or any(_has_target(config, base, row) for row in batch)
        if has_target and not must_fit and not rows.is_text:
            return
    if not has_target:
        raise UserError(
            f"{rows.setting}: no row has anything to draft: expected assistant messages of more than one token within "
            f"data.max_length={data.max_length}{'' if data.thinking_targets else ', with data.thinking_targets=false'}"
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
            row[data.messages_key], tools=read_tools(row.get(data.tools_key)), tokenize=False, **options
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{place}: the chat template refuses it: {one_line(error)}") from None


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
        if not config.data.thinking_targets:
            left_out = set(thinking_tokens(base.tokenizer, response))
            response = [token for i, token in enumerate(response) if i not in left_out]
        if len(response) > 1 and response[0] not in base.end_token_ids:
            return True
    return False


def check_cache(config: DictConfig, base: Base, train: Rows) -> None:
    """Check that the directory of `data.cache_hidden_states` can be read, or has the space for what is written."""
    if config.data.cache_hidden_states is None:
        return
    directory = Path(config.data.cache_hidden_states)
    if check_directory(directory, identify_states(config, base.tokenizer)) or config.data.custom_cls.get("path"):
        return
    # The hidden states that the drafts of all rows read, estimated from a sample.
    sample, counts = set(evenly_spaced(train.count, SAMPLED_ROWS)), []
    for i, value in enumerate(row[train.column] for _, batch in train.read() for row in batch):
        if i in sample and train.is_text:
            counts.append(min(len(tokenize_texts(base.tokenizer, [value], plain=True)[0]), config.data.max_length))
        elif i in sample:
            messages = check_messages(value, f"data.train_files, row {i}: {train.column}")
            mask = tokenize_conversation(base.tokenizer, messages)[1][: config.data.max_length]
            counts.append(len(mask) if base.config.reads_sequence else sum(mask))
    states = sum(counts) * train.count // len(counts) * base.config.cached_states
    check_space(directory, states * base.hidden_size * BYTES, estimated=True)
