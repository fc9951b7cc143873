"""From the points' records to `results.csv`, and the tables that a person reads. A plot needs no more than the CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_speculator.files import atomic_file
from verl_speculator.sweep.jobs import DONE, WAITING, Job
from verl_speculator.sweep.points import columns_of
from verl_speculator.sweep.values import shown

RESULTS = "results.csv"
# The axes stand between the first of these and the others.
FIRST = "point"
FOLLOWING = ("status", "reason", "training_seconds", "steps", "final_loss", "checkpoint", "parameters", "log")
# How much worse than the best is as good.
NEAR = 0.02
Row = dict[str, Any]


def write_results(out: Path, jobs: Sequence[Job]) -> list[Row]:
    """Write and return a row for each point, the ones that still wait too."""
    axes = columns_of([job.values for job in jobs])
    rows = [_row(job, axes) for job in jobs]
    columns = list(dict.fromkeys([FIRST, *axes, *FOLLOWING, *(name for row in rows for name in row)]))
    with atomic_file(out / RESULTS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _row(job: Job, axes: Sequence[str]) -> Row:
    training, figures = job.training(), job.evaluation().get("figures", {})
    row = {FIRST: job.label} | {name: shown(job.values[name]) for name in axes if name in job.values}
    row |= {name: training.get(name) for name in FOLLOWING} | {"status": job.status, "reason": job.reason}
    row["log"] = job.evaluation().get("log") or training.get("log")
    # For the plots of the evaluation a point is a speculator.
    base, prompts = job.measurements[0].arguments[1], next(iter(job.measurements[0].behaviour))
    return {**row, "base": base, "prompts": prompts} | figures | {"speculator": job.label}


def number(row: Row, name: str) -> float:
    """A figure of a row, NaN where it has none."""
    try:
        return float(row.get(name) if row.get(name) is not None else math.nan)
    except ValueError:
        return math.nan


def answers(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Which point to take: for τ and for the speedup the best, and the smallest one that is hardly worse."""
    found = []
    for name, called in (("tau", "τ"), ("speedup", "speedup")):
        known = [row for row in rows if row["status"] == DONE and math.isfinite(number(row, name))]
        if not known:
            continue
        best = max(known, key=lambda row: number(row, name))
        near = [row for row in known if number(row, name) >= (1 - NEAR) * number(best, name)]
        found.append((f"best {called}", best))
        smallest = min(near, key=lambda row: (number(row, "parameters"), -number(row, name)))
        found.append((f"smallest within {NEAR:.0%} of it", smallest))
    return found


def print_points(jobs: Sequence[Job], console: Any) -> None:
    """What a sweep would do."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(jobs)} points, {sum(job.status != DONE for job in jobs)} to be trained or measured")
    for name in ("#", "point", "status", "directory"):
        table.add_column(name, overflow="fold")
    for i, job in enumerate(jobs, 1):
        table.add_row(str(i), escape(job.label), job.status, escape(str(job.directory)))
    console.print(table)


def print_results(rows: Sequence[Row], console: Any) -> None:
    """All points, best τ first, then which one to take, then what failed."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, first: Sequence[str], lines: Sequence[tuple[Sequence[str], Row]]) -> None:
        made = Table(title=title)
        figures = [name for name in _FIGURES if any(_FIGURES[name](row) != "–" for _, row in lines)]
        for name in first:
            made.add_column(name, overflow="fold")
        for name in figures:
            made.add_column(name, justify="right", no_wrap=True)
        for cells, row in lines:
            made.add_row(*map(escape, cells), *(_FIGURES[name](row) for name in figures))
        console.print(made)

    done = sorted((row for row in rows if row["status"] == DONE), key=lambda row: -_or_least(number(row, "tau")))
    if done:
        table("Points", ("point",), [((row[FIRST],), row) for row in done])
        table("Which one to train", ("", "point"), [((what, row[FIRST]), row) for what, row in answers(done)])
    for row in rows:
        if row["status"] not in (DONE, WAITING):
            told = f"{row['status']}: {row[FIRST]}: {row['reason']} ({row['log']})"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _cell(name: str, form: str, interval: bool = False) -> Any:
    def text(row: Row) -> str:
        value, low, high = (number(row, name + end) for end in ("", "_lo", "_hi"))
        if not math.isfinite(value):
            return "–"
        around = f" [{form.format(low)}, {form.format(high)}]" if interval and math.isfinite(low) else ""
        return form.format(value) + around

    return text


def _same_text(row: Row) -> str:
    """How many greedy texts are the base's own; sampled ones differ from run to run."""
    if number(row, "temperature") != 0 or not number(row, "runs") > 0:
        return "–"
    return f"{number(row, 'identical'):.0f} of {number(row, 'runs'):.0f}"


_FIGURES = {
    "τ": _cell("tau", "{:.2f}", interval=True),
    "accepted": _cell("accept_rate", "{:.1%}"),
    "speedup": _cell("speedup", "{:.2f}", interval=True),
    "same text": _same_text,
    "KL": _cell("kl", "{:.3f}"),
    "CE": _cell("ce", "{:.2f}"),
    "top-1": _cell("top1", "{:.1%}"),
    "parameters": _cell("parameters", "{:,.0f}"),
    "training": _cell("training_seconds", "{:,.1f} s"),
}
