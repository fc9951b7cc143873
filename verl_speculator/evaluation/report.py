"""The log of measurements, the tables that are computed from it, and the table on the console."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verl_speculator.evaluation.metrics import QUALITY_METRICS, Figures, acceptance, bootstrap, quality, speed, verdict
from verl_speculator.evaluation.plot_data import CATEGORIES, RESULTS
from verl_speculator.utils.atomic_io import atomic_file
from verl_speculator.utils.settings import UserError

SKIPPED = "skipped.csv"
BASELINE_ORDER = ("none", "generate", "prompt_lookup", "random")
# The first columns of the tables; the other figures of each depth, intervals and bookkeeping follow.
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


@dataclass
class ResultsLog:
    """The measurements of one row of the results on one file, as JSON lines: a head, then a record a line.

    Attributes:
        path: of the log.
        settings: columns of the row; the log is named by their hash.
        identity: fingerprints and versions; a log with another identity starts from nothing.
        origin: date and commit of the first run; recorded, never compared.
        scope: the indices that are asked for. Records of other indices are kept for a run that asks for them again.
        records: measurements by the index of their prompt or text.
    """

    path: Path
    settings: dict[str, Any]
    identity: dict[str, Any]
    origin: dict[str, Any]
    scope: list[int]
    records: dict[int, Record] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, settings: Record, identity: Record, origin: Record, scope: list[int]) -> ResultsLog:
        """The log of these settings in a directory, with its records if its identity is the same."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        log = cls(directory / f"{name}.jsonl", settings, identity, origin, scope)
        earlier = cls.read(log.path)
        if earlier is not None and earlier.identity == identity:
            log.records, log.origin = earlier.records, earlier.origin
        # Rewritten, since a killed run may have left half a line at the end.
        head = {name: getattr(log, name) for name in ("settings", "identity", "origin", "scope")}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(log.path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in (head, *log.records.values())))
        except OSError as error:
            raise UserError(f"out={directory.parent}: cannot be written to: {error.strerror or error}") from None
        return log

    @classmethod
    def read(cls, path: Path) -> ResultsLog | None:
        """A log from its file, without half a line at its end; None if there is none."""
        lines: list[Record] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return cls(path, **lines[0], records={record["index"]: record for record in lines[1:]}) if lines else None

    def measured(self) -> list[Record]:
        """The records that are asked for."""
        return [self.records[i] for i in self.scope if i in self.records]

    def missing(self) -> list[int]:
        """The indices that are asked for and have no record yet."""
        return [i for i in self.scope if i not in self.records]

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Append the measurement of a prompt or text."""
        self.records[index] = {"index": index} | dict(record)
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[index]) + "\n")


def write_results(out: Path, logs_directory: Path) -> None:
    """Write the three tables from all logs of a directory, each row once."""
    import pandas as pd

    logs = [log for path in sorted(logs_directory.glob("*.jsonl")) if (log := ResultsLog.read(path)) is not None]
    on_texts = {_checkpoint(log): _quality_figures(log) for log in logs if log.settings["kind"] == "quality"}
    results, categories, skipped = [], [], []
    for log in sorted((log for log in logs if log.settings["kind"] == "behaviour"), key=_order):
        named = ({"prompts": log.settings["file"], "reason": r.get("skipped"), **r} for r in log.measured())
        skipped += [record for record in named if record["reason"]]
        if records := [record for record in log.measured() if "own" in record]:
            results.append(_row(log, records, on_texts.get(_checkpoint(log), {})))
        for category in dict.fromkeys(record["category"] for record in records):
            part = [record for record in records if record["category"] == category]
            categories.append(_row(log, part, {"category": category}))
    tables = {RESULTS: (results, _columns(results)), CATEGORIES: (categories, _columns(categories))}
    tables[SKIPPED] = skipped, ["prompts", "index", "category", "reason"]
    for name, (rows, columns) in tables.items():
        with atomic_file(out / name) as path:
            # As objects, whole numbers stay whole in a column with empty cells.
            pd.DataFrame(rows, columns=columns, dtype=object).drop_duplicates().to_csv(path, index=False)


def _checkpoint(log: ResultsLog) -> tuple[str, ...]:
    """What quality depends on: a checkpoint and its base model in one dtype."""
    return tuple(log.settings[name] for name in ("base", "speculator", "dtype"))


def _order(log: ResultsLog) -> tuple[Any, ...]:
    """Sorts by prompt file, then policy, then method, the baselines first."""
    row, order = log.settings, (*BASELINE_ORDER, log.settings["speculator"])
    rank = order.index(row["speculator"])
    policy = (row["file"], row["temperature"], row["top_p"], row["top_k"])
    return (*policy, rank, row["speculator"], row.get("draft_shape", ""), row["draft_length"] if rank else 0)


def _row(log: ResultsLog, records: Sequence[Record], more: Record) -> Record:
    """A row of a table: the settings, `more`, and the figures of some records of the log."""
    settings = {name: value for name, value in log.settings.items() if name not in ("kind", "file")}
    return {
        "draft_shape": "chain" if settings.get("draft_length") else "",
        **settings,
        "prompts": log.settings["file"],
        "prompts_used": len(records),
        "prompts_skipped": sum("skipped" in record for record in log.measured()),
        "hardware": log.identity["hardware"],
        **{f"version_{name}": version for name, version in log.identity["versions"].items()},
        **log.origin,
        **more,
        **_behaviour_figures(records, settings["seed"]),
    }


def _with_intervals(count: int, figures: Callable[[np.ndarray], Figures], seed: int) -> Record:
    """The figures of all prompts or texts, and their bootstrap intervals."""
    return {n: float(value) for n, value in figures(np.ones(count)).items()} | bootstrap(count, figures, seed=seed)


def _behaviour_figures(records: Sequence[Record], seed: int) -> Record:
    """Acceptance, speed and memory on some prompts."""
    names = ("histogram", "overlap", "drafted", "judged")
    tables = [np.array([record[name] for record in records], dtype=float) for name in names]
    vanilla, speculative = (_rates(records, name) for name in ("alone", "own"))

    def figures(weights: np.ndarray) -> Figures:
        return acceptance(*(weights @ table for table in tables)) | speed(vanilla, speculative, weights)

    histogram = tables[0].sum(0).astype(int)
    rounds, runs = int(histogram.sum()), [run for record in records for run in record["own"]]
    gaps = np.array([record.get("difference_gap", np.nan) for record in records], dtype=float)
    tokens, decode, draft, target = (sum(run[name] for run in runs) for name in ("tokens", "decode", "draft", "target"))
    speedups = _rates(records, "own", decode_only=True) / _rates(records, "alone", decode_only=True)
    return {
        **_with_intervals(len(records), figures, seed),
        **{f"hist_{j}": int(count) for j, count in enumerate(histogram)},
        "rounds": rounds,
        "drafts_per_round": sum(record["nodes"][0] for record in records) / rounds if rounds else np.nan,
        "tokens": tokens,
        "identical": sum(record["identical"] for record in records),
        "runs": len(runs),
        "difference_gap": float(np.nanmax(gaps)) if np.isfinite(gaps).any() else np.nan,
        "prefill_s": float(np.median([run["prefill"] for run in runs])),
        "decode_s": float(np.median([run["decode"] for run in runs])),
        "decode_speedup": float(np.nanmedian(speedups)) if np.isfinite(speedups).any() else np.nan,
        "draft_share": draft / decode if decode else np.nan,
        # The time outside of the forward passes of both models.
        "loop_share": 1 - (draft + target) / decode if decode else np.nan,
        "peak_memory_mb": max(record["peak_mb"] for record in records),
    }


def _rates(records: Sequence[Record], runs: str, *, decode_only: bool = False) -> np.ndarray:
    """[P, N] tokens per second of the `runs` "alone" or "own"; `decode_only` is without the prefill and the one token
    that it gives in every turn."""
    names = ("tokens", "decode", "prefill")
    tokens, decode, prefill = (np.array([[run[n] for run in record[runs]] for record in records]) for n in names)
    if decode_only:
        tokens, prefill = tokens - np.array([[record["turns"]] for record in records]), 0
    return np.divide(tokens, decode + prefill, out=np.full(tokens.shape, np.nan), where=tokens > 0)


def _quality_figures(log: ResultsLog) -> Record:
    """Cross-entropy, KL, perplexity and accuracy on the held-out text."""
    records = log.measured()
    if not records:
        return {}
    sums = {name: np.array([r[name] for r in records], dtype=float) for name in ("pairs", *QUALITY_METRICS)}
    pairs = sums.pop("pairs")

    def figures(weights: np.ndarray) -> Figures:
        return quality(weights @ pairs, {name: weights @ values for name, values in sums.items()})

    return {
        "text": log.settings["file"],
        "text_rows": len(records),
        "text_pairs": int(pairs.sum()),
        "training_temperature": log.settings["training_temperature"],
        **_with_intervals(len(records), figures, seed=0),
    }


def _columns(rows: Sequence[Record]) -> list[str]:
    """The columns of all rows: the leading ones with the acceptance of each depth, the histogram, then the others."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def numbered(prefix: str) -> list[str]:
        indices = sorted(int(n.removeprefix(prefix)) for n in names if n.removeprefix(prefix).isdigit())
        return [f"{prefix}{index}" for index in indices]

    at = LEADING.index("overlap")
    category = ["category"] if "category" in names else []
    leading = (*LEADING[:at], *numbered("accept_depth_"), *LEADING[at:], *category, *numbered("hist_"))
    return list(dict.fromkeys((*leading, *names)))


def print_results(out: Path, console: Any) -> None:
    """Print a table for each prompt file and policy, and the prompts left out; a narrow terminal gets few columns."""
    import pandas as pd
    from rich.table import Table

    results, skipped = pd.read_csv(out / RESULTS), pd.read_csv(out / SKIPPED)
    keys = ["prompts", "base", "temperature", "top_p", "top_k", "max_new_tokens"]
    for (prompts, base, temperature, *_, limit), rows in results.groupby(keys, sort=False):
        cells = pd.DataFrame([_cells(row) for row in rows.to_dict("records")])
        table = Table(title=f"{prompts}, base {base}, temperature {temperature:g}, at most {limit} tokens")
        cells = cells.loc[:, (cells != "–").any()].filter(list(cells) if console.width >= WIDE else NARROW)
        for name in cells:
            is_text = name in ("speculator", "method")
            table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        for row in cells.to_numpy():
            table.add_row(*row)
        console.print(table)
        for row in rows.to_dict("records"):
            if row["speculator"] not in BASELINE_ORDER and row["speedup"] > 0:
                share = row.get("data_share")
                text = verdict(row["tau"], row["speedup"], None if share is None or np.isnan(share) else share)
                shape = "" if row["draft_shape"] == "chain" else f" ({row['draft_shape']})"
                console.print(f"{row['speculator']}{shape}: {text}", markup=False, highlight=False, soft_wrap=True)
            if row["temperature"] == 0 and row["identical"] < row["runs"]:
                console.print(_difference_text(row), markup=False, highlight=False, soft_wrap=True)
    for prompts, rows in skipped.groupby("prompts", sort=False):
        text = f"{prompts}: {len(rows)} prompts left out, wholly or from one turn on ({SKIPPED} says why): "
        console.print(text + ", ".join(map(str, rows["index"])))


def _difference_text(row: dict[str, Any]) -> str:
    """Greedy texts that are not the base model's, and how far from a tie."""
    different = int(row["runs"] - row["identical"])
    return (
        f"{row['speculator']}: {different} of {int(row['runs'])} greedy texts are not the base model's; where they "
        f"part, the logits of the two tokens are at most {row['difference_gap']:.3g} apart ({row['dtype']})"
    )


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row by column; a dash where there is no value."""

    def number(name: str, form: str = "{:.2f}") -> str:
        value = row.get(name, np.nan)
        return "–" if np.isnan(value) else form.format(value)

    def interval(name: str) -> str:
        low, high = number(f"{name}_lo"), number(f"{name}_hi")
        return number(name) + ("" if low == "–" else f" [{low}, {high}]")

    notes = ["untrained"] * (row.get("untrained") is True)
    # A chain is not named; a row without drafts has no shape.
    notes += [row["draft_shape"]] * (row["draft_shape"] not in ("chain", "", np.nan))
    depths = range(int(row["draft_length"]) if row["draft_length"] > 0 else 0)
    return {
        "speculator": f"{row['speculator']} ({', '.join(notes)})" if notes else str(row["speculator"]),
        "method": str(row["method"]),
        "γ": number("draft_length", "{:.0f}"),
        "prompts": str(int(row["prompts_used"])),
        "τ": interval("tau"),
        "accepted": number("accept_rate", "{:.1%}"),
        "by depth": " ".join(number(f"accept_depth_{k}", "{:.0%}") for k in depths) or "–",
        "speedup": interval("speedup"),
        "tokens/s": number("speculative_tokens_per_s", "{:.0f}"),
        "draft": number("draft_share", "{:.0%}"),
        # Sampled texts differ from run to run.
        "same text": f"{int(row['identical'])} of {int(row['runs'])}" if row["temperature"] == 0 else "–",
        "CE": number("ce"),
        "KL": number("kl"),
        "top-1": number("top1", "{:.1%}"),
    }
