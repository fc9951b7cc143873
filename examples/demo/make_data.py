"""Conversations for the demo: small sums, shopping lists and conversions, solved step by step; some go on for a turn.

Every row has its own numbers and names, so the base has something to learn and a draft has something to guess.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Lea",
    "Max",
    "Nia",
    "Otto",
    "Pia",
]
THINGS = ["apples", "pears", "books", "pens", "coins", "stamps", "shells", "cards", "eggs", "plums", "beads", "kites"]
FRUITS = ["apples", "bread", "carrots", "dates", "eggs", "figs", "grapes", "honey", "jam", "kale", "lemons", "milk"]
UNITS = [("hours", "minutes", 60), ("minutes", "seconds", 60), ("metres", "centimetres", 100), ("days", "hours", 24)]


def addition(rng: random.Random) -> list[str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(2, 60), rng.randint(2, 40), rng.randint(2, 9)
    return [
        f"{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now?",
        f"{name} starts with {a} {thing}.\n{name} finds {b} more, so {a} + {b} = {a + b}.\n"
        f"{name} has {a + b} {thing} now.\nAnswer: {a + b}",
        f"And if {name} then gives away {c}?",
        f"{name} has {a + b} {thing}.\n{name} gives away {c}, so {a + b} - {c} = {a + b - c}.\n"
        f"{name} has {a + b - c} {thing} left.\nAnswer: {a + b - c}",
    ]


def multiplication(rng: random.Random) -> list[str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each = rng.randint(2, 9), rng.randint(2, 12)
    steps = "\n".join(f"After box {i} there are {i * each} {thing}." for i in range(1, boxes + 1))
    return [
        f"{name} fills {boxes} boxes with {each} {thing} each. How many {thing} is that?",
        f"Each box holds {each} {thing}.\n{steps}\nSo {boxes} * {each} = {boxes * each}.\nAnswer: {boxes * each}",
    ]


def conversion(rng: random.Random) -> list[str]:
    large, small, factor = rng.choice(UNITS)
    count = rng.randint(2, 20)
    return [
        f"How many {small} are {count} {large}?",
        f"There are {factor} {small} in every one of the {large}.\nSo {count} {large} are {count} * {factor} = "
        f"{count * factor} {small}.\nAnswer: {count * factor}",
    ]


def sorting(rng: random.Random) -> list[str]:
    items = rng.sample(FRUITS, rng.randint(3, 6))
    ordered = sorted(items)
    lines = "\n".join(f"{i}. {item}" for i, item in enumerate(ordered, 1))
    return [
        f"Put these in alphabetical order: {', '.join(items)}.",
        f"In alphabetical order they are:\n{lines}\nAnswer: {', '.join(ordered)}",
        "Which one comes first?",
        f"The first in alphabetical order is {ordered[0]}.\nAnswer: {ordered[0]}",
    ]


def conversation(rng: random.Random) -> dict:
    """One row: one question and its answer, or two of them."""
    turns = rng.choice([addition, multiplication, conversion, sorting])(rng)
    turns = turns[: 2 if rng.random() < 0.6 else 4]
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train.parquet and val.parquet")
    parser.add_argument("--train-rows", type=int, default=3200)
    parser.add_argument("--val-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", args.train_rows), ("val", args.val_rows)):
        table = pa.Table.from_pylist([conversation(rng) for _ in range(count)])
        pq.write_table(table, args.out / f"{name}.parquet")


if __name__ == "__main__":
    main()
