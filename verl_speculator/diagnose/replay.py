"""One module with the inputs that a trace kept: what changes what it makes of them?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.diagnose.comparison import Comparison, compare
from verl_speculator.diagnose.tensor_stats import TOLERANCES, floats_to, from_structure, leaves, map_tensors, objects_in
from verl_speculator.diagnose.trace_file import Trace, read_trace
from verl_speculator.diagnose.tracer import select, trace
from verl_speculator.utils.errors import UserError

COPIES = 4


@dataclass(frozen=True)
class Variant:
    """One way to run a module again.

    Attributes:
        module: name.
        name: what was done.
        against: what the output is compared with.
        distance: relative difference of the outputs; None where it could not run.
        changes: whether that is more than rounding.
        note: why it could not run, or what was left out.
    """

    module: str
    name: str
    against: str
    distance: float | None
    changes: bool
    note: str = ""


@dataclass(frozen=True)
class Bisection:
    """What replaying gave: one sentence, and a line for each variant."""

    verdict: str
    variants: tuple[Variant, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing changed the output."""
        return not any(v.changes for v in self.variants)


def bisect(
    trace: Trace,
    model: nn.Module,
    name: str,
    *,
    call: int = 0,
    disturb: Callable[[], object] | None = None,
    tolerance: float | None = None,
) -> Bisection:
    """Replay a kept module: alone, twice, in float64, after another model, in a batch; and each of its submodules.

    Args:
        trace: made with `--keep` of the module.
        model: the same model, fresh.
        name: of the module, or the end of its name.
        call: which of its calls.
        disturb: runs something else, which should change nothing.
        tolerance: the largest relative difference that rounding explains; by default that of the module's type.

    Raises:
        UserError: if the model has no such module, or the trace kept none of its calls.
    """
    modules = dict(model.named_modules())
    root = select(list(modules), [name], "module")[0]
    places = {trace.calls[kept["call"]].name for kept in trace.kept}
    if root not in places:
        held = ", ".join(sorted(places)[:3]) or "nothing"
        raise UserError(f"module={name}: {trace.path} kept no input of {root} (it kept {held}); expected --keep {root}")
    tensors = trace.kept_tensors()
    variants: list[Variant] = []
    found = {}
    for kept in trace.kept:
        one = trace.calls[kept["call"]]
        if one.index == call and (one.name == root or one.name.startswith(f"{root}.")):
            found[one.name] = kept
    if root not in found:
        raise UserError(f"call={call}: {root} was called {_count(trace, root)} times; expected a number below that")
    for one, kept in found.items():
        if "outputs" in kept and one in modules:
            replay = _Replay(modules[one], one, kept, tensors, tolerance)
            variants += replay.variants(disturb if one == root else None)
    return Bisection(_verdict(root, variants), tuple(variants))


def _count(trace: Trace, name: str) -> int:
    return sum(call.name == name for call in trace.calls)


class _Replay:
    """One module with one call's arguments and output."""

    def __init__(
        self, module: nn.Module, name: str, kept: dict[str, Any], tensors: dict[str, Tensor], tolerance: float | None
    ) -> None:
        given = from_structure(kept["inputs"], tensors)
        self.module, self.name = module, name
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.args, self.kwargs = map_tensors((given["args"], given["kwargs"]), lambda t: t.to(device))
        self.recorded = from_structure(kept["outputs"], tensors)
        lost = objects_in(kept["inputs"])
        self.note = f"without its {', '.join(dict.fromkeys(lost))}" if lost else ""
        kinds = {str(t.dtype).removeprefix("torch.") for _, t in leaves("", self.recorded)} & TOLERANCES.keys()
        self.tolerance = tolerance or max((TOLERANCES[kind] for kind in kinds), default=0.0)

    @torch.no_grad()
    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # Some modules write into what they are given.
        return module(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))

    def variants(self, disturb: Callable[[], object] | None) -> Iterator[Variant]:
        """Every way to run it again."""
        alone = self._run(self.module, self.args, self.kwargs)
        yield self._compared("alone, fresh", "the recorded output", alone, self.recorded)
        again = self._run(self.module, self.args, self.kwargs)
        yield self._compared("a second time", "the first time", again, alone)
        yield self._attempt("in float64", "its own type", self._wide, alone)
        yield self._attempt(f"in a batch of {COPIES}", "alone", self._batched, alone)
        if disturb is not None:  # last: what it leaves behind may stay
            disturb()
            after = self._run(self.module, self.args, self.kwargs)
            yield self._compared("after another model has run", "fresh", after, alone)

    def _wide(self) -> Any:
        module = copy.deepcopy(self.module).double()
        for part in module.modules():  # transformers' grouped product of experts knows no float64
            if hasattr(getattr(part, "config", None), "_experts_implementation"):
                part.config = copy.copy(part.config)
                part.config._experts_implementation = "eager"
        return self._run(module, *floats_to((self.args, self.kwargs), torch.float64))

    def _batched(self) -> Any:
        given = [t for _, t in leaves("", (self.args, self.kwargs)) if t.dim()]
        count = given[0].shape[0]

        def repeat(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != count:
                return tensor
            # Copies alone would hide what a mean over the batch does.
            others = [tensor.roll(i, -1) if tensor.is_floating_point() else tensor for i in range(1, COPIES)]
            return torch.cat([tensor, *others])

        output = self._run(self.module, map_tensors(self.args, repeat), map_tensors(self.kwargs, repeat))
        return map_tensors(output, lambda t: t[:count] if t.dim() and t.shape[0] == COPIES * count else t)

    def _attempt(self, name: str, against: str, run: Callable[[], Any], other: Any) -> Variant:
        try:
            return self._compared(name, against, run(), other)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            note = f"could not run: {' '.join(str(error).split())[:80]}"
            return Variant(self.name, name, against, None, False, note)

    def _compared(self, name: str, against: str, output: Any, other: Any) -> Variant:
        pairs = zip(leaves("", output), leaves("", other), strict=False)
        distance = max((_distance(x, y) for (_, x), (_, y) in pairs), default=0.0)
        return Variant(self.name, name, against, distance, distance > self.tolerance, self.note)


def _distance(x: Tensor, y: Tensor) -> float:
    """‖x − y‖ over ‖y‖; infinite for integers or shapes that are not the same."""
    if x.shape != y.shape:
        return math.inf
    if torch.equal(x, y.to(x)):
        return 0.0
    if not (x.is_floating_point() and y.is_floating_point()):
        return math.inf
    x, y = x.double().cpu(), y.double().cpu()
    difference = (x - y).norm().item()
    return difference / max(y.norm().item(), 1e-300) if math.isfinite(difference) else math.inf


def _verdict(root: str, variants: list[Variant]) -> str:
    """What changes the module's output, and the innermost submodule in which it does."""
    own = [v for v in variants if v.module == root]
    changing = [v.name for v in own if v.changes]
    if not changing:
        inner = [v for v in variants if v.changes]
        if inner:
            return f"Nothing changes the output of {root}, though {inner[0].module} changes {inner[0].name}."
        return (
            f"Nothing changes the output of {root}: not {', nor '.join(v.name for v in own if v.distance is not None)}."
        )
    inner = [v.module for v in variants if v.changes and v.module != root]
    if inner:
        deepest = max(dict.fromkeys(inner), key=lambda name: name.count("."))
        where = f"; of what it calls, so does that of {deepest}"
    else:
        where = "; none of what it calls does, so it is its own code" if len(own) < len(variants) else ""
    return f"The output of {root} changes {' and '.join(changing)}{where}."


SOLO = "alone"


@dataclass(frozen=True)
class IsolationResult:
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
) -> IsolationResult:
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
    return IsolationResult(_isolation_verdict(found, tokens), tokens, found)


def _isolation_verdict(found: Mapping[str, Comparison], tokens: Mapping[str, list[int]]) -> str:
    for name, comparison in found.items():
        if not comparison.agrees:
            sentence = comparison.verdict.sentence
            same = [other for other in found if found[other].agrees]
            told = f"; after {', '.join(same)} it is" if same else ""
            return f"After {name} has run the draft is not the same{told}. {sentence}"
    drafts = ", ".join(map(str, tokens[SOLO]))
    return f"The draft is the same alone and after {', '.join(found)}: it drafts {drafts} each time."
