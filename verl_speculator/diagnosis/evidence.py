"""What a verdict rests on, in words."""

from __future__ import annotations

from verl_speculator.diagnosis.facts import TensorFacts, distance
from verl_speculator.diagnosis.tracefile import Call, Trace

MOST = 3


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def name_of(name: str, call: Call) -> str:
    """A module's name; the model itself by its class."""
    return name or f"the model ({call.kind})"


def values_of(x: TensorFacts, y: TensorFacts) -> str:
    """Where two tensors differ, with their values."""
    if x.count != y.count:
        return f"shape {list(x.shape)} in A, {list(y.shape)} in B"
    if (x.nan, x.inf) != (y.nan, y.inf):
        return f"{x.nan} NaN and {x.inf} infinite in A, {y.nan} and {y.inf} in B"
    place = next((i for i, (p, q) in enumerate(zip(x.samples, y.samples, strict=True)) if p != q), None)
    if not x.is_float:
        if place is None:
            return "other values behind the first 16"
        return f"{int(x.samples[place])} in A and {int(y.samples[place])} in B at place {place}"
    told = f"mean {x.mean:.4g} in A, {y.mean:.4g} in B; std {x.std:.4g}, {y.std:.4g}"
    return f"{told}; relative difference {distance(x, y):.1e}"


def about_output(a: Trace, b: Trace, x: Call, y: Call, pairs: list[tuple[TensorFacts, TensorFacts]]) -> list[str]:
    """What differs in the outputs of a call, and where else B's output was seen."""
    told = [f"{p.name}: {values_of(p, q)}" for p, q in pairs if distance(p, q) > 0]
    for letter, trace, call, facts in (("A", a, x, x.outputs), ("B", b, y, y.outputs)):
        for fact in facts:
            before = _earlier_output(trace, call, fact)
            if before is not None and not fact.name.startswith("cache."):
                told.append(f"in {letter} its {fact.name} is bit for bit that of its call {before}: stale state")
    return told


def _earlier_output(trace: Trace, call: Call, fact: TensorFacts) -> int | None:
    """The earlier call of the same module with the same output from other inputs."""
    for other in trace.calls:
        if other.name != call.name or other.index >= call.index:
            continue
        given = [f.hash for f in other.inputs] != [f.hash for f in call.inputs]
        if given and fact.norm > 0 and any(f.name == fact.name and f.same_values(fact) for f in other.outputs):
            return other.index
    return None


def same_elsewhere(a: Trace, b: Trace, x: Call, y: Call, given: TensorFacts, other: TensorFacts) -> list[str]:
    """Which module's output each run hands over at this place, where it is one's bit for bit."""
    told = []
    for letter, trace, call, fact in (("A", a, x, given), ("B", b, y, other)):
        source = _source(trace, call, fact)
        if source:
            told.append(f"in {letter} it is {source}, bit for bit")
    return told


def _source(trace: Trace, call: Call, fact: TensorFacts) -> str | None:
    for before in trace.calls:
        if before.end and before.end < call.start:
            for kind, facts in (("output", before.outputs), ("input", before.inputs)):
                if fact.norm > 0 and any(f.same_values(fact) for f in facts):
                    return f"the {kind} of {before.name or 'the model'}"
    return None
