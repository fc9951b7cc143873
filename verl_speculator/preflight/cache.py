"""Checks of the directory for the base's states: whose they are, and whether the disk has room for them."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from verl_speculator.preflight.base import Base
from verl_speculator.preflight.data import Rows
from verl_speculator.selection import spread
from verl_speculator.state_cache import BYTES, check_directory, check_space, identify_states
from verl_speculator.tokens import tokenize_conversation, tokenize_texts

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
