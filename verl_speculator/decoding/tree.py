"""A draft tree: which guesses a round puts before the base, as paths of ranks. Importing it loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

MOST_NODES = 64
# What stands in a file beside the paths: for people, and never read back.
NOTES = ("measured", "provenance")


@dataclass(frozen=True)
class DraftTree:
    """A sparse set of paths of ranks: (0, 2) is the draft's third most likely token after its most likely one.

    Nodes are numbered from 1 in the order of `paths`; 0 is the root, the newest token.

    Attributes:
        paths: by depth, then by ranks; the beginning of every path is a path too.

    Raises:
        UserError: if it is empty, larger than MOST_NODES, or lacks the beginning of one of its paths.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.paths) <= MOST_NODES:
            raise UserError(f"draft_tree: {len(self.paths)} nodes, expected 1 to {MOST_NODES}")
        for path in self.paths:
            if not path or not all(type(rank) is int and rank >= 0 for rank in path):
                raise UserError(f"draft_tree: path {short(list(path))}, expected ranks, whole numbers ≥ 0")
        known = set(self.paths)
        if len(known) < len(self.paths):
            twice = next(path for path in self.paths if self.paths.count(path) > 1)
            raise UserError(f"draft_tree: path {list(twice)} is there twice, expected every path once")
        for path in self.paths:
            if path[:-1] and path[:-1] not in known:
                raise UserError(
                    f"draft_tree: path {list(path)} without {list(path[:-1])}; expected the beginning of every path too"
                )
        object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda path: (len(path), path))))

    @classmethod
    def chain(cls, length: int) -> DraftTree:
        """The most likely token at every depth, and nothing beside it."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)))

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return len(self.paths[-1])

    @property
    def widest(self) -> int:
        """How many of the draft's most likely tokens are asked for at most: the largest rank, and one."""
        return 1 + max(max(path) for path in self.paths)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """For the nodes 1, 2, …: the number of the node before, 0 for the root. It is always the smaller one."""
        number = {path: i for i, path in enumerate(self.paths, 1)}
        return tuple(number.get(path[:-1], 0) for path in self.paths)

    def cut(self, depth: int) -> DraftTree:
        """What of it is at most `depth` ≥ 1 levels deep."""
        return self if depth >= self.depth else DraftTree(tuple(path for path in self.paths if len(path) <= depth))

    def check(self, config: SpeculatorConfig, vocab_size: int) -> None:
        """Whether a speculator can draft it.

        Raises:
            UserError: naming both numbers, or the family if it drafts no trees.
        """
        check_family(config)
        if self.depth > config.n_predict:
            raise UserError(f"draft_tree: {self.depth} levels, the speculator was trained to draft {config.n_predict}")
        if self.widest > vocab_size:
            raise UserError(f"draft_tree: rank {self.widest - 1}, the vocabulary has {vocab_size} tokens")


def check_family(config: SpeculatorConfig) -> None:
    """Whether a family drafts trees: one that reads its drafts into the base's cache has room there for a chain alone.

    Raises:
        UserError: naming it.
    """
    if not config.drafts_trees:
        raise UserError(f"draft_tree: a speculator of method={config.method} drafts chains alone")


def check_beside(draft_length: object, temperature: float) -> None:
    """What else may be asked for where a tree is: no draft length, and the most likely token alone.

    Raises:
        UserError: for a draft length, or above temperature 0.
    """
    if draft_length is not None:
        raise UserError(f"draft_length={draft_length}: a draft_tree has lengths of its own; expected one of the two")
    if temperature > 0:
        raise UserError(f"draft_tree: temperature={temperature:g}, expected 0: a tree is verified greedily")


def read_tree(path: str | Path) -> DraftTree:
    """The tree in a file of `write_tree`, or of one's own: `{"paths": [[0], [1], [0, 0]]}`.

    Raises:
        UserError: naming the file, if there is no tree in it.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"draft_tree={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"draft_tree={path}: not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("paths"), list):
        raise UserError(f"draft_tree={path}: {short(found)}, expected an object with a list of paths")
    if unknown := sorted(set(found) - {"paths", *NOTES}):
        raise UserError(f"draft_tree={path}: unknown key {unknown[0]!r}, expected paths, {', '.join(NOTES)}")
    for ranks in found["paths"]:
        if not isinstance(ranks, list):
            raise UserError(f"draft_tree={path}: path {short(ranks)}, expected a list of ranks")
    try:
        return DraftTree(tuple(map(tuple, found["paths"])))
    except UserError as error:
        raise UserError(str(error).replace("draft_tree", f"draft_tree={path}", 1)) from None


def write_tree(path: Path, tree: DraftTree, *, measured: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write a tree with what it was chosen by, in one piece; a key of the file is a line.

    Args:
        path: of the file.
        tree: to be written.
        measured: figures of the sample.
        provenance: base, speculator, prompts, versions.
    """
    record = {"paths": tree.paths, "measured": measured, "provenance": provenance}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    with atomic_file(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def most_frequent(paths: Iterable[tuple[int, ...]], nodes: int) -> DraftTree:
    """The tree of so many nodes that accepts the most on a sample.

    A row whose path begins with a node's accepts that node, so E[accepted] of a tree is the sum over its nodes of the
    share of such rows: the most frequent beginnings are the best tree. A beginning is at least as frequent as what goes
    on from it, and comes first among equals, so the set is closed by itself.

    Args:
        paths: for each row of the sample, the ranks of the base's own tokens.
        nodes: of the tree; fewer if the sample has fewer.
    """
    counts = prefix_counts(paths)
    best = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return DraftTree(tuple(best[:nodes]))


def prefix_counts(paths: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """How many paths begin with each beginning."""
    counts: dict[tuple[int, ...], int] = {}
    for path in paths:
        for length in range(1, len(path) + 1):
            counts[path[:length]] = counts.get(path[:length], 0) + 1
    return counts
