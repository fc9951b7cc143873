"""The rows of an evaluation: baselines, and every speculator in each shape of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from verl_speculator.checkpoint import WEIGHTS_FILE, CheckpointInfo
from verl_speculator.config import SpeculatorConfig
from verl_speculator.decoding import DraftTree
from verl_speculator.decoding.length import AUTO, DraftLength
from verl_speculator.decoding.tree_attention import windows
from verl_speculator.evaluation.contenders import Contender, HuggingFace, Speculating
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.provenance import file_fingerprint

LOOKUP_LENGTH = 3


@dataclass
class Entry:
    """One row of the results to be: who, and how it generates.

    Attributes:
        speculator: the checkpoint as it was given, or the name of a baseline.
        describes: what the row says of it.
        identity: fingerprint of what is measured.
        contender: None for the base alone, which is run beside all others.
        tree: the file of the tree that it drafts, where it drafts one.
    """

    speculator: str
    describes: dict[str, Any]
    identity: dict[str, Any]
    contender: Contender | None
    tree: Path | None = None

    @property
    def key(self) -> tuple[str, Path | None]:
        """What tells it from all other entries."""
        return self.speculator, self.tree


class Entries:
    """Makes the rows.

    Args:
        settings: of the evaluation.
        base: in evaluation mode.
        ends: tokens that end a text.
    """

    def __init__(self, settings: EvaluationSettings, base: nn.Module, ends: Sequence[int]) -> None:
        self.settings, self.base, self.ends, self.policy = settings, base, ends, settings.policy

    def of(self, infos: dict[str, CheckpointInfo], speculators: dict[str, Speculator]) -> list[Entry]:
        """The rows: baselines first, then the checkpoints as they were given.

        Raises:
            UserError: for trees on a base that cannot read them.
        """
        first = next(iter(infos.values()), None)
        entries, trees = [], self.settings.trees()
        if trees:
            windows(self.base)
        if "none" in self.settings.baselines:
            entries.append(Entry("none", {"method": "none"}, {}, None))
        length = _lookup_length(self.settings.draft_length, first)
        for name, copied in (("generate", 0), ("prompt_lookup", length)):
            if name in self.settings.baselines:
                lookup = HuggingFace(self.base, self.policy, copied, self.ends)
                entries.append(Entry(name, {"method": name, "draft_length": copied}, {}, lookup))
        if "random" in self.settings.baselines and first is not None:
            untrained = self._random(first)
            entries.append(self._entry("random", first.config, untrained, {"shape_of": str(first.directory)}))
        for name, info in infos.items():
            identity = {"weights": file_fingerprint(info.directory / WEIGHTS_FILE)}
            chain = self._entry(name, info.config, speculators[name], identity)
            beside = [self._tree_entry(chain, path, tree, speculators[name]) for path, tree in trees.items()]
            entries += [chain, *beside]
        return entries

    def _random(self, info: CheckpointInfo) -> Speculator:
        """A freshly initialised speculator: what an unloaded checkpoint would be."""
        untrained = build_speculator(
            info.config,
            **info.shape,
            seed=self.settings.seed,
            device=self.base.device,
            dtype=self.base.dtype,
        )
        return untrained.requires_grad_(False).eval()

    def _entry(self, name: str, config: SpeculatorConfig, speculator: Speculator, identity: dict[str, Any]) -> Entry:
        contender = Speculating(self.base, speculator, self.policy, self.settings.draft_length, self.ends)
        describes = {
            "method": config.method,
            "n_predict": config.n_predict,
            "draft_length": contender.draft_length,
            "untrained": speculator.is_untrained(),
        }
        if self.settings.draft_length == AUTO:
            describes["draft_shape"] = AUTO
        return Entry(name, describes, identity, contender)

    def _tree_entry(self, beside: Entry, path: Path, tree: DraftTree, speculator: Speculator) -> Entry:
        """The row of a tree, like that of the chain it stands beside."""
        contender = Speculating(self.base, speculator, self.policy, None, self.ends, tree)
        describes = beside.describes | {
            "draft_length": tree.depth,
            "draft_shape": f"tree of {len(tree.paths)}",
            "draft_tree": str(path),
        }
        identity = beside.identity | {"tree": [list(ranks) for ranks in tree.paths]}
        return Entry(beside.speculator, describes, identity, contender, path)


def _lookup_length(draft_length: DraftLength, first: CheckpointInfo | None) -> int:
    """How many tokens prompt lookup copies: as many as the first checkpoint drafts at most."""
    if isinstance(draft_length, int):
        return draft_length
    return first.config.n_predict if first else LOOKUP_LENGTH
