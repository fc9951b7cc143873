"""Which call of one run is which call of the other, where names are wrapped and one run has more modules."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from verl_speculator.diagnose.tensor_stats import ROUNDING, TOLERANCES, TensorFacts, distance
from verl_speculator.diagnose.trace_file import Call, Trace
from verl_speculator.diagnose.tracer import PLACES
from verl_speculator.utils.errors import UserError

# What wrappers put into names.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_layer"})
TAIL = 3


def canonical(name: str) -> str:
    """A module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def below(name: str, prefix: str) -> str | None:
    """A name as seen from a module above it; None outside of that module."""
    if not prefix or name == prefix:
        return name[len(prefix) :]
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


@dataclass(frozen=True)
class Matching:
    """Two runs side by side.

    Attributes:
        prefixes: the module in each that is the same thing; empty for the model itself.
        pairs: positions of the same call in both, in the first one's order.
        only: names of modules that were called in one run alone.
        shared: names of modules that something else called too, outside of the traced model, in a run; engines let
            models share what has no weights. Those calls are left out.
        weights: (name as seen from the shared module, name in the first run, name in the second).
    """

    prefixes: tuple[str, str]
    pairs: tuple[tuple[int, int], ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    shared: tuple[str, ...]
    weights: tuple[tuple[str, str, str], ...]


def match(a: Trace, b: Trace, under: tuple[str | None, str | None] = (None, None)) -> Matching:
    """Pair the calls of two runs by name, size of their inputs and order.

    Args:
        a, b: the runs.
        under: the module of each run to look at; None finds it.

    Raises:
        UserError: if no module has the same name in both, or there is none called `under`.
    """
    for trace, prefix, letter in zip((a, b), under, "ab", strict=True):
        names = {canonical(call.name) for call in trace.calls}
        if prefix and not any(below(name, canonical(prefix)) is not None for name in names):
            close = difflib.get_close_matches(prefix, sorted(names), n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"under-{letter}={prefix}: no module of {trace.path} is called so{hint}")
    prefixes = _prefixes(a, b, under)
    ours, theirs = (_calls_below(trace, prefix) for trace, prefix in zip((a, b), prefixes, strict=True))
    outside = {canonical(call.name) for trace in (a, b) for call in trace.calls if _is_foreign(trace, call)}
    pairs = sorted((ours[i][0], theirs[j][0]) for i, j in _align(a, b, ours, theirs))
    names = tuple({name for _, name in calls} for calls in (ours, theirs))
    mine, other = (_weights_below(trace, prefix) for trace, prefix in zip((a, b), prefixes, strict=True))
    return Matching(
        prefixes,
        tuple(pairs),
        (tuple(sorted(names[0] - names[1])), tuple(sorted(names[1] - names[0]))),
        tuple(sorted(outside)),
        tuple((name, mine[name], other[name]) for name in mine if name in other),
    )


def _calls_below(trace: Trace, prefix: str) -> list[tuple[int, str]]:
    """(position, name as seen from the prefix) of every call in it."""
    calls = ((i, call) for i, call in enumerate(trace.calls) if not _is_foreign(trace, call))
    named = ((i, below(canonical(call.name), prefix)) for i, call in calls)
    return [(i, name) for i, name in named if name is not None]


def _weights_below(trace: Trace, prefix: str) -> dict[str, str]:
    named = ((below(canonical(name), prefix), name) for name in trace.weights)
    return {short: name for short, name in named if short is not None}


def _is_foreign(trace: Trace, call: Call) -> bool:
    """Whether something other than the traced model made this call, of a module that the model calls itself."""
    return not call.inside and call.name in trace.called_inside


def _prefixes(a: Trace, b: Trace, under: tuple[str | None, str | None]) -> tuple[str, str]:
    """The modules of both runs below which most names are the same; of equals the ones with the same weights, then
    those that were given the same, then the outermost."""
    if None not in under:
        return tuple(canonical(u) for u in under)
    mine, theirs = ({canonical(call.name): call.kind for call in trace.calls} for trace in (a, b))
    ends: dict[tuple[str, ...], list[str]] = {}
    for name in filter(None, theirs):
        for length in range(1, TAIL + 1):
            if len(parts := name.split(".")) >= length:
                ends.setdefault(tuple(parts[-length:]), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, kind in mine.items():
        parts = name.split(".") if name else []
        for same in ends.get(tuple(parts[-TAIL:]), ()):
            other = same.split(".")
            # A short name says little: then it should be the same thing too.
            if min(len(parts), len(other)) < TAIL and theirs[same] != kind:
                continue
            shared = sum(1 for _ in _common(reversed(parts), reversed(other)))
            votes[".".join(parts[:-shared]), ".".join(other[:-shared])] += 1
    wanted = [None if name is None else canonical(name) for name in under]
    votes = Counter({k: n for k, n in votes.items() if all(w in (None, p) for w, p in zip(wanted, k, strict=True))})
    if not votes:
        alone = not any(mine) and not any(theirs) and {c.kind for c in a.calls} == {c.kind for c in b.calls}
        if alone and mine and theirs:
            return "", ""
        raise UserError(
            f"{a.path} and {b.path} share no module: {_sample(list(mine))} against {_sample(list(theirs))}; expected "
            "two traces of the same model, or of one inside of another"
        )
    most = max(votes.values())
    likely = [pair for pair, count in votes.items() if count > most / 2]
    return max(
        likely, key=lambda pair: (_same_weights(a, b, pair), votes[pair], _same_inputs(a, b, pair), pair[1] == "")
    )


def _common(a: Iterable[str], b: Iterable[str]) -> Iterator[str]:
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def _same_weights(a: Trace, b: Trace, prefixes: tuple[str, str]) -> int:
    mine, theirs = (_weights_below(trace, prefix) for trace, prefix in zip((a, b), prefixes, strict=True))
    shared = [name for name in mine if name in theirs]
    return sum(a.weights[mine[name]].same_values(b.weights[theirs[name]]) for name in shared)


def _same_inputs(a: Trace, b: Trace, prefixes: tuple[str, str]) -> bool:
    first = [_calls_below(trace, prefix)[0][0] for trace, prefix in zip((a, b), prefixes, strict=True)]
    hashes = [{fact.hash for fact in trace.calls[i].inputs} for trace, i in zip((a, b), first, strict=True)]
    return bool(hashes[0] & hashes[1])


def _sample(names: list[str]) -> str:
    named = [name or "the model" for name in names]
    return ", ".join(named[:3]) + (", …" if len(named) > 3 else "") if named else "no call"


def _align(a: Trace, b: Trace, ours: list[tuple[int, str]], theirs: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """Places in `ours` and `theirs` of the same calls: by name and size first, what is left between by name alone."""

    def key(trace: Trace, place: tuple[int, str]) -> tuple[str, tuple[int, ...]]:
        call: Call = trace.calls[place[0]]
        return place[1], tuple(fact.count for fact in call.inputs if not fact.name.startswith("cache."))

    exact = [key(a, place) for place in ours], [key(b, place) for place in theirs]
    matcher = difflib.SequenceMatcher(None, *exact, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            yield from zip(range(i1, i2), range(j1, j2), strict=True)
        elif kind == "replace":
            names = [name for _, name in ours[i1:i2]], [name for _, name in theirs[j1:j2]]
            for block in difflib.SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
                yield from ((i1 + block.a + k, j1 + block.b + k) for k in range(block.size))


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
