"""Which call of one run is which call of the other, where names are wrapped and one run has more modules."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from verl_speculator.diagnosis.tracefile import Call, Trace
from verl_speculator.errors import UserError

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
