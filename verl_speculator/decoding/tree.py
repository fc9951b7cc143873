"""Draft trees: which draft tokens a round proposes, as paths of ranks. Importing it loads no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

MOST_NODES = 64
# Further keys of a tree's file, for its readers; the package never reads them.
NOTES = ("measured", "provenance")


@dataclass(frozen=True)
class DraftTree:
    """A set of paths of ranks: (0, 2) is the draft's third most likely token after its most likely one.

    Nodes are numbered from 1 in the order of `paths`; 0 is the root, the newest token.

    Attributes:
        paths: ordered by depth, then by ranks; every prefix of a path is a path too.

    Raises:
        UserError: if it is empty, larger than MOST_NODES, or lacks a prefix of one of its paths.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.paths) <= MOST_NODES:
            raise UserError(f"draft_tree: {len(self.paths)} nodes, expected 1 to {MOST_NODES}")
        for path in self.paths:
            if not path or not all(type(rank) is int and rank >= 0 for rank in path):
                raise UserError(f"draft_tree: path {short(list(path))}, expected ranks, whole numbers ≥ 0")
        for path, count in Counter(self.paths).items():
            if count > 1:
                raise UserError(f"draft_tree: path {list(path)} is there twice, expected every path once")
        for path in self.paths:
            if path[:-1] and path[:-1] not in self.paths:
                raise UserError(
                    f"draft_tree: path {list(path)} without {list(path[:-1])}; expected the beginning of every path too"
                )
        object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda path: (len(path), path))))

    @classmethod
    def chain(cls, length: int) -> DraftTree:
        """The most likely token at every depth, as a tree."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)))

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return len(self.paths[-1])

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Number of the parent of each of the nodes 1, 2, …; always smaller than the node's."""
        number = {path: i for i, path in enumerate(self.paths, 1)}
        return tuple(number.get(path[:-1], 0) for path in self.paths)

    def check(self, config: SpeculatorConfig, vocab_size: int) -> None:
        """Raise a UserError, with both numbers, if a speculator for `vocab_size` tokens cannot draft this tree."""
        check_family(config)
        if self.depth > config.n_predict:
            raise UserError(f"draft_tree: {self.depth} levels, the speculator was trained to draft {config.n_predict}")
        rank, size = max(map(max, self.paths)), config.draft_vocab_size or vocab_size
        if rank >= size:
            raise UserError(f"draft_tree: rank {rank}, the vocabulary has {size} tokens")


def check_family(config: SpeculatorConfig) -> None:
    """Raise a UserError for a family that drafts no trees: one that reads its drafts into the target's KV cache."""
    if not config.drafts_trees:
        raise UserError(f"draft_tree: a speculator of method={config.method} drafts chains alone")


def check_tree_settings(draft_length: object, temperature: float) -> None:
    """Raise a UserError for a setting that a draft tree excludes: a draft length, or a temperature above 0."""
    if draft_length is not None:
        raise UserError(f"draft_length={draft_length}: a draft_tree has lengths of its own; expected one of the two")
    if temperature > 0:
        raise UserError(f"draft_tree: temperature={temperature:g}, expected 0: a tree is verified greedily")


def read_tree(path: str | Path) -> DraftTree:
    """The tree in a file that `write_tree` or a user wrote: `{"paths": [[0], [1], [0, 0]]}`.

    Raises:
        UserError: naming the file, if it holds no tree.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"draft_tree={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"draft_tree={path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("paths"), list):
        raise UserError(f"draft_tree={path}: {short(content)}, expected an object with a list of paths")
    if unknown := sorted(set(content) - {"paths", *NOTES}):
        raise UserError(f"draft_tree={path}: unknown key {unknown[0]!r}, expected paths, {', '.join(NOTES)}")
    for ranks in content["paths"]:
        if not isinstance(ranks, list):
            raise UserError(f"draft_tree={path}: path {short(ranks)}, expected a list of ranks")
    try:
        return DraftTree(tuple(map(tuple, content["paths"])))
    except UserError as error:
        raise UserError(str(error).replace("draft_tree", f"draft_tree={path}", 1)) from None


def write_tree(path: Path, tree: DraftTree, *, measured: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write a tree atomically, one line per key of the file.

    Args:
        path: of the file.
        tree: to be written.
        measured: figures of the sample that it was chosen on.
        provenance: base model, speculator, prompts, versions.
    """
    record = {"paths": tree.paths, "measured": measured, "provenance": provenance}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    with atomic_file(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def most_frequent(paths: Iterable[tuple[int, ...]], nodes: int) -> DraftTree:
    """The tree of `nodes` nodes that accepts the most on a sample; smaller if the sample has fewer distinct prefixes.

    E[accepted] is the sum over a tree's nodes of the share of sample paths that begin with the node's path, so the most
    frequent prefixes are the best tree. A prefix is at least as frequent as its extensions and precedes them among
    equals, so the set holds every prefix of its paths.

    Args:
        paths: for each position of the sample, the ranks that the draft gives the base model's own tokens.
        nodes: number of nodes.
    """
    counts = prefix_counts(paths)
    best = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return DraftTree(tuple(best[:nodes]))


def prefix_counts(paths: Iterable[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    """Number of paths that begin with each prefix."""
    return Counter(path[:length] for path in paths for length in range(1, len(path) + 1))
