"""Up to which batch size drafts pay, and what `draft_up_to` is worth in a rollout: a simulation from pass times.

    python benchmarks/batch_gate.py [--passes pass_time.csv]

A pass that verifies the drafts of B requests reads B·(K + 1) tokens, one without drafts B. Its time comes from measured
passes (SmolLM2-135M, two CPU threads: `pass_time.py`, interpolated, beyond its last point extrapolated), or from the
roofline of an 8B model on an H100: nothing was measured there. A rollout starts with all requests at once and ends with
the longest; each step takes the time of its batch size, with drafts up to a limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import append_rows, environment

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LIMITS = (0, 8, 16, 32, 64, 128, 256)  # requests; 0 never drafts, 256 always
REQUESTS, CONTEXT = 256, 1000


@dataclass
class Machine:
    """Times of one step.

    Attributes:
        name: of model and hardware.
        source: of the times.
        target: ms of the target's pass over so many tokens of so many requests.
        draft: ms for so many requests of a draft of so many tokens.
    """

    name: str
    source: str
    target: Callable[[int, int], float]
    draft: Callable[[int, int], float]

    def step(self, batch: int, drafts: int, *, verifies: bool = True) -> float:
        """ms of a step in which `drafts` tokens are drafted for each request, and verified or not."""
        return self.target(batch * (1 + drafts * verifies), batch) + (self.draft(batch, drafts) if drafts else 0.0)


def measured(path: Path) -> Machine:
    """SmolLM2-135M in float32 on two CPU threads, with the speculator of the demo (width 576, 8,192 draft tokens)."""
    with path.open() as file:
        rows = [
            (int(row["tokens"]), float(row["ms"]))
            for row in csv.DictReader(file)
            if (row["dtype"], row["threads"], row["context"], row["model"]) == ("float32", "2", "200", "prepared")
        ]
    tokens, ms = np.array(sorted(rows)).T
    slope = (ms[-1] - ms[-3]) / (tokens[-1] - tokens[-3])

    def target(count: int, batch: int) -> float:
        return float(np.interp(count, tokens, ms) + max(0, count - tokens[-1]) * slope)

    # 6.6 M parameters a depth in float32, at the rate at which a pass reads the base model's 135 M.
    share = 6.6 / 135
    return Machine(
        "SmolLM2-135M, 2 CPU threads", path.name, target, lambda batch, drafts: drafts * share * target(batch, batch)
    )


def roofline() -> Machine:
    """Llama-3.1-8B in bf16 on an H100 SXM: 3.35 TB/s and 989 TFLOP/s, of which 80 % and 60 % are reached."""
    bytes_per_ms, flops_per_ms = 0.8 * 3.35e9, 0.6 * 989e9
    weights, cache = 7.5e9, 2 * 32 * 8 * 128 * 2  # parameters of a pass; bytes of one token's keys and values
    depth = 4096 * 4096 + 32_000 * 4096  # parameters of one depth: width 4,096, draft vocabulary 32,000

    def pass_time(parameters: float, count: int) -> float:
        return max(2 * parameters / bytes_per_ms, 2 * parameters * count / flops_per_ms)

    def target(count: int, batch: int) -> float:
        return pass_time(weights, count) + batch * CONTEXT * cache / bytes_per_ms

    return Machine("8B, H100", "roofline", target, lambda batch, drafts: drafts * (pass_time(depth, batch) + 0.02))


def rollout(machine: Machine, lengths: np.ndarray, drafts: int, tau: float, limit: int) -> float:
    """ms until all answers are written, if drafts are made for at most `limit` requests."""
    left, total = lengths.astype(float), 0.0
    while (batch := int((left > 0).sum())) > 0:
        count = drafts if batch <= limit else 0
        total += machine.step(batch, count)
        left -= tau if count else 1.0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=Path, default=Path(__file__).with_name("pass_time.csv"))
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    # Answers of 512 tokens in the median, 2,048 at most.
    lengths = np.random.default_rng(args.seed).lognormal(np.log(512), 0.7, REQUESTS).round().clip(1, 2048)
    rows = []
    for machine in (measured(args.passes), roofline()):
        for tau in (1.8, 2.5, 3.5):
            common = {"machine": machine.name, "pass_times": machine.source, "drafts": args.drafts, "tau": tau}
            for batch in BATCHES:
                alone = machine.step(batch, 0)
                speedup = tau * alone / machine.step(batch, args.drafts)
                unverified = alone / machine.step(batch, args.drafts, verifies=False)
                rows.append(common | {"kind": "step", "batch": batch, "speedup": speedup, "unverified": unverified})
            never = rollout(machine, lengths, args.drafts, tau, 0)
            for limit in LIMITS:
                speedup = never / rollout(machine, lengths, args.drafts, tau, limit)
                rows.append(common | {"kind": "rollout", "batch": limit, "speedup": speedup, "unverified": ""})
    for row in rows:
        for key in ("speedup", "unverified"):
            row[key] = row[key] and round(row[key], 3)
        sys.stdout.write(f"{row}\n")
        row |= {"seed": args.seed} | environment()
    append_rows(args.out, rows)


if __name__ == "__main__":
    main()
