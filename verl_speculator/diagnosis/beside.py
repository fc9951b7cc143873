"""A model alone, and again after others have run: state that outlives a run shows as a difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from verl_speculator.diagnosis.comparison import Comparison, compare
from verl_speculator.diagnosis.recorder import trace
from verl_speculator.diagnosis.tracefile import read_trace

SOLO = "alone"


@dataclass(frozen=True)
class Beside:
    """What the experiment gave.

    Attributes:
        verdict: one sentence.
        tokens: the draft tokens of every run, `alone` first.
        comparisons: of the run alone with every other.
    """

    verdict: str
    tokens: dict[str, list[int]]
    comparisons: dict[str, Comparison]

    @property
    def agrees(self) -> bool:
        """Whether every run was the same as the one alone."""
        return all(one.agrees for one in self.comparisons.values())


def solo_vs_pair(
    draft: nn.Module,
    run: Callable[[], list[int]],
    others: Mapping[str, Callable[[], object]],
    folder: Path,
    *,
    modules: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Beside:
    """Run a draft alone, then after each of the others, and compare the traces.

    Args:
        draft: what is traced.
        run: runs it from the start, with a cache of its own, and gives the draft tokens.
        others: what runs first, by name; in this order, so the one that should change nothing comes first.
        folder: for the traces, `<name>.trace`.
        modules: as for `trace`.
        tolerance: as for `compare`.
    """
    tokens = {}
    for name in (SOLO, *others):
        if name != SOLO:
            others[name]()
        with trace(draft, folder / f"{name}.trace", modules=modules) as recorder:
            tokens[name] = recorder.notes["drafts"] = run()
    alone = read_trace(folder / f"{SOLO}.trace")
    found = {
        name: compare(alone, read_trace(folder / f"{name}.trace"), tolerance=tolerance, under=("", ""))
        for name in others
    }
    return Beside(_verdict(found, tokens), tokens, found)


def _verdict(found: Mapping[str, Comparison], tokens: Mapping[str, list[int]]) -> str:
    for name, comparison in found.items():
        if not comparison.agrees:
            sentence = comparison.verdict.sentence
            same = [other for other in found if found[other].agrees]
            told = f"; after {', '.join(same)} it is" if same else ""
            return f"After {name} has run the draft is not the same{told}. {sentence}"
    drafts = ", ".join(map(str, tokens[SOLO]))
    return f"The draft is the same alone and after {', '.join(found)}: it drafts {drafts} each time."
