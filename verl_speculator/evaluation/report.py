"""From journals to tables: `results.csv`, `categories.csv`, `skipped.csv`, and the one that a person reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verl_speculator.evaluation.metrics import MEASURES, Figures, acceptance, bootstrap, quality, speed
from verl_speculator.evaluation.plot_data import CATEGORIES, RESULTS
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.errors import UserError

SKIPPED = "skipped.csv"
# The columns that come first; figures per depth, intervals and bookkeeping follow.
LEADING = (
    *("base", "speculator", "method", "n_predict", "prompts", "temperature", "top_p", "top_k", "draft_length"),
    *("draft_shape", "drafts_per_round", "seed"),
    *("tau", "accepted", "accept_rate", "overlap", "tv", "target_calls_per_token"),
    *("kl", "ce", "perplexity", "top1", "top5"),
    *("vanilla_tokens_per_s", "speculative_tokens_per_s", "speedup"),
)
# Columns that fit into a terminal of 80 characters, and the width from which all are shown.
NARROW, WIDE = ("speculator", "prompts", "τ", "accepted", "speedup"), 150
Record = dict[str, Any]


def write_results(out: Path, journals: Path) -> None:
    """Write the three tables from all journals there are, each in one piece."""
    import pandas as pd

    found = [journal for path in sorted(journals.glob("*.jsonl")) if (journal := Journal.read(path)) is not None]
    measured = {_place(journal): _quality_figures(journal) for journal in found if _kind(journal) == "quality"}
    results, categories, skipped = [], [], []
    for journal in sorted((j for j in found if _kind(j) == "behaviour"), key=_order):
        records = [record for record in journal.measured() if "own" in record]
        skipped += _skipped(journal)
        if not records:
            continue
        common = _common(journal, records)
        results.append(common | measured.get(_place(journal), {}) | behaviour_figures(journal, records))
        for category in dict.fromkeys(record["category"] for record in records):
            part = [record for record in records if record["category"] == category]
            categories.append(_common(journal, part) | {"category": category} | behaviour_figures(journal, part))
    for name, rows in ((RESULTS, results), (CATEGORIES, categories), (SKIPPED, skipped)):
        columns = _columns(rows) if name != SKIPPED else ["prompts", "index", "category", "reason"]
        with atomic_file(out / name) as path:
            pd.DataFrame(rows, columns=columns).drop_duplicates().to_csv(path, index=False)


def _kind(journal: Journal) -> str:
    return journal.settings["kind"]


def _place(journal: Journal) -> tuple[str, ...]:
    """What quality is of: a checkpoint and its base in one dtype."""
    return tuple(journal.settings[name] for name in ("base", "speculator", "dtype"))


def _order(journal: Journal) -> tuple[Any, ...]:
    """Prompt files together, then policies; within them the baselines first."""
    row = journal.settings
    names = ("none", "generate", "prompt_lookup", "random")
    rank = names.index(row["speculator"]) if row["speculator"] in names else len(names)
    return (
        row["file"],
        row["temperature"],
        row["top_p"],
        row["top_k"],
        rank,
        row["speculator"],
        row.get("draft_shape", ""),
        row["draft_length"] if rank else 0,
    )


def _skipped(journal: Journal) -> list[Record]:
    return [
        {"prompts": journal.settings["file"], "index": r["index"], "category": r["category"], "reason": r["skipped"]}
        for r in journal.measured()
        if "skipped" in r
    ]


def _common(journal: Journal, records: Sequence[Record]) -> Record:
    """What a row says besides its figures."""
    settings = {name: value for name, value in journal.settings.items() if name not in ("kind", "file")}
    versions = journal.identity["versions"]
    return {
        "draft_shape": "chain" if settings.get("draft_length") else "",
        **settings,
        "prompts": journal.settings["file"],
        "prompts_used": len(records),
        "prompts_skipped": len(_skipped(journal)),
        "hardware": journal.identity["hardware"],
        **{f"version_{name}": version for name, version in versions.items()},
        **journal.origin,
    }


def behaviour_figures(journal: Journal, records: Sequence[Record]) -> Record:
    """Acceptance, speed and memory of some prompts, with their intervals."""
    names = ("histogram", "overlap", "drafted", "judged", "nodes")
    histogram, overlap, drafted, judged, nodes = (
        np.array([_counts(r)[n] for r in records], dtype=float) for n in names
    )
    alone, own = (_rates(records, name, ("prefill", "decode")) for name in ("alone", "own"))

    def figures(weights: np.ndarray) -> Figures:
        counts = (weights @ table for table in (histogram, overlap, drafted, judged))
        return acceptance(*counts) | speed(alone, own, weights)

    found: Record = {name: float(value) for name, value in figures(np.ones(len(records))).items()}
    found |= bootstrap(len(records), figures, seed=journal.settings["seed"])
    pooled = histogram.sum(0)
    found |= {f"hist_{j}": int(count) for j, count in enumerate(pooled)}
    times = {name: _all(records, "own", name) for name in ("tokens", "prefill", "decode", "draft", "target")}
    decode = times["decode"].sum()
    decode_alone, decode_own = (_rates(records, name, ("decode",), first=False) for name in ("alone", "own"))
    return found | {
        "rounds": int(pooled.sum()),
        "drafts_per_round": float(nodes.sum() / pooled.sum()) if pooled.sum() else np.nan,
        "tokens": int(times["tokens"].sum()),
        "identical": int(sum(r["identical"] for r in records)),
        "runs": sum(len(r["own"]) for r in records),
        "prefill_s": float(np.median(times["prefill"])),
        "decode_s": float(np.median(times["decode"])),
        "decode_speedup": float(np.nanmedian(decode_own / decode_alone)) if np.isfinite(decode_own).any() else np.nan,
        "draft_share": float(times["draft"].sum() / decode) if decode else np.nan,
        # Everything outside the base's and the speculator's forward passes.
        "loop_share": float(1 - (times["draft"].sum() + times["target"].sum()) / decode) if decode else np.nan,
        "peak_memory_mb": max(r["peak_mb"] for r in records),
    }


def _counts(record: Record) -> Record:
    """A record's counts; older journals have rounds of one length, and counted no more than what was accepted."""
    histogram = record["histogram"]
    most, rounds = len(histogram) - 1, sum(histogram)
    judged = [sum(histogram[k:]) for k in range(most)]
    return {"drafted": [0] * most + [rounds], "judged": judged, "nodes": [rounds * most]} | record


def _all(records: Sequence[Record], who: str, name: str) -> np.ndarray:
    return np.array([run[name] for record in records for run in record[who]], dtype=float)


def _rates(records: Sequence[Record], who: str, parts: Iterable[str], *, first: bool = True) -> np.ndarray:
    """[P, R] tokens per second over these parts of the time; `first` counts the prefill's own token of every turn."""

    def rate(record: Record, run: dict[str, float]) -> float:
        tokens = run["tokens"] - (0 if first else record["turns"])
        return tokens / sum(run[part] for part in parts) if tokens > 0 else float("nan")

    return np.array([[rate(record, run) for run in record[who]] for record in records])


def _quality_figures(journal: Journal) -> Record:
    """CE, KL, perplexity, top-1 and top-5 on the held-out text."""
    records = journal.measured()
    if not records:
        return {}
    pairs = np.array([r["pairs"] for r in records], dtype=float)
    sums = {name: np.array([r[name] for r in records], dtype=float) for name in MEASURES}

    def figures(weights: np.ndarray) -> Figures:
        return quality(weights @ pairs, {name: weights @ values for name, values in sums.items()})

    return {
        "text": journal.settings["file"],
        "text_rows": len(records),
        "text_pairs": int(pairs.sum()),
        "training_temperature": journal.settings["training_temperature"],
        **{name: float(value) for name, value in figures(np.ones(len(records))).items()},
        **bootstrap(len(records), figures, seed=0),
    }


def _columns(rows: Sequence[Record]) -> list[str]:
    """All columns of all rows: the leading ones, then each figure beside its depths and its interval."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    depths = sorted((n for n in names if n.startswith("accept_depth_") and not n.endswith(("_lo", "_hi"))), key=_depth)
    at = LEADING.index("overlap")
    leading = [*LEADING[:at], *depths, *LEADING[at:]]
    leading += [name for name in ("category",) if name in names]
    leading += sorted((name for name in names if name.startswith("hist_")), key=_depth)
    return [*leading, *(name for name in names if name not in leading)]


def _depth(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def print_results(out: Path, console: Any) -> None:
    """The table that a person reads, and what was skipped. A narrow terminal gets the columns that matter most."""
    import pandas as pd
    from rich.table import Table

    results, skipped = pd.read_csv(out / RESULTS), pd.read_csv(out / SKIPPED)
    keys = ["prompts", "base", "temperature", "top_p", "top_k", "max_new_tokens"]
    for (prompts, base, temperature, *_, limit), rows in results.groupby(keys, sort=False):
        told = f"temperature {temperature:g}, at most {limit} tokens"
        cells = [_cells(row) for row in rows.to_dict("records")]
        wide = console.width >= WIDE
        names = [name for name in cells[0] if (wide or name in NARROW) and any(row[name] != "–" for row in cells)]
        table = Table(title=f"{prompts}, base {base}, {told}")
        for name in names:
            left = name in ("speculator", "method")
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in cells:
            table.add_row(*(row[name] for name in names))
        console.print(table)
    for prompts, rows in skipped.groupby("prompts", sort=False):
        names = ", ".join(str(i) for i in rows["index"])
        console.print(
            f"{prompts}: {len(rows)} prompts left out, wholly or from one turn on ({SKIPPED} says why): {names}"
        )


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table shows of a row, by column; a dash for what is not known."""

    def number(name: str, form: str = "{:.2f}") -> str:
        value = row.get(name)
        return "–" if value is None or np.isnan(value) else form.format(value)

    def interval(name: str) -> str:
        low, high = row.get(f"{name}_lo"), row.get(f"{name}_hi")
        around = "" if low is None or np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return number(name) + around

    notes = ["untrained"] * (row.get("untrained") is True)
    # A chain needs no word, and what drafts nothing has none.
    notes += [row["draft_shape"]] * (row["draft_shape"] not in ("chain", "", np.nan))
    count = int(row["draft_length"]) if row["draft_length"] > 0 else 0
    depths = [number(f"accept_depth_{k}", "{:.0%}") for k in range(count)]
    return {
        "speculator": f"{row['speculator']} ({', '.join(notes)})" if notes else str(row["speculator"]),
        "method": str(row["method"]),
        "γ": number("draft_length", "{:.0f}"),
        "prompts": str(int(row["prompts_used"])),
        "τ": interval("tau"),
        "accepted": number("accept_rate", "{:.1%}"),
        "by depth": " ".join(depths) or "–",
        "speedup": interval("speedup"),
        "tokens/s": number("speculative_tokens_per_s", "{:.0f}"),
        "draft": number("draft_share", "{:.0%}"),
        # Sampled texts differ from run to run.
        "same text": f"{int(row['identical'])} of {int(row['runs'])}" if row["temperature"] == 0 else "–",
        "CE": number("ce"),
        "KL": number("kl"),
        "top-1": number("top1", "{:.1%}"),
    }


@dataclass
class Journal:
    """The measurements of one row of the results.

    Attributes:
        path: the file.
        settings: what makes the row this one; they name the file.
        identity: what else must be the same for old measurements to count, such as a fingerprint of the weights.
        records: the measurements by the index of their prompt or document.
        origin: date and commit of the code that began it; recorded, never compared.
        scope: the indices that are asked for. Records of others are kept for a run that asks for them again.
    """

    path: Path
    settings: dict[str, Any]
    identity: dict[str, Any]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    scope: list[int] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: dict[str, Any],
        identity: dict[str, Any],
        origin: dict[str, Any],
        scope: list[int],
    ) -> Journal:
        """A journal to go on with: what it already knows, or nothing if that was measured on something else."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        journal = cls(directory / f"{name}.jsonl", settings, identity, origin=origin, scope=scope)
        found = cls.read(journal.path)
        if found is not None and found.identity == identity:
            journal.records, journal.origin = found.records, found.origin
        # Anew, since a killed run may have left half a last line.
        head = {"settings": settings, "identity": identity, "origin": journal.origin, "scope": scope}
        lines = [head, *journal.records.values()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(journal.path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"out={directory.parent}: cannot be written to: {error.strerror or error}") from None
        return journal

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """A journal as it lies on the disk, without half a last line; None if there is none."""
        found: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not found:
            return None
        head, records = found[0], {record["index"]: record for record in found[1:]}
        return cls(path, head["settings"], head["identity"], records, head["origin"], head["scope"])

    def measured(self) -> list[dict[str, Any]]:
        """The records that are asked for."""
        return [self.records[i] for i in self.scope if i in self.records]

    def missing(self) -> list[int]:
        """The indices that are asked for and have no record yet."""
        return [i for i in self.scope if i not in self.records]

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Keep the measurement of a prompt or document."""
        self.records[index] = {"index": index} | dict(record)
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[index]) + "\n")
