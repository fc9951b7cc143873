"""Rows of `results.csv` and `categories.csv` with their panels and styles. Importing it loads no library."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from verl_speculator.utils.settings import UserError, one_line

RESULTS, CATEGORIES = "results.csv", "categories.csv"
LOOKUP, RANDOM = "prompt_lookup", "random"
# The base model alone, in both loops: the line at 1, and no row of any plot.
VANILLA = ("none", "generate")

# Columns that divide the rows of one prompts file into panels where they vary, and their titles.
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
LABEL_WIDTH = 40

# Okabe and Ito's palette, with Tol's wine for the yellow that is lost on white paper. Seven colours and ten markers
# have no common divisor: they make 70 different pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "h", "p")
HATCHES = ("", "////", "....", "xxxx", "----")
GREYS = ("#9A9A9A", "#6E6E6E", "#C2C2C2")
INK = "#333333"


@dataclass(frozen=True)
class PlotStyle:
    """A speculator's label, colour and marker, the same in every plot."""

    label: str
    colour: str
    marker: str
    hatch: str = ""
    line: str = "-"


@dataclass(frozen=True)
class PlotRow:
    """A row of a table with its style and its panel."""

    style: PlotStyle
    panel: tuple[str, str]  # prompts, policy
    is_lookup: bool
    is_trained: bool
    category: str
    values: dict[str, float] = field(repr=False)  # finite ones
    base: str = ""  # named only where there are several

    def value(self, name: str) -> float:
        """NaN where the table has no finite number."""
        return self.values.get(name, math.nan)

    def has(self, name: str) -> bool:
        """Whether the table has a finite number in a column."""
        return name in self.values

    def series(self, prefix: str) -> dict[int, float]:
        """Index → value of those columns `prefix`0, `prefix`1, … that have one."""
        indices = (name.removeprefix(prefix) for name in self.values if name.startswith(prefix))
        return {i: self.values[f"{prefix}{i}"] for i in sorted(int(i) for i in indices if i.isdigit())}


def read_tables(directory: Path) -> tuple[list[PlotRow], list[PlotRow]]:
    """The rows of `results.csv` and of `categories.csv`, if there is one, without those of the base model alone. Raises
    UserError if a table cannot be read or lacks a column, or there are no results."""
    if not (directory / RESULTS).is_file():
        raise UserError(f"{directory}: no {RESULTS} here (expected the output directory of an evaluation)")
    tables = [_read(directory / RESULTS, EXPECTED)]
    if not tables[0]:
        raise UserError(f"{directory / RESULTS}: no rows")
    has_categories = (directory / CATEGORIES).is_file()
    tables.append(_read(directory / CATEGORIES, (*EXPECTED, "category")) if has_categories else [])
    tables = [[line for line in table if line["speculator"] not in VANILLA] for table in tables]
    lines = list(chain(*tables))
    styles, varying = _styles(lines), _varying_policy(lines)
    bases, prompts = (_short_labels(line[name] for line in lines) for name in ("base", "prompts"))

    def plot_row(line: dict[str, Any]) -> PlotRow:
        base = bases[line["base"]] if len(bases) > 1 else ""
        policy = [POLICY[name].format(line[name]) for name in varying if not math.isnan(line[name])]
        return PlotRow(
            style=styles[_identity(line)],
            panel=(", ".join(filter(None, (prompts[line["prompts"]], base))), ", ".join(policy)),
            is_lookup=line["speculator"] == LOOKUP,
            is_trained=line["speculator"] not in (LOOKUP, RANDOM) and line.get("untrained", "").lower() != "true",
            category=line.get("category", ""),
            values={name: x for name, x in line.items() if isinstance(x, float) and not math.isnan(x)},
            base=base,
        )

    # Of two lines for the same thing the later one counts. Checkpoints come before what they are compared with.
    results, categories = ({(r.style, r.panel, r.category): r for r in map(plot_row, table)} for table in tables)
    return tuple(sorted(table.values(), key=lambda row: row.style.line != "-") for table in (results, categories))


def _read(path: Path, expected: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a table: numbers as floats, NaN for an empty cell, everything else as text."""
    import pandas as pd

    try:
        # Without pandas' list of words for missing values, which has `none`.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False).fillna("")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a table: {one_line(error)}") from None
    if missing := [name for name in expected if name not in frame.columns]:
        raise UserError(f"{path}: no column {', '.join(missing)} (expected the table of an evaluation)")
    for name in frame.columns:
        if name in POLICY or NUMBER.fullmatch(name):
            numbers = pd.to_numeric(frame[name], errors="coerce")
            wrong = frame[name][numbers.isna() & ~frame[name].str.strip().str.lower().isin(["", "nan"])]
            if len(wrong):
                raise UserError(f"{path}: column {name} holds {wrong.iloc[0]!r}, expected a number")
            frame[name] = numbers.astype(float).replace([math.inf, -math.inf], math.nan)
    return frame.to_dict("records")


def _identity(line: dict[str, Any]) -> tuple[str, str, str]:
    """Speculator, method, and what else tells speculators apart: for `random` its depths, otherwise what it drafts."""
    shape = line.get("draft_shape", "")
    shape = str(line.get("n_predict", "")) if line["speculator"] == RANDOM else "" if shape == "chain" else shape
    return (line["speculator"], line["method"], shape)


def _varying_policy(lines: list[dict[str, Any]]) -> list[str]:
    """The columns of POLICY that vary. Draft lengths and seeds that differ only between speculators do not count: such
    rows belong in one panel."""
    import pandas as pd

    frame = pd.DataFrame(lines, columns=[*POLICY, "base", "prompts"]).assign(identity=list(map(_identity, lines)))
    per_row = frame.groupby(["identity", "base", "prompts"]).nunique().max()
    return [name for name in POLICY if (per_row if name in ("draft_length", "seed") else frame.nunique())[name] > 1]


def _short_labels(paths: Iterable[str]) -> dict[str, str]:
    """Path → the fewest trailing parts that no other path ends in, cut in the middle if they are long."""
    paths = sorted(set(paths))
    stems = {p: Path(p).with_suffix("") if Path(p).suffix.lower() in SUFFIXES else Path(p) for p in paths}
    parts = {p: (stems[p] if len(set(stems.values())) == len(paths) else Path(p)).parts for p in paths}
    endings = {path: [part[i:] for i in reversed(range(len(part)))] for path, part in parts.items()}
    counts = Counter(chain(*endings.values()))
    unique = {path: next((end for end in endings[path] if counts[end] == 1), parts[path]) for path in paths}
    labels = {path: str(Path(*end)) for path, end in unique.items()}
    short = {p: f"{label[:14]}…{label[-25:]}" if len(label) > LABEL_WIDTH else label for p, label in labels.items()}
    return short if len(set(short.values())) == len(paths) else labels


def _styles(lines: list[dict[str, Any]]) -> dict[tuple[str, str, str], PlotStyle]:
    """Style of each speculator: checkpoints in colours, in the order of the table; baselines in black and grey."""
    identities = list(dict.fromkeys(map(_identity, lines)))
    checkpoints = [key for key in identities if key[0] not in (LOOKUP, RANDOM)]
    randoms = [key for key in identities if key[0] == RANDOM]
    # With the method in the label, only checkpoints of one method need telling apart.
    methods = {method for _, method, _ in checkpoints}
    names = {method: _short_labels(name for name, m, _ in checkpoints if m == method) for method in methods}

    styles = {key: PlotStyle("prompt lookup", INK, "X", line=":") for key in identities if key[0] == LOOKUP}
    for i, (name, method, shape) in enumerate(checkpoints):
        label = names[method][name] if method in names[method][name] else f"{method}: {names[method][name]}"
        label += f" ({shape})" if shape else ""
        hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
        styles[name, method, shape] = PlotStyle(label, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], hatch)
    for i, (name, method, shape) in enumerate(randoms):
        label = f"random {method}".strip()
        if [key[1] for key in randoms].count(method) > 1 and shape not in ("", "nan"):
            label = f"{label}, {float(shape):g} depths"
        styles[name, method, shape] = PlotStyle(label, GREYS[i % 3], "d", HATCHES[i // 3 % len(HATCHES)], ":")
    return styles
