"""Datasets and sampler of training: verl's conversations, plain text, and validation that loses no row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from tqdm import tqdm
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from verl_speculator.base_model.chat_template import thinking_tokens, tokenize_texts
from verl_speculator.data.alignment import states_read
from verl_speculator.data.conversations import check_messages, read_tools
from verl_speculator.data.formats import TOOL_CALLS
from verl_speculator.utils.settings import UserError


class TextDataset(Dataset):
    """Rows of plain text, closed with the tokenizer's end token; every token is a target.

    `config` is verl's `data` section; the first `max_samples` rows are kept, all if it is not positive.
    """

    def __init__(self, files: Sequence[str], tokenizer: Any, config: Any, max_samples: int = -1) -> None:
        columns = [pq.read_table(file, columns=[config.text_key])[config.text_key] for file in files]
        texts: list[str] = [text for column in columns for text in column.to_pylist()]
        self.texts = texts[:max_samples] if max_samples > 0 else texts
        self.tokenizer, self.max_length, self.truncation = tokenizer, config.max_length, config.truncation

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        (ids,) = tokenize_texts(self.tokenizer, [self.texts[item]], plain=True)
        if len(ids) > self.max_length:
            if self.truncation == "error":
                raise UserError(f"text row {item} has {len(ids)} tokens, data.max_length is {self.max_length}")
            ids = ids[-self.max_length :] if self.truncation == "left" else ids[: self.max_length]
        tokens = torch.tensor(ids, dtype=torch.long)
        return {"input_ids": tokens, "position_ids": torch.arange(len(ids)), "loss_mask": torch.ones_like(tokens)}


def is_text(files: Sequence[str], config: Any) -> bool:
    """Whether the files hold plain text: no column of conversations, but one named `text_key`."""
    names = pq.read_schema(files[0]).names
    return config.messages_key not in names and config.text_key in names


def build_dataset(files: Sequence[str], config: Any, tokenizer: Any, processor: Any, max_samples: int) -> Dataset:
    """verl's dataset (or the user's, `data.custom_cls`) for conversations, `TextDataset` for plain text."""
    if not config.custom_cls.get("path") and is_text(files, config):
        return TextDataset(files, tokenizer, config, max_samples)
    dataset = create_sft_dataset(list(files), config, tokenizer, processor, max_samples=max_samples)
    if isinstance(dataset, MultiTurnSFTDataset) and uses_tools(files, config):
        # verl reads both as they stand in the file, where the values of objects with free keys are JSON.
        dataset.messages = [check_messages(value, f"row {i}") for i, value in enumerate(dataset.messages)]
        dataset.dataframe[config.messages_key] = pd.Series(dataset.messages, dataset.dataframe.index, dtype=object)
        if dataset.tools is not None:
            dataset.tools = [read_tools(None if value is pd.NA else value) for value in dataset.tools]
    return dataset if config.thinking_targets else WithoutThinking(dataset, tokenizer)


def uses_tools(files: Sequence[str], config: Any) -> bool:
    """Whether a file has a column of tools, or messages that call them."""
    schemas = [pq.read_schema(file) for file in files]
    return any(config.tools_key in s.names or TOOL_CALLS in str(s.field(config.messages_key).type) for s in schemas)


class WithoutThinking(Dataset):
    """A dataset of conversations in which no token of an answer from `<think>` to `</think>` is a target."""

    def __init__(self, dataset: Dataset, tokenizer: Any) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        row = self.dataset[item]
        ids, mask = row["input_ids"].tolist(), row["loss_mask"].clone()
        for is_answer, positions in groupby(range(len(ids)), lambda i: bool(mask[i])):
            if is_answer:
                answer = list(positions)
                for i in thinking_tokens(self.tokenizer, [ids[position] for position in answer]):
                    mask[answer[i]] = 0
        return row | {"loss_mask": mask}


class NumberedDataset(Dataset):
    """A dataset whose rows hold their index, in `row` [1]."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return self.dataset[item] | {"row": torch.tensor([item])}


def count_states(dataset: Dataset, rows: range, num_workers: int, *, show: bool, whole: bool = False) -> torch.Tensor:
    """[len(rows)] the number of hidden states that a draft may read in each of these rows; `whole` as in
    `states_read`."""
    loader = DataLoader(Subset(dataset, rows), batch_size=None, num_workers=num_workers)
    counts = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(tqdm(loader, desc="Counting states", disable=not show)):
        mask = row["loss_mask"]
        counts[i] = len(states_read(mask, torch.tensor([0, len(mask)]), whole=whole))
    return counts


def count_answer_tokens(
    dataset: Dataset, rows: Sequence[int], num_workers: int, vocab_size: int, *, show: bool
) -> torch.Tensor:
    """[vocab_size] how often each token occurs among the assistant's in these rows."""
    loader = DataLoader(Subset(dataset, rows), batch_size=None, num_workers=num_workers)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in tqdm(loader, desc="Counting tokens", disable=not show):
        counts += torch.bincount(row["input_ids"][row["loss_mask"].bool()], minlength=vocab_size)[:vocab_size]
    return counts


class PaddedDataset(Dataset):
    """A dataset padded to a multiple of `multiple` rows with copies of its last row whose loss mask is zero."""

    def __init__(self, dataset: Dataset, multiple: int) -> None:
        self.dataset, self.rows = dataset, len(dataset)
        self.padded = -(-self.rows // multiple) * multiple

    def __len__(self) -> int:
        return self.padded

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        row = self.dataset[min(item, self.rows - 1)]
        return row if item < self.rows else row | {"loss_mask": torch.zeros_like(row["loss_mask"])}


class ResumableSampler(DistributedSampler):
    """A distributed sampler that can start in the middle of an epoch.

    Rank r takes every world-size-th row from r on, so a global batch holds the same rows for any number of ranks, and
    the position in the data follows from the step alone.
    """

    skip = 0

    def set_position(self, epoch: int, skip: int) -> None:
        """Set the epoch, and how many rows of this rank to skip at its beginning."""
        self.set_epoch(epoch)
        self.skip = skip

    def __iter__(self):
        return iter(list(super().__iter__())[self.skip :])
