"""Two traces, walked side by side until something is no longer the same; what it is, is the verdict.

Walked in the order in which calls end, so that of modules inside of each other the innermost comes first. A call is to
blame when what it was given agrees, its weights agree, and what it made of them does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from verl_speculator.diagnose.module_matching import (
    Pair,
    Sides,
    about_output,
    below,
    coarsest,
    common_name,
    name_of,
    same_elsewhere,
    some,
    tensor_pairs,
    values_of,
    without_places,
)
from verl_speculator.diagnose.tensor_stats import TOLERANCES, TensorFacts, distance
from verl_speculator.diagnose.trace_file import Trace
from verl_speculator.utils.errors import UserError

# A jump is so many times what came before it; less is what rounding grows by.
JUMP = 10.0
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)$")
NAMES = {"input_ids": "the tokens", "tokens": "the tokens", "positions": "the positions"}


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        kind: `same`, `accumulation`, `drift` (past the tolerance, without a jump), `inputs`, `weights`, `type`,
            `module`, or `between` (a module's own code, between the modules that it calls).
        sentence: the answer.
        evidence: what it rests on.
        module: the culprit's name, None without one.
    """

    kind: str
    sentence: str
    evidence: tuple[str, ...] = ()
    module: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What two traces say together.

    Attributes:
        sides: the two traces, matched.
        verdict: the first cause.
        tolerance: the largest relative difference that rounding may explain.
    """

    sides: Sides
    verdict: Verdict
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether nothing but rounding tells the runs apart."""
        return self.verdict.kind in ("same", "accumulation")

    @property
    def notes(self) -> list[str]:
        """What else is not the same, whether it matters or not."""
        sides, told = self.sides, []
        if sides.unlike and self.verdict.kind not in ("weights", "type"):
            told.append(f"weights differ: {some(sides.unlike)}")
        shared = sides.matching.shared
        only = zip("AB", sides.matching.only, strict=True)
        return [
            *told,
            *sides.surroundings(),
            *([f"left out, for something else called it too: {some(list(shared))}"] if shared else []),
            *(f"called only in {x}: {some(list(names))}" for x, names in only if names),
        ]


def compare(
    a: Trace, b: Trace, *, tolerance: float | None = None, under: tuple[str | None, str | None] = (None, None)
) -> Comparison:
    """Find the first place where two runs part.

    Args:
        a, b: the traces.
        tolerance: the largest relative difference that rounding explains; by default `TOLERANCES` of the coarsest type
            in either run.
        under: the module of each that is the same thing; None finds it.

    Raises:
        UserError: if they share no module.
    """
    if tolerance is None:
        tolerance = TOLERANCES[coarsest(a, b)]
    elif not (math.isfinite(tolerance) and tolerance > 0):
        raise UserError(f"tolerance={tolerance}: expected a number above 0, such as {TOLERANCES['float32']:g}")
    sides = Sides(a, b, under)
    return Comparison(sides, _Walk(sides, tolerance).verdict(), tolerance)


class _Walk:
    """The search for the first cause."""

    def __init__(self, sides: Sides, tolerance: float) -> None:
        self.sides, self.tolerance = sides, tolerance
        self.ties: list[Pair] = []

    def verdict(self) -> Verdict:
        """The first cause, in the order in which causes work."""
        return self._jump() or self._type() or self._weights() or self._rounding()

    def _events(self) -> Iterator[tuple[bool, Pair]]:
        """(whether it is an end, pair) in the first run's order; calls that never ended have no end."""
        found = [(p.a.start, False, p) for p in self.sides.pairs]
        found += [(p.a.end, True, p) for p in self.sides.pairs if p.a.end]
        return ((is_end, pair) for _, is_end, pair in sorted(found, key=lambda event: event[0]))

    def _jump(self) -> Verdict | None:
        """The first call, or place between calls, that makes a difference out of none."""
        noise, grown, last, silent = 0.0, False, None, None
        for is_end, pair in self._events():
            if not is_end:
                if pair.inputs <= max(self.tolerance, JUMP * noise) or grown:
                    continue
                outer = self.sides.outer(pair)
                if outer is None:
                    return self._inputs(pair)
                if outer.inputs > self.tolerance:
                    continue  # told where that call began
                if outer.outputs > self.tolerance:
                    return self._between(*(silent or (outer, last, pair)))
                if silent is None and not self._first_unlike(pair)[0].is_float:
                    silent = outer, last, pair  # other positions may show much later, in what the cache holds
            elif pair.inputs > self.tolerance:
                continue
            elif pair.outputs > max(self.tolerance, JUMP * pair.inputs):
                if self._is_tie(pair, noise):
                    self.ties.append(pair)
                    grown = True
                elif not self._holds_a_tie(pair):
                    return self._between(*silent) if silent else self._culprit(pair)
            else:
                grown = grown or pair.outputs > self.tolerance
                noise, last = max(noise, pair.outputs), pair
        return self._inputs(silent[2], "no output shows it") if silent else None

    def _is_tie(self, pair: Pair, noise: float) -> bool:
        """Whether only choices differ (of experts, of tokens), and rounding alone can have made them."""
        numbers = [distance(x, y) for x, y in tensor_pairs(pair.a.outputs, pair.b.outputs) if x.is_float and y.is_float]
        rounds = max(pair.inputs, noise, *numbers, 0.0) > 0
        return rounds and bool(numbers) and max(numbers) <= self.tolerance

    def _holds_a_tie(self, pair: Pair) -> bool:
        return any(pair.a.start <= tie.a.start and tie.a.end <= pair.a.end for tie in self.ties)

    def _first_unlike(self, pair: Pair) -> tuple[TensorFacts, TensorFacts]:
        """What it was given that differs; integers first, since numbers often follow from them."""
        given = (without_places(call.inputs) for call in (pair.a, pair.b))
        unlike = [xy for xy in tensor_pairs(*given) if distance(*xy) > self.tolerance]
        return min(unlike, key=lambda xy: xy[0].is_float)

    def _inputs(self, pair: Pair, *evidence: str) -> Verdict:
        x, y = self._first_unlike(pair)
        where = f"{name_of(pair.name, pair.a)} (call {pair.a.index})"
        if x.name.startswith("cache."):
            what = f"the KV cache that {where} finds, its {x.name.removeprefix('cache.')}"
        else:
            default = "the positions" if "position" in x.name else f"{x.name}, given to"
            what = f"{NAMES.get(x.name, default)} of {where}".replace("to of", "to")
        sentence = f"The inputs already differ at the start: {what}: {values_of(x, y)}."
        return Verdict("inputs", sentence, (*evidence, self.sides.weights_sentence()), pair.name)

    def _culprit(self, pair: Pair) -> Verdict:
        sides, name = self.sides, f"{name_of(pair.name, pair.a)} (call {pair.a.index})"
        outputs = tensor_pairs(pair.a.outputs, pair.b.outputs)
        evidence = (
            f"its inputs agree: {_amount(pair.inputs)}",
            *about_output(sides.a, sides.b, pair.a, pair.b, outputs),
        )
        odd = sides.odd_modules()
        if any(below(o, pair.name) is not None or below(pair.name, o) is not None for o in odd):
            return self._type(evidence)
        if pair.weights:
            late = [w for w in pair.weights if w not in sides.unlike]
            if len(late) == len(pair.weights):
                what = f"Weights were overwritten while run {sides.changed[late[0]]} was under way"
            else:
                what = "Weights differ"
            sentence = f"{what}: {some(list(pair.weights))}; {name} is the first module whose output shows it."
            return Verdict("weights", sentence, (*evidence, *sides.about_weights(pair.weights)), pair.name)
        if places := sides.places(pair):
            sentence = (
                f"{name} is given other places in the KV cache: {places[0]}; everything else that it is given and its "
                f"weights agree, and it is the first module whose output does not."
            )
            return Verdict("inputs", sentence, (*evidence, *places[1:]), pair.name)
        count = sides.count_weights(pair.name)
        sentence = (
            f"{name} is the first module whose inputs and weights agree and whose output does not: "
            f"{_amount(pair.inputs)} at its inputs, {_amount(pair.outputs)} at its output."
        )
        weights = f"its {count} weights are the same" if count else "it has no weights"
        return Verdict("module", sentence, (*evidence, weights), pair.name)

    def _between(self, outer: Pair, last: Pair | None, pair: Pair) -> Verdict:
        """What a module computes itself, between the modules that it calls."""
        x, y = self._first_unlike(pair)
        if x.name.startswith("cache."):
            return self._inputs(pair)
        what = f"other {'positions, ' if 'position' in x.name else ''}{x.name}"
        after = f"between {name_of(last.name, last.a)} and" if last else "before"
        sentence = (
            f"{name_of(outer.name, outer.a)} (call {outer.a.index}) is the first module whose inputs and weights agree "
            f"and whose output does not, by its own code, {after} {name_of(pair.name, pair.a)}, which is given {what}: "
            f"{values_of(x, y)}."
        )
        a, b = self.sides.a, self.sides.b
        evidence = same_elsewhere(a, b, pair.a, pair.b, x, y)
        evidence += about_output(a, b, outer.a, outer.b, tensor_pairs(outer.a.outputs, outer.b.outputs))
        if last:
            evidence.insert(0, f"up to {name_of(last.name, last.a)} all agree: {_amount(last.outputs)} at its output")
        given = [{fact.name for fact in call.inputs} for call in (outer.a, outer.b)]
        for letter, names in zip("AB", (given[0] - given[1], given[1] - given[0]), strict=True):
            if names:
                evidence.append(f"given to {name_of(outer.name, outer.a)} in {letter} alone: {some(sorted(names))}")
        return Verdict("between", sentence, (*evidence, *self.sides.about_weights(outer.weights)), outer.name)

    def _type(self, evidence: tuple[str, ...] = ()) -> Verdict | None:
        odd = self.sides.odd_modules()
        if not odd:
            return None
        whole = common_name(odd)
        told = ", ".join(f"{x} in A, {y} in B" for x, y in self.sides.types_in(whole))
        sentence = f"{whole or some(odd)} runs in another type: {told}; most of the model has the same types in both."
        return Verdict("type", sentence, (*evidence, f"modules of another type: {some(odd)}"), whole or odd[0])

    def _weights(self) -> Verdict | None:
        sides = self.sides
        if sides.unlike:
            names, what = sides.unlike, "Weights differ"
        elif sides.changed:
            names, what = sorted(sides.changed), "Weights were overwritten while a run was under way"
        else:
            return None
        sentence = f"{what}: {some(names)}; no output shows more than rounding."
        return Verdict("weights", sentence, tuple(sides.about_weights(names)), names[0].rpartition(".")[0])

    def _rounding(self) -> Verdict:
        pairs = self.sides.pairs
        evidence = (f"compared: {len(pairs)} calls and {len(self.sides.weights)} weights",)
        if all(pair.inputs == pair.outputs == 0 for pair in pairs):
            return Verdict("same", "The runs are the same, bit for bit.", evidence)
        largest = max((p for p in pairs if math.isfinite(p.outputs)), key=lambda pair: pair.outputs)
        most = f"up to {largest.outputs:.1e} in {name_of(largest.name, largest.a)}{self._growth()}"
        if largest.outputs > self.tolerance and not self.ties:
            sentence = f"Accumulation past the tolerance of {self.tolerance:g}, without a jump: {most}."
            return Verdict("drift", sentence, evidence, largest.name)
        if self.ties:
            names = list(dict.fromkeys(pair.name for pair in self.ties))
            most += f"; where scores nearly tie, rounding chose otherwise in {some(names)}"
        sentence = f"Accumulation, no divergence: rounding alone, {most}, tolerance {self.tolerance:g}."
        return Verdict("accumulation", sentence, evidence)

    def _growth(self) -> str:
        """How it grows from layer to layer, over one pass."""
        blocks = [p for p in self.sides.pairs if BLOCK.search(p.name) and 0 < p.outputs < math.inf and not p.a.index]
        if len(blocks) < 2:
            return ""
        first, last = blocks[0], blocks[-1]
        rate = (last.outputs / first.outputs) ** (1 / (len(blocks) - 1))
        ends = f"{first.outputs:.1e} after {first.name} to {last.outputs:.1e} after {last.name}"
        return f", growing from {ends} ({rate:.2f}-fold a layer)"


def _amount(value: float) -> str:
    """A distance in words."""
    if value == 0:
        return "no difference"
    return "other values" if math.isinf(value) else f"a relative difference of {value:.1e}"
