"""Rows of `results.csv` and `categories.csv` as what the plots show. Importing it loads no library."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_speculator.utils.errors import UserError

RESULTS, CATEGORIES = "results.csv", "categories.csv"
LOOKUP, RANDOM = "prompt_lookup", "random"
# Drafts that need no word: what they are unless a column says otherwise.
CHAIN = "chain"
# The base alone, in both loops: the line at 1, and no row of any plot.
ALONE = ("none", "generate")

# A varying one of these tells panels of the same prompts file apart.
POLICY = {
    "temperature": "T = {:g}",
    "top_p": "top-p {:g}",
    "top_k": "top-k {:g}",
    "draft_length": "{:g} draft tokens",
    "seed": "seed {:g}",
}
EXPECTED = ("base", "speculator", "method", "prompts", *POLICY, "tau", "accept_rate", "speedup")
NUMBER = re.compile(r"((tau|accept_rate|speedup|kl|ce|(accept|ce|kl|top1)_depth_\d+)(_lo|_hi)?|hist_\d+|n_predict)")
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".txt")
LONGEST = 40

# Okabe and Ito's palette, with Tol's wine for the yellow that white paper swallows. Seven colours and ten markers have
# no common divisor: 70 pairs pass before one comes again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "h", "p")
HATCHES = ("", "////", "....", "xxxx", "----")
GREYS = ("#9A9A9A", "#6E6E6E", "#C2C2C2")
INK = "#333333"


@dataclass(frozen=True)
class PlotStyle:
    """One speculator's label, colour and marker, the same in every plot."""

    label: str
    colour: str
    marker: str
    hatch: str = ""
    line: str = "-"


@dataclass(frozen=True)
class PlotRow:
    """One line of a table, with what the plots call it."""

    look: PlotStyle
    panel: tuple[str, str]  # prompts, policy
    is_lookup: bool
    is_trained: bool
    category: str
    values: dict[str, float] = field(repr=False)

    def value(self, name: str) -> float:
        """NaN where the table has no finite number."""
        value = self.values.get(name, math.nan)
        return value if math.isfinite(value) else math.nan

    def has(self, *names: str) -> bool:
        """Whether the table has a finite number in each of these columns."""
        return all(math.isfinite(self.value(name)) for name in names)

    def series(self, prefix: str) -> dict[int, str]:
        """Index → column of `prefix`0, `prefix`1, … as far as this row has values."""
        found = {int(n[len(prefix) :]): n for n in self.values if re.fullmatch(re.escape(prefix) + r"\d+", n)}
        return {index: found[index] for index in sorted(found) if self.has(found[index])}


def read_tables(directory: Path) -> tuple[list[PlotRow], list[PlotRow]]:
    """The rows of both tables but for the base alone, which is the line at 1 and no row of any plot."""
    if not (directory / RESULTS).is_file():
        raise UserError(f"{directory}: no {RESULTS} here (expected the output directory of an evaluation)")
    tables = [_read(directory / RESULTS, EXPECTED)]
    if not tables[0]:
        raise UserError(f"{directory / RESULTS}: no rows")
    if (directory / CATEGORIES).is_file():
        tables.append(_read(directory / CATEGORIES, (*EXPECTED, "category")))
    tables = [[line for line in table if line["speculator"] not in ALONE] for table in tables]

    lines = [line for table in tables for line in table]
    looks = _looks(lines)
    bases, prompts = (_shortest({line[name] for line in lines}) for name in ("base", "prompts"))
    varying = _varying(lines)

    def row(line: dict[str, Any]) -> PlotRow:
        place = [prompts[line["prompts"]]] + [bases[line["base"]]] * (len(bases) > 1)
        policy = [POLICY[name].format(line[name]) for name in varying if math.isfinite(line[name])]
        return PlotRow(
            look=looks[_who(line)],
            panel=(", ".join(place), ", ".join(policy)),
            is_lookup=line["speculator"] == LOOKUP,
            is_trained=line["speculator"] not in (LOOKUP, RANDOM) and line.get("untrained", "").lower() != "true",
            category=line.get("category", ""),
            values={name: value for name, value in line.items() if isinstance(value, float)},
        )

    # Of two lines of the same thing the later one counts. Checkpoints come before what they are compared with.
    unique = [{(r.look, r.panel, r.category): r for r in map(row, table)}.values() for table in tables]
    unique = [sorted(rows, key=lambda row: row.look.line != "-") for rows in unique]
    return unique[0], unique[1] if len(unique) > 1 else []


def _read(path: Path, expected: Sequence[str]) -> list[dict[str, Any]]:
    """A table's lines: numbers as floats, NaN for an empty cell, all else as text."""
    import pandas as pd

    try:
        # Without pandas' own list of words for "missing": `none` is a speculator here.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False).fillna("")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a table: {' '.join(str(error).split())}") from None
    missing = [name for name in expected if name not in frame.columns]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)} (expected the table of an evaluation)")
    for name in frame.columns:
        if name in POLICY or NUMBER.fullmatch(name):
            numbers = pd.to_numeric(frame[name], errors="coerce")
            wrong = frame[name][numbers.isna() & ~frame[name].str.strip().str.lower().isin(["", "nan"])]
            if len(wrong):
                raise UserError(f"{path}: column {name} holds {wrong.iloc[0]!r}, expected a number")
            frame[name] = numbers.astype(float)
    return frame.to_dict("records")


def _who(line: dict[str, Any]) -> tuple[str, ...]:
    """What makes two lines the same speculator: a path and what it drafts do, `random` needs its depths as well."""
    drafts = line.get("draft_shape", "")
    shape = str(line.get("n_predict", "")) if line["speculator"] == RANDOM else "" if drafts == CHAIN else drafts
    return (line["speculator"], line["method"], shape)


def _varying(lines: list[dict[str, Any]]) -> list[str]:
    """The policy columns that tell panels apart.

    Draft lengths and seeds that differ between speculators only do not: those belong in one panel.
    """
    found = []
    for name in POLICY:
        seen: dict[Any, set[float]] = {}
        for line in lines:
            group = (_who(line), line["base"], line["prompts"]) if name in ("draft_length", "seed") else None
            if math.isfinite(line[name]):
                seen.setdefault(group, set()).add(line[name])
        if any(len(values) > 1 for values in seen.values()):
            found.append(name)
    return found


def _shortest(paths: Iterable[str]) -> dict[str, str]:
    """Path → the fewest trailing parts that no other path ends in."""
    paths = sorted(set(paths))
    whole = {p: Path(p) for p in paths}
    bare = {p: path.with_suffix("") if path.suffix.lower() in SUFFIXES else path for p, path in whole.items()}
    parts = {p: path.parts for p, path in (bare if len(set(bare.values())) == len(paths) else whole).items()}

    def label(path: str) -> str:
        for count in range(1, len(parts[path]) + 1):
            tail = parts[path][-count:]
            if not any(parts[other][-count:] == tail for other in paths if other != path):
                return str(Path(*tail))
        return path

    labels = {path: label(path) for path in paths}
    short = {path: f"{text[:14]}…{text[-25:]}" if len(text) > LONGEST else text for path, text in labels.items()}
    return short if len(set(short.values())) == len(paths) else labels


def _looks(lines: list[dict[str, Any]]) -> dict[tuple[str, ...], PlotStyle]:
    """Speculator → its looks: in the order of the table, paths in colours, what needs no training in black and grey."""
    everyone = list(dict.fromkeys(map(_who, lines)))
    methods: dict[str, list[str]] = {}
    for name, method, _ in everyone:
        methods.setdefault(method, []).append(name)
    # With the method in the label, only paths of one method need telling apart.
    shortest = {
        method: _shortest(name for name in names if name not in (LOOKUP, RANDOM)) for method, names in methods.items()
    }
    paths = [who for who in everyone if who[0] not in (LOOKUP, RANDOM)]
    randoms = [who for who in everyone if who[0] == RANDOM]

    looks = {}
    for i, (name, method, shape) in enumerate(paths):
        text = shortest[method][name]
        text = text if not method or method in text else f"{method}: {text}"
        text = f"{text} ({shape})" if shape else text
        hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
        looks[name, method, shape] = PlotStyle(text, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], hatch)
    for i, (name, method, shape) in enumerate(randoms):
        text = f"random {method}".strip()
        if [who[1] for who in randoms].count(method) > 1 and shape not in ("", "nan"):
            text = f"{text}, {float(shape):g} depths"
        looks[name, method, shape] = PlotStyle(text, GREYS[i % 3], "d", HATCHES[i // 3 % len(HATCHES)], ":")
    return looks | {who: PlotStyle("prompt lookup", INK, "X", line=":") for who in everyone if who[0] == LOOKUP}
