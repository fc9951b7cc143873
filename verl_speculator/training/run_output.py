"""What a run leaves in its folder besides checkpoints: `metrics.jsonl`, tensorboard's files, a plot, and the summary at
the end."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from verl_speculator.utils.atomic_io import atomic_file

METRICS_FILE, PLOT_FILE, TENSORBOARD = "metrics.jsonl", "training.png", "tensorboard"
# Steps at each end of a run over which the loss of the summary is averaged.
AVERAGED_STEPS = 10


class RunOutput:
    """Writes the metrics of a run into its folder. Rank 0 makes one.

    Args:
        directory: of the run.
        step: the step that the run starts from; records of later steps, which it will make again, are dropped.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.directory, self.path = directory, directory / METRICS_FILE
        self.records = [record for record in read_metrics(directory) if record["step"] <= step]
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self._writer = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, with the time in seconds since 1970."""
        self.records.append({"step": step, "time": round(time.time(), 1), **metrics})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Draw the plot, and flush what is buffered."""
        if self._writer is not None:
            self._writer.close()
        plot_metrics(self.directory, self.records)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The records of a run's metrics file, without a last line that was torn; none without a file."""
    path, records = directory / METRICS_FILE, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_metrics(directory: Path, records: Sequence[Mapping[str, float]]) -> None:
    """Draw loss, accuracy by depth and expected acceptance length against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for record in records for name in record if name.endswith("_accuracy")})
    panels = {
        "speculator loss": ["train/speculator_loss", "val/speculator_loss"],
        "accuracy by depth": [name for name in names if name.startswith("train/")],
        "expected acceptance length": ["train/expected_accept_length", "val/expected_accept_length"],
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in series:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                label = name.removeprefix("train/").removesuffix("_accuracy") if title.startswith("acc") else name[:5]
                axis.plot(*zip(*points, strict=True), ".-" if name.startswith("val/") else "-", label=label.strip("/"))
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False, fontsize="small")
    with atomic_file(directory / PLOT_FILE) as path:
        FigureCanvasAgg(figure).print_png(path)


def console_line(step: int, last: int, metrics: Mapping[str, float]) -> str:
    """The metrics of a step in a line of at most four digits each."""
    parts = [f"step {step}/{last}"]
    for split, name in (("train", ""), ("val", "validation ")):
        if f"{split}/loss" not in metrics:
            continue
        accuracy = [metrics[key] for k in range(len(metrics)) if (key := f"{split}/depth{k}_accuracy") in metrics]
        parts.append(f"{name}loss {metrics[f'{split}/loss']:.4g}")
        parts.append(f"accuracy {' '.join(f'{value:.0%}' for value in accuracy)}")
        parts.append(f"expected τ {metrics[f'{split}/expected_accept_length']:.3g}")
    parts.append(f"lr {metrics['train/lr']:.3g}")
    parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def summarise_run(
    records: Sequence[Mapping[str, float]], checkpoint: Path, *, rows_seen: int, rows: int, base: str, prompts: str
) -> dict[str, str]:
    """The lines of the summary, by their titles.

    Args:
        records: of the run.
        checkpoint: the last one.
        rows_seen: rows that training has read, counted again in each epoch.
        rows: of the training data.
        base: the base model as the run named it.
        prompts: a file of conversations, for the commands.
    """
    name = "train/speculator_loss"
    losses = [record[name] for record in records if name in record]
    count = min(AVERAGED_STEPS, max(1, len(losses) // 2))
    first, last = (sum(part) / count for part in (losses[:count], losses[-count:]))
    end = {key: value for record in records for key, value in record.items()}  # the newest value of each
    split = "val" if "val/speculator_loss" in end else "train"
    depths = [end[key] for k in range(len(end)) if (key := f"{split}/depth{k}_accuracy") in end]
    kind = "validation" if split == "val" else "training"
    lines = {
        "checkpoint": str(checkpoint),
        "speculator loss": f"{first:.4g} → {last:.4g}",
        "accuracy": f"{' '.join(f'{value:.0%}' for value in depths)} by depth ({kind})",
        "acceptance": f"{end[f'{split}/expected_accept_length']:.4g} tokens per pass expected, greedy ({kind})",
        "data": f"{rows_seen:,} rows read, {_share(rows_seen / rows)} of the data ({rows:,} rows)",
    }
    if f"{split}/coverage" in end:
        lines["coverage"] = f"{end[f'{split}/coverage']:.1%} of the targets can be drafted ({kind})"
    base, spec, file, out = map(shlex.quote, (base, str(checkpoint), prompts, str(checkpoint.parent / "evaluation")))
    lines["evaluate"] = f"verl-speculator evaluate --base {base} --speculator {spec} --prompts {file} --out {out}"
    lines["try"] = f"verl-speculator generate --base {base} --speculator {spec} --prompt 'Write a haiku.' --compare"
    lines["serve"] = f"verl-speculator serve --base {base} --speculator {spec}"
    return lines


def _share(share: float) -> str:
    return f"{share:.2g} times all" if share >= 1.05 else f"{min(share, 1):.0%}"


def print_summary(lines: Mapping[str, str]) -> None:
    """Print the summary as a box, whose commands stay whole lines that can be pasted."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    commands = ("evaluate", "try", "serve")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, text in lines.items():
        if title not in commands:
            table.add_row(title, text)
    console = Console(stderr=True, highlight=False)
    console.print(Panel(table, title="speculator trained", expand=False))
    for title in commands:
        console.print(lines[title], markup=False, soft_wrap=True)
