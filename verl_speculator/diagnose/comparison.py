"""Finds the first place where two traced runs differ by more than rounding, and says what the cause is.

The traces are walked in the order in which calls end, so of nested modules the innermost comes first. A call is the
culprit if its inputs and its weights agree and its output does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from verl_speculator.diagnose.module_matching import CallPair, TensorPair, TracePair, common_start, is_inside
from verl_speculator.diagnose.trace_file import TOLERANCES, Call, TensorStats, Trace, distance
from verl_speculator.utils.settings import UserError

# See `_Search.jump`.
JUMP = 10.0
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)$")
INPUT_NAMES = {"input_ids": "the tokens", "tokens": "the tokens"}
MAX_NAMES = 3


@dataclass(frozen=True)
class Verdict:
    """The cause of a difference.

    Attributes:
        kind: `same`, `accumulation`, `drift` (past the tolerance, without a jump), `inputs`, `weights`, `type`,
            `module`, or `between` (a module's own code, between the modules that it calls).
        sentence, evidence: the answer, and what it is based on.
        module: the culprit's name, None without one.
    """

    kind: str
    sentence: str
    evidence: tuple[str, ...] = ()
    module: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two traces. `tolerance` is the largest relative difference that rounding may explain."""

    traces: TracePair
    verdict: Verdict
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the runs differ by rounding alone."""
        return self.verdict.kind in ("same", "accumulation")

    @property
    def notes(self) -> list[str]:
        """Other differences, whether they matter or not: weights, environment, cache layout, modules of one run."""
        traces = self.traces
        a, b = traces.a, traces.b
        notes = []
        if traces.differing_weights and self.verdict.kind not in ("weights", "type"):
            notes.append(f"weights differ: {_first_names(traces.differing_weights)}")
        for key, value in a.environment.items():
            if value != b.environment.get(key):
                notes.append(f"{key}: {value} in A, {b.environment.get(key)} in B")
        if a.caches and b.caches and a.caches != b.caches:
            notes.append(f"KV caches: {_cache_layout(a)} in A, {_cache_layout(b)} in B")
        if traces.left_out:
            notes.append(f"left out, for something else called it too: {_first_names(traces.left_out)}")
        only = zip("AB", traces.only, strict=True)
        return notes + [f"called only in {letter}: {_first_names(names)}" for letter, names in only if names]


def compare(
    a: Trace, b: Trace, *, tolerance: float | None = None, under: tuple[str | None, str | None] = (None, None)
) -> Comparison:
    """Find the first place where two runs differ.

    Args:
        a, b: the traces.
        tolerance: the largest relative difference that rounding explains; by default `TOLERANCES` of the coarsest type
            in either run.
        under: the module of each trace to compare; None finds it.

    Raises:
        UserError: if the traces share no module, or the tolerance is not above 0.
    """
    if tolerance is None:
        stats = (s for t in (a, b) for s in (*t.weights.values(), *(s for call in t.calls for s in call.outputs)))
        tolerance = max((TOLERANCES.get(s.dtype, 0.0) for s in stats), default=0.0) or TOLERANCES["float32"]
    elif not (math.isfinite(tolerance) and tolerance > 0):
        raise UserError(f"tolerance={tolerance}: expected a number above 0, such as {TOLERANCES['float32']:g}")
    traces = TracePair(a, b, under)
    return Comparison(traces, _Search(traces, tolerance).verdict(), tolerance)


class _Search:
    """The search for the first cause."""

    def __init__(self, traces: TracePair, tolerance: float) -> None:
        self.traces, self.tolerance = traces, tolerance
        self.ties: list[CallPair] = []

    def verdict(self) -> Verdict:
        """The first cause; a jump explains everything after it, so it comes before what all of the run shows."""
        return self.jump() or self.types() or self.weights() or self.rounding()

    def events(self) -> Iterator[tuple[bool, CallPair]]:
        """(whether the call ends, call) in the order of the first run. Calls that raised do not end."""
        events = [(call.a.start, False, call) for call in self.traces.calls]
        events += [(call.a.end, True, call) for call in self.traces.calls if call.a.end]
        return ((is_end, call) for _, is_end, call in sorted(events, key=lambda event: event[0]))

    def jump(self) -> Verdict | None:
        """The first call, or place between calls, at which a difference arises that its inputs do not explain.

        A correct module hands on the rounding errors of its inputs, multiplied by its condition number. Between float32
        and bfloat16 the outputs of a module differ by 1.1 times its inputs in the median and 3.9 times at most (random
        Llama and Qwen2-MoE models): only the sum over many layers makes a difference large. A fault makes a large
        difference out of a small one or none. So the output of a call jumps if its inputs agree within the tolerance
        and its output differs by more than the tolerance *and* by more than JUMP times its inputs. The first condition
        alone would blame the module in which smooth growth happens to cross the tolerance; the second alone would blame
        rounding after inputs that are equal. JUMP = 10 is above 3.9 even if both estimates are wrong by a fifth.
        A router that chooses another expert jumps 30-fold without a fault; `is_tie` tells this case.

        Arguments are tested when a call starts, against the largest difference of all earlier outputs (`noise`): the
        code between two calls gets its values from those outputs. Once growth has passed the tolerance (`has_grown`),
        or a tie was decided differently, differing arguments are consequences, and only a call whose own inputs agree
        can still be blamed.
        """
        noise, has_grown, last = 0.0, False, None
        # Integers that differ (positions, cache lengths) may change no output yet, and show much later in what they
        # made a module write to the cache. The first such place is the cause of any later jump.
        unseen: tuple[CallPair, CallPair | None, CallPair] | None = None
        for is_end, call in self.events():
            if not is_end:
                if call.inputs <= max(self.tolerance, JUMP * noise) or has_grown:
                    continue
                outer = self.traces.enclosing(call)
                if outer is None:
                    return self.differing_inputs(call)
                if outer.inputs > self.tolerance:
                    continue  # judged where the outer call started
                if outer.outputs > self.tolerance:
                    return self.between(*(unseen or (outer, last, call)))
                if unseen is None and not self.first_differing_input(call)[0].is_float:
                    unseen = outer, last, call
            elif call.inputs > self.tolerance:
                continue
            elif call.outputs > max(self.tolerance, JUMP * call.inputs):
                if self.is_tie(call, noise):
                    self.ties.append(call)
                    has_grown = True
                elif not any(call.a.start <= tie.a.start and tie.a.end <= call.a.end for tie in self.ties):
                    return self.between(*unseen) if unseen else self.culprit(call)
            else:
                has_grown = has_grown or call.outputs > self.tolerance
                noise, last = max(noise, call.outputs), call
        return self.differing_inputs(unseen[2], "no output shows it") if unseen else None

    def is_tie(self, call: CallPair, noise: float) -> bool:
        """Whether only integers differ (chosen experts or tokens), while the scores agree to within rounding.

        A choice between scores that nearly tie is decided by rounding. Without any rounding before it, it is a fault.
        """
        scores = [distance(x, y) for x, y in call.output_pairs() if x.is_float and y.is_float]
        return bool(scores) and max(scores) <= self.tolerance and max(call.inputs, noise, *scores) > 0

    def first_differing_input(self, call: CallPair) -> TensorPair:
        """An argument that differs; integers first, because floating point arguments often follow from them."""
        differing = [pair for pair in call.input_pairs() if distance(*pair) > self.tolerance]
        return min(differing, key=lambda pair: pair[0].is_float)

    def differing_inputs(self, call: CallPair, *evidence: str) -> Verdict:
        """The runs got different data."""
        x, y = self.first_differing_input(call)
        where = f"{call.label} (call {call.a.index})"
        if x.name.startswith("cache."):
            what = f"the KV cache that {where} finds, its {x.name.removeprefix('cache.')}"
        elif name := INPUT_NAMES.get(x.name) or ("the positions" if "position" in x.name else None):
            what = f"{name} of {where}"
        else:
            what = f"{x.name}, given to {where}"
        weights = f"all {len(self.traces.weights)} shared weights are the same"
        if differing := self.traces.differing_weights:
            weights = f"weights differ: {_first_names(differing)}"
        sentence = f"The inputs already differ at the start: {what}: {describe_difference(x, y)}."
        return Verdict("inputs", sentence, (*evidence, weights), call.name)

    def culprit(self, call: CallPair) -> Verdict:
        """One call makes the difference: by its type, its weights, its cache places, or its own code."""
        traces, name = self.traces, f"{call.label} (call {call.a.index})"
        evidence = (f"its inputs agree: {_amount(call.inputs)}", *self.output_evidence(call))
        if any(is_inside(m, call.name) or is_inside(call.name, m) for m in traces.retyped_modules()):
            return self.types(evidence)
        if call.weights:
            overwritten = [w for w in call.weights if w not in traces.differing_weights]
            what = "Weights differ"
            if len(overwritten) == len(call.weights):
                what = f"Weights were overwritten while run {traces.overwritten[overwritten[0]]} was under way"
            sentence = f"{what}: {_first_names(call.weights)}; {name} is the first module whose output shows it."
            return Verdict("weights", sentence, (*evidence, *self.weights_evidence(call.weights)), call.name)
        pairs = [pair for pair in call.input_pairs(cache_places=True) if not pair[0].same_values(pair[1])]
        places = [f"{x.name.removeprefix('cache.')}: {describe_difference(x, y)}" for x, y in pairs]
        if places:
            sentence = (
                f"{name} is given other places in the KV cache: {places[0]}; its other inputs and its weights agree, "
                "and it is the first module whose output does not."
            )
            return Verdict("inputs", sentence, (*evidence, *places[1:]), call.name)
        count = traces.count_weights(call.name)
        sentence = (
            f"{name} is the first module whose inputs and weights agree and whose output does not: "
            f"{_amount(call.inputs)} at its inputs, {_amount(call.outputs)} at its output."
        )
        weights = f"its {count} weights are the same" if count else "it has no weights"
        return Verdict("module", sentence, (*evidence, weights), call.name)

    def between(self, outer: CallPair, last: CallPair | None, call: CallPair) -> Verdict:
        """A module's own code makes the difference: after its call `last` and before its call `call`."""
        x, y = self.first_differing_input(call)
        if x.name.startswith("cache."):
            return self.differing_inputs(call)
        what = f"other {'positions, ' if 'position' in x.name else ''}{x.name}"
        after = f"between {last.label} and" if last else "before"
        sentence = (
            f"{outer.label} (call {outer.a.index}) is the first module whose inputs and weights agree and whose output "
            f"does not, by its own code, {after} {call.label}, which is given {what}: {describe_difference(x, y)}."
        )
        evidence = [f"up to {last.label} all agree: {_amount(last.outputs)} at its output"] if last else []
        sources = {"A": _source(self.traces.a, call.a, x), "B": _source(self.traces.b, call.b, y)}
        evidence += [f"in {letter} it is {source}, bit for bit" for letter, source in sources.items() if source]
        evidence += self.output_evidence(outer)
        names_a, names_b = ({stats.name for stats in one.inputs} for one in (outer.a, outer.b))
        only = (("A", sorted(names_a - names_b)), ("B", sorted(names_b - names_a)))
        evidence += [f"given to {outer.label} in {run} alone: {_first_names(names)}" for run, names in only if names]
        return Verdict("between", sentence, (*evidence, *self.weights_evidence(outer.weights)), outer.name)

    def types(self, evidence: tuple[str, ...] = ()) -> Verdict | None:
        """One part of the model has another type than in the other run."""
        modules = self.traces.retyped_modules()
        if not modules:
            return None
        common = ".".join(common_start(*(name.split(".") for name in modules)))
        types = ", ".join(f"{x} in A, {y} in B" for x, y in self.traces.types_in(common))
        names = _first_names(modules)
        sentence = f"{common or names} runs in another type: {types}; most of the model has the same types in both."
        return Verdict("type", sentence, (*evidence, f"modules of another type: {names}"), common or modules[0])

    def weights(self) -> Verdict | None:
        """Weights differ, and no output by more than rounding."""
        names, what = self.traces.differing_weights, "Weights differ"
        if not names:
            names, what = sorted(self.traces.overwritten), "Weights were overwritten while a run was under way"
        if not names:
            return None
        sentence = f"{what}: {_first_names(names)}; no output shows more than rounding."
        return Verdict("weights", sentence, tuple(self.weights_evidence(names)), names[0].rpartition(".")[0])

    def rounding(self) -> Verdict:
        """Nothing is to blame: equal runs, rounding, or rounding that grew past the tolerance."""
        calls = self.traces.calls
        evidence = (f"compared: {len(calls)} calls and {len(self.traces.weights)} weights",)
        if all(call.inputs == call.outputs == 0 for call in calls):
            return Verdict("same", "The runs are the same, bit for bit.", evidence)
        largest = max((c for c in calls if math.isfinite(c.outputs)), key=lambda call: call.outputs)
        amount = f"up to {largest.outputs:.1e} in {largest.label}{self.growth()}"
        if largest.outputs > self.tolerance and not self.ties:
            sentence = f"Accumulation past the tolerance of {self.tolerance:g}, without a jump: {amount}."
            return Verdict("drift", sentence, evidence, largest.name)
        if self.ties:
            names = list(dict.fromkeys(call.name for call in self.ties))
            amount += f"; where scores nearly tie, rounding chose otherwise in {_first_names(names)}"
        sentence = f"Accumulation, no divergence: rounding alone, {amount}, tolerance {self.tolerance:g}."
        return Verdict("accumulation", sentence, evidence)

    def growth(self) -> str:
        """How the difference grows from layer to layer in one forward pass."""
        layers = [c for c in self.traces.calls if LAYER.search(c.name) and 0 < c.outputs < math.inf and not c.a.index]
        if len(layers) < 2:
            return ""
        first, last = layers[0], layers[-1]
        rate = (last.outputs / first.outputs) ** (1 / (len(layers) - 1))
        ends = f"{first.outputs:.1e} after {first.name} to {last.outputs:.1e} after {last.name}"
        return f", growing from {ends} ({rate:.2f}-fold a layer)"

    def weights_evidence(self, names: Iterable[str]) -> list[str]:
        """How the first few of these weights differ."""
        lines = []
        for name in list(names)[:MAX_NAMES]:
            x, y = self.traces.weights[name]
            how = describe_difference(x, y)
            if x.shape == y.shape and x.same_values(y):
                run = self.traces.overwritten.get(name)
                how = f"the same at the start, and overwritten while run {run} was under way"
            lines.append(f"{name}: {how}")
        return lines

    def output_evidence(self, call: CallPair) -> list[str]:
        """How the outputs of a call differ, and whether either repeats an earlier output of the module."""
        lines = [f"{x.name}: {describe_difference(x, y)}" for x, y in call.output_pairs() if distance(x, y) > 0]
        for letter, trace, one in (("A", self.traces.a, call.a), ("B", self.traces.b, call.b)):
            for stats in one.outputs:
                earlier = None if stats.name.startswith("cache.") else _earlier_call(trace, one, stats)
                if earlier is not None:
                    lines.append(f"in {letter} its {stats.name} is bit for bit that of its call {earlier}: stale state")
        return lines


def describe_difference(x: TensorStats, y: TensorStats) -> str:
    """Where two tensors differ, with their values."""
    if x.count != y.count:
        return f"shape {list(x.shape)} in A, {list(y.shape)} in B"
    if (x.nan, x.inf) != (y.nan, y.inf):
        return f"{x.nan} NaN and {x.inf} infinite in A, {y.nan} and {y.inf} in B"
    if x.is_float:
        values = f"mean {x.mean:.4g} in A, {y.mean:.4g} in B; std {x.std:.4g}, {y.std:.4g}"
        return f"{values}; relative difference {distance(x, y):.1e}"
    differing = (i for i, (p, q) in enumerate(zip(x.samples, y.samples, strict=True)) if p != q)
    if (i := next(differing, None)) is None:
        return f"other values behind the first {len(x.samples)}"
    return f"{int(x.samples[i])} in A and {int(y.samples[i])} in B at place {i}"


def _earlier_call(trace: Trace, call: Call, stats: TensorStats) -> int | None:
    """Index of an earlier call of the same module that made the same output from other inputs."""
    for other in trace.calls:
        is_earlier = other.name == call.name and other.index < call.index and stats.norm > 0
        same_output = is_earlier and any(s.name == stats.name and s.same_values(stats) for s in other.outputs)
        if same_output and [s.hash for s in other.inputs] != [s.hash for s in call.inputs]:
            return other.index
    return None


def _source(trace: Trace, call: Call, stats: TensorStats) -> str | None:
    """The first earlier output or input that holds exactly these values."""
    for earlier in trace.calls:
        if stats.norm > 0 and 0 < earlier.end < call.start:
            for kind, tensors in (("output", earlier.outputs), ("input", earlier.inputs)):
                if any(tensor.same_values(stats) for tensor in tensors):
                    return f"the {kind} of {earlier.name or 'the model'}"
    return None


def _first_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _cache_layout(trace: Trace) -> str:
    groups = [group for cache in trace.caches for group in cache["groups"]]
    return ", ".join(f"{len(g['layers'])} × {g['kind']} {g['shape']} {g['dtype']}, {g['slots']} slots" for g in groups)


def _amount(value: float) -> str:
    """A distance in words."""
    if value == 0:
        return "no difference"
    return "other values" if math.isinf(value) else f"a relative difference of {value:.1e}"
