"""Which call of one trace is which call of another, where wrappers changed names and one run has more modules."""

from __future__ import annotations

import difflib
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from verl_speculator.diagnose.trace_file import CACHE_PLACES, ROUNDING, Call, TensorStats, Trace, distance
from verl_speculator.utils.settings import UserError

# Parts that wrappers add to module names.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_layer"})
# Names are taken to mean the same module where this many of their last parts are the same.
TAIL = 3
# A tensor of this many values counts √½ of its distance, see `largest_distance`.
FEW_VALUES = 64

TensorPair = tuple[TensorStats, TensorStats]


@functools.cache
def canonical(name: str) -> str:
    """A module's name without the parts that wrappers added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def relative_name(name: str, prefix: str) -> str | None:
    """The canonical name relative to a module, empty for the module itself; None outside of it."""
    name = canonical(name)
    if not prefix or name == prefix:
        return name[len(prefix) :]
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def is_inside(name: str, module: str) -> bool:
    """Whether a name is that of the module or of something inside it."""
    return relative_name(name, module) is not None


def common_start(*names: list[str]) -> list[str]:
    """The parts with which all of these names begin."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))]


def matching_tensors(a: Sequence[TensorStats], b: Sequence[TensorStats]) -> list[TensorPair]:
    """Tensors of both runs with the same name; where there are none, those of the same size at the same place."""
    by_name = {stats.name: stats for stats in b}
    pairs = [(stats, by_name[stats.name]) for stats in a if stats.name in by_name]
    return pairs or [(x, y) for x, y in zip(a, b, strict=False) if x.count == y.count]


def largest_distance(pairs: Iterable[TensorPair]) -> float:
    """The largest distance of any pair, weighted by 1/√(1 + 64/count).

    All values of a small tensor, such as one gate of one token, may be near zero by chance. Rounding is then large
    relative to them, and means nothing.
    """
    return max((distance(x, y) / math.sqrt(1 + FEW_VALUES / max(x.count, 1)) for x, y in pairs), default=0.0)


@dataclass(frozen=True)
class CallPair:
    """One call in both runs.

    Attributes:
        name: of the module, relative to the module that both runs share.
        a, b: the calls.
        weights: names of weights of the module and its submodules that differ or were overwritten.
    """

    name: str
    a: Call
    b: Call
    weights: tuple[str, ...]

    @property
    def label(self) -> str:
        """The module's name; for the model itself its class."""
        return self.name or f"the model ({self.a.kind})"

    @functools.cached_property
    def inputs(self) -> float:
        """`largest_distance` of the arguments without cache slots and blocks."""
        return largest_distance(self.input_pairs())

    @functools.cached_property
    def outputs(self) -> float:
        """`largest_distance` of the outputs."""
        return largest_distance(self.output_pairs())

    def input_pairs(self, *, cache_places: bool = False) -> list[TensorPair]:
        """The arguments other than cache slots and blocks; with `cache_places` those alone."""
        inputs = (self.a.inputs, self.b.inputs)
        return matching_tensors(*([x for x in xs if x.name.startswith(CACHE_PLACES) == cache_places] for xs in inputs))

    def output_pairs(self) -> list[TensorPair]:
        """The outputs, and what the module left in the cache."""
        return matching_tensors(self.a.outputs, self.b.outputs)


class TracePair:
    """Two traces whose calls and weights are matched. The arguments are those of `compare`.

    Attributes:
        prefixes: the compared module in each; empty for the model itself.
        calls: calls that both runs have, in the order of the first run.
        only: names of modules that one run alone called.
        left_out: names of modules that were also called from outside of the traced model. Serving engines let models
            share modules without weights; calls from outside are not compared.
        weights: by relative name.
        differing_weights: names of weights that differ by more than a conversion between types.
        overwritten: by name of a weight, the letter of the only run that changed it while it was traced.

    Raises:
        UserError: if no module has the same name in both, or `under` names no module.
    """

    def __init__(self, a: Trace, b: Trace, under: tuple[str | None, str | None]) -> None:
        self.a, self.b = a, b
        _check_prefix(a, under[0], "a")
        _check_prefix(b, under[1], "b")
        self.prefixes = _shared_prefixes(a, b, under)
        both = list(zip((a, b), self.prefixes, strict=True))
        weights_a, weights_b = (_weights_below(*one) for one in both)
        self.weights = {name: (weights_a[name], weights_b[name]) for name in weights_a if name in weights_b}
        self.differing_weights = sorted(name for name, pair in self.weights.items() if not _same_weight(*pair))
        changed = [{relative_name(name, prefix) for name in trace.changed} - {None} for trace, prefix in both]
        # A weight that both runs change is meant to change, as running statistics are.
        self.overwritten = {name: "AB"[i] for i in (0, 1) for name in sorted(changed[i] - changed[1 - i])}
        calls_a, calls_b = (_calls_below(*one) for one in both)
        positions = sorted((calls_a[i][0], calls_b[j][0]) for i, j in _align(a, b, calls_a, calls_b))
        self._by_position = {i: self._pair(i, j) for i, j in positions}
        self.calls = list(self._by_position.values())
        names_a, names_b = ({name for _, name in calls} for calls in (calls_a, calls_b))
        self.only = sorted(names_a - names_b), sorted(names_b - names_a)
        self.left_out = sorted({canonical(c.name) for trace in (a, b) for c in trace.calls if _is_foreign(trace, c)})

    def _pair(self, i: int, j: int) -> CallPair:
        a, b = self.a.calls[i], self.b.calls[j]
        name = relative_name(a.name, self.prefixes[0]) or ""
        weights = tuple(sorted(w for w in {*self.differing_weights, *self.overwritten} if is_inside(w, name)))
        return CallPair(name, a, b, weights)

    def enclosing(self, pair: CallPair) -> CallPair | None:
        """The innermost call around this one that both runs have."""
        position = pair.a.parent
        while position is not None and position not in self._by_position:
            position = self.a.calls[position].parent
        return self._by_position.get(position)

    def count_weights(self, name: str) -> int:
        """Number of shared weights in a module."""
        return sum(is_inside(weight, name) for weight in self.weights)

    def retyped_modules(self) -> list[str]:
        """The outermost modules that have another type in the second run while most have the same in both."""
        types = {(name.rpartition(".")[0], name): pair for name, pair in self.weights.items()}
        for call in self.calls:
            types |= {(call.name, f":{x.name}"): (x, y) for x, y in call.output_pairs() if x.is_float and y.is_float}
        owners = [owner for (owner, _), (x, y) in types.items() if x.dtype != y.dtype]
        if len(owners) > len(types) / 2:
            return []
        return [name for name in dict.fromkeys(owners) if not any(name != o and is_inside(name, o) for o in owners)]

    def types_in(self, module: str) -> list[tuple[str, str]]:
        """The types of both runs in a module, where they differ."""
        tensors = [pair for name, pair in self.weights.items() if is_inside(name, module)]
        tensors += [pair for call in self.calls if is_inside(call.name, module) for pair in call.output_pairs()]
        return sorted({(x.dtype, y.dtype) for x, y in tensors if x.dtype != y.dtype})


def _same_weight(x: TensorStats, y: TensorStats) -> bool:
    if x.dtype == y.dtype or not (x.is_float and y.is_float):
        return x.same_values(y)
    return distance(x, y) <= max(ROUNDING.get(kind, 0.1) for kind in (x.dtype, y.dtype))


def _check_prefix(trace: Trace, prefix: str | None, letter: str) -> None:
    names = {canonical(call.name) for call in trace.calls}
    if prefix and not any(is_inside(name, canonical(prefix)) for name in names):
        close = difflib.get_close_matches(prefix, sorted(names), n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"under-{letter}={prefix}: no module of {trace.path} has this name{hint}")


def _is_foreign(trace: Trace, call: Call) -> bool:
    """Whether something other than the traced model called a module that the model calls itself."""
    return not call.inside and call.name in trace.called_inside


def _calls_below(trace: Trace, prefix: str) -> list[tuple[int, str]]:
    """(position, relative name) of every call in a module."""
    calls = ((i, call) for i, call in enumerate(trace.calls) if not _is_foreign(trace, call))
    return [(i, name) for i, call in calls if (name := relative_name(call.name, prefix)) is not None]


def _weights_below(trace: Trace, prefix: str) -> dict[str, TensorStats]:
    weights = trace.weights.items()
    return {name: stats for full, stats in weights if (name := relative_name(full, prefix)) is not None}


def _shared_prefixes(a: Trace, b: Trace, under: tuple[str | None, str | None]) -> tuple[str, str]:
    """The modules of both runs below which the most names are the same. Near the top of that vote, the order is: most
    equal weights, most names, equal first inputs, the outermost module."""
    prefixes = tuple(None if name is None else canonical(name) for name in under)
    if None not in prefixes:
        return prefixes
    kinds_a, kinds_b = ({canonical(call.name): call.kind for call in trace.calls} for trace in (a, b))
    by_tail: dict[tuple[str, ...], list[str]] = {}
    for name in filter(None, kinds_b):
        parts = name.split(".")
        for length in range(1, min(TAIL, len(parts)) + 1):
            by_tail.setdefault(tuple(parts[-length:]), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, kind in kinds_a.items():
        parts = name.split(".") if name else []
        for other in by_tail.get(tuple(parts[-TAIL:]), ()):
            other_parts = other.split(".")
            # A short name is weak evidence: then the class has to be the same too.
            if min(len(parts), len(other_parts)) < TAIL and kinds_b[other] != kind:
                continue
            count = len(common_start(parts[::-1], other_parts[::-1]))
            pair = ".".join(parts[:-count]), ".".join(other_parts[:-count])
            if all(p in (None, q) for p, q in zip(prefixes, pair, strict=True)):
                votes[pair] += 1
    if not votes:
        # A model without submodules has no name but the empty one.
        if kinds_a == kinds_b and set(kinds_a) == {""}:
            return "", ""
        raise UserError(
            f"{a.path} and {b.path} share no module: {_sample(kinds_a)} against {_sample(kinds_b)}; expected two "
            "traces of the same model, or of one inside of another"
        )

    def evidence(pair: tuple[str, str]) -> tuple[int, int, bool, bool]:
        weights_a, weights_b = (_weights_below(trace, prefix) for trace, prefix in zip((a, b), pair, strict=True))
        equal = sum(x.same_values(weights_b[name]) for name, x in weights_a.items() if name in weights_b)
        first = [trace.calls[_calls_below(trace, p)[0][0]] for trace, p in zip((a, b), pair, strict=True)]
        same_inputs = bool(set.intersection(*({stats.hash for stats in call.inputs} for call in first)))
        return equal, votes[pair], same_inputs, pair[1] == ""

    return max((pair for pair, count in votes.items() if count > max(votes.values()) / 2), key=evidence)


def _sample(names: Iterable[str]) -> str:
    names = [name or "the model" for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "no call"


def _align(
    a: Trace, b: Trace, calls_a: list[tuple[int, str]], calls_b: list[tuple[int, str]]
) -> Iterator[tuple[int, int]]:
    """Indices into both lists of the same calls: by name and sizes first, then what is left between by name alone."""
    keys = [
        [(name, *(x.count for x in trace.calls[i].inputs if not x.name.startswith("cache."))) for i, name in calls]
        for trace, calls in ((a, calls_a), (b, calls_b))
    ]
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from zip(range(i1, i2), range(j1, j2), strict=True)
        elif kind == "replace":
            names = [name for _, name in calls_a[i1:i2]], [name for _, name in calls_b[j1:j2]]
            for block in difflib.SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
                yield from ((i1 + block.a + k, j1 + block.b + k) for k in range(block.size))
