"""Plausible rows of `results.csv` and `categories.csv`, without an evaluation."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

DEPTHS = 3
MEASURED = ("tau", "accept_rate", "speedup")
RNN, LSTM = "/runs/8b/sum_rnn/global_step_4000", "/runs/8b/sum_lstm/global_step_4000"
WHO = {RNN: ("sum_rnn", 0.62), LSTM: ("sum_lstm", 0.70), "random": ("sum_rnn", 0.02), "prompt_lookup": ("", 0.3)}
CHAT, MATHS = "/data/spec_bench.jsonl", "/data/gsm8k_test.jsonl"
TASKS = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities", "translation"]
TASKS += ["summarization", "qa", "math_reasoning", "rag"]


def around(name: str, value: float, width: float) -> dict[str, float]:
    return {name: value, f"{name}_lo": max(value - width, 0), f"{name}_hi": value + width}


def line(speculator: str, prompts: str = CHAT, *, quality: bool = True, level: float | None = None, **other) -> dict:
    """A plausible row: acceptance falls with depth, and all else follows from it."""
    method, first = WHO.get(speculator, ("sum_rnn", 0.5))
    noise = random.Random(f"{speculator}{prompts}{other}")
    first = (first if level is None else level) * noise.uniform(0.92, 1.08)
    row = {"base": "/models/base-8b", "speculator": speculator, "method": method, "n_predict": DEPTHS}
    row |= {"prompts": prompts, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "draft_length": DEPTHS, "seed": 1}
    if speculator == "none":
        return row | {"tau": 1, "speedup": 1, "accept_rate": "", "n_predict": "", "draft_length": 0} | other
    depths = [min(first * 0.9**k, 1) for k in range(DEPTHS)]
    reached = [math.prod(depths[:k]) for k in range(DEPTHS + 1)]
    accepted = sum(reached[1:])
    row |= around("tau", 1 + accepted, 0.08) | around("accept_rate", accepted / DEPTHS, 0.02)
    row |= around("speedup", (1 + accepted) / 1.25, 0.06)
    for k, share in enumerate(depths):
        row |= around(f"accept_depth_{k}", share, 0.02 + 0.01 * k)
    lengths = [*reached, 0.0]
    row |= {f"hist_{j}": round(1000 * (lengths[j] - lengths[j + 1])) for j in range(DEPTHS + 1)}
    row |= {"untrained": str(speculator == "random").lower(), "gpu": "made up"}
    if quality and speculator != "prompt_lookup":
        row |= around("kl", 2.2 - 2 * first, 0.03) | around("ce", 3.2 - 2 * first, 0.03)
        for k, share in enumerate(depths):
            row |= around(f"ce_depth_{k}", 3.2 - 2 * share, 0.03) | around(f"kl_depth_{k}", 2.2 - 2 * share, 0.03)
            row |= around(f"top1_depth_{k}", 0.95 * share, 0.01)
    return row | other


def write(path: Path, rows: list[dict]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def by_category(speculators=WHO, prompts: str = CHAT, tasks=TASKS, **other) -> list[dict]:
    return [line(who, prompts, quality=False, category=task, **other) for task in tasks for who in speculators]
