"""What the demo's speculators reached, from the logs of verl's file logger."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="one .jsonl per speculator")
    args = parser.parse_args()
    runs = {log.stem: [json.loads(line)["data"] for line in log.read_text().splitlines()] for log in args.logs}
    first = next(iter(runs.values()))
    depths = sum(f"val/depth{k}_accuracy" in first[-1] for k in range(32))
    table = Table(title="Held-out conversations, after training")
    columns = ["speculator", "steps", "loss, first step", "loss, validation"]
    for name in [*columns, *(f"depth {k} top-1" for k in range(depths)), "expected tokens per pass"]:
        table.add_column(name, justify="left" if name == "speculator" else "right")
    for name, steps in runs.items():
        last = steps[-1]
        table.add_row(
            name,
            str(len(steps)),
            f"{steps[0]['train/speculator_loss']:.2f}",
            f"{last['val/speculator_loss']:.2f}",
            *(f"{last[f'val/depth{k}_accuracy']:.1%}" for k in range(depths)),
            f"{last['val/expected_accept_length']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
