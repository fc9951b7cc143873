"""Two matched traces side by side: distances of every call, and which weights and types are not the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from verl_speculator.diagnosis.evidence import some, values_of
from verl_speculator.diagnosis.facts import ROUNDING, TOLERANCES, TensorFacts, distance
from verl_speculator.diagnosis.paged import PLACES
from verl_speculator.diagnosis.pairing import below, canonical, match
from verl_speculator.diagnosis.tracefile import Call, Trace

FEW = 64


@dataclass(frozen=True)
class Pair:
    """One call in both runs.

    Attributes:
        name: of the module, as seen from the shared one.
        a, b: the calls.
        inputs, outputs: the largest distance of what was given (slots and blocks aside) and made; infinite where no
            number says it.
        weights: names of the module's own and inner weights that differ or were overwritten.
    """

    name: str
    a: Call
    b: Call
    inputs: float
    outputs: float
    weights: tuple[str, ...]


def tensor_pairs(a: tuple[TensorFacts, ...], b: tuple[TensorFacts, ...]) -> list[tuple[TensorFacts, TensorFacts]]:
    """Tensors of both runs under the same name; under their place, where no name is the same."""
    theirs = {fact.name: fact for fact in b}
    found = [(fact, theirs[fact.name]) for fact in a if fact.name in theirs]
    return found or [(x, y) for x, y in zip(a, b, strict=False) if x.count == y.count]


def without_places(given: tuple[TensorFacts, ...]) -> tuple[TensorFacts, ...]:
    """What a call was given, but not where in the cache it stands: that is the allocator's choice."""
    return tuple(fact for fact in given if not fact.name.startswith(PLACES))


def farthest(a: tuple[TensorFacts, ...], b: tuple[TensorFacts, ...]) -> float:
    """The largest distance of any two. That of few values counts less: all of them may be near zero by chance, as one
    gate of one token, and rounding is then large beside them."""
    return max((distance(x, y) / math.sqrt(1 + FEW / max(x.count, 1)) for x, y in tensor_pairs(a, b)), default=0.0)


def coarsest(*traces: Trace) -> str:
    """The floating point type with the largest roundoff that a run has anywhere."""
    facts = [f for t in traces for f in (*t.weights.values(), *(f for c in t.calls for f in c.outputs))]
    return max({f.dtype for f in facts} & TOLERANCES.keys(), key=lambda kind: TOLERANCES[kind], default="float32")


class Sides:
    """Two traces and what can be said of them without walking.

    Args:
        a, b: the traces.
        under: the module of each that is the same thing; None finds it.

    Raises:
        UserError: if they share no module.
    """

    def __init__(self, a: Trace, b: Trace, under: tuple[str | None, str | None]) -> None:
        self.a, self.b = a, b
        self.matching = matching = match(a, b, under)
        self.weights = {short: (a.weights[x], b.weights[y]) for short, x, y in matching.weights}
        self.unlike = sorted(short for short, (x, y) in self.weights.items() if not _same_weight(x, y))
        sets = [
            {short for name in trace.changed if (short := below(canonical(name), prefix)) is not None}
            for trace, prefix in zip((a, b), matching.prefixes, strict=True)
        ]
        # What both runs change they change by design, as running statistics do.
        self.changed = {name: "AB"[i] for i, names in enumerate(sets) for name in sorted(names - sets[1 - i])}
        self.pairs = [self._pair(i, j) for i, j in matching.pairs]
        self._by_place = {i: pair for (i, _), pair in zip(matching.pairs, self.pairs, strict=True)}

    def _pair(self, i: int, j: int) -> Pair:
        a, b = self.a.calls[i], self.b.calls[j]
        name = below(canonical(a.name), self.matching.prefixes[0])
        mine = sorted(w for w in {*self.unlike, *self.changed} if below(w, name) is not None)
        return Pair(
            name,
            a,
            b,
            farthest(*map(without_places, (a.inputs, b.inputs))),
            farthest(a.outputs, b.outputs),
            tuple(mine),
        )

    def outer(self, pair: Pair) -> Pair | None:
        """The innermost call around this one that both runs have."""
        place = pair.a.parent
        while place is not None and place not in self._by_place:
            place = self.a.calls[place].parent
        return None if place is None else self._by_place[place]

    def places(self, pair: Pair) -> list[str]:
        """Which slots or blocks of the KV cache a call was given that are others in the other run."""
        both = tensor_pairs(pair.a.inputs, pair.b.inputs)
        unlike = [(x, y) for x, y in both if x.name.startswith(PLACES) and not x.same_values(y)]
        return [f"{x.name.removeprefix('cache.')}: {values_of(x, y)}" for x, y in unlike]

    def count_weights(self, name: str) -> int:
        """Shared weights in a module."""
        return sum(below(short, name) is not None for short in self.weights)

    def about_weights(self, names: Iterable[str]) -> list[str]:
        """How the first few of these differ."""
        told = []
        for name in list(names)[:3]:
            x, y = self.weights[name]
            same = x.shape == y.shape and x.same_values(y)
            late = f"the same at the start, and overwritten while run {self.changed.get(name)} was under way"
            told.append(f"{name}: {late if same else values_of(x, y)}")
        return told

    def weights_sentence(self) -> str:
        """Whether all weights are the same."""
        if self.unlike:
            return f"weights differ: {some(self.unlike)}"
        return f"all {len(self.weights)} shared weights are the same"

    def odd_modules(self) -> list[str]:
        """Modules whose type is another in the second run while most have the same in both."""
        kinds = {name: (x.dtype, y.dtype) for name, (x, y) in self.weights.items()}
        owners = {name: name.rpartition(".")[0] for name in kinds}
        for pair in self.pairs:
            for x, y in tensor_pairs(pair.a.outputs, pair.b.outputs):
                if x.is_float and y.is_float:
                    key = f"{pair.name}:{x.name}"
                    kinds[key], owners[key] = (x.dtype, y.dtype), pair.name
        unlike = [key for key, (x, y) in kinds.items() if x != y]
        if len(unlike) > len(kinds) / 2:
            return []
        found = dict.fromkeys(owners[key] for key in unlike)
        return [name for name in found if not any(name != other and below(name, other) is not None for other in found)]

    def types_in(self, name: str) -> list[tuple[str, str]]:
        """The pairs of types that are not the same in a module."""
        tensors = [pair for short, pair in self.weights.items() if below(short, name) is not None]
        for pair in self.pairs:
            if below(pair.name, name) is not None:
                tensors += tensor_pairs(pair.a.outputs, pair.b.outputs)
        return sorted({(x.dtype, y.dtype) for x, y in tensors if x.dtype != y.dtype})

    def surroundings(self) -> list[str]:
        """Flags, versions and caches that are not the same."""
        keys = [key for key in self.a.environment if self.a.environment[key] != self.b.environment.get(key)]
        told = [f"{key}: {self.a.environment[key]} in A, {self.b.environment.get(key)} in B" for key in keys]
        if self.a.caches and self.b.caches and self.a.caches != self.b.caches:
            told.append(f"KV caches: {_layout(self.a)} in A, {_layout(self.b)} in B")
        return told


def common_name(names: list[str]) -> str:
    """The innermost module that holds all of these."""
    parts = [name.split(".") for name in names]
    unlike = (i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1)
    return ".".join(parts[0][: next(unlike, min(map(len, parts)))])


def _same_weight(x: TensorFacts, y: TensorFacts) -> bool:
    if x.dtype == y.dtype or not (x.is_float and y.is_float):
        return x.same_values(y)
    return distance(x, y) <= max(ROUNDING.get(kind, 0.1) for kind in (x.dtype, y.dtype))


def _layout(trace: Trace) -> str:
    groups = [group for cache in trace.caches for group in cache["groups"]]
    return ", ".join(f"{len(g['layers'])} × {g['kind']} {g['shape']} {g['dtype']}, {g['slots']} slots" for g in groups)
