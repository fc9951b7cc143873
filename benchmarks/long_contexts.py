"""Prompts that end a long conversation, for τ against the length of the context.

    python benchmarks/long_contexts.py --base BASE --data answered.parquet --out contexts.parquet [--prompts 4]
    verl-speculator evaluate --base BASE --speculator RUN --prompts contexts.parquet --baselines none --out OUT

Each row asks a question of the file after as many of its other conversations as fill the context; the column `category`
holds the number of tokens aimed at, by which `evaluate` groups its results. The same questions close every length.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from verl_speculator.base_model.chat_template import tokenize_prompt
from verl_speculator.base_model.loading import load_tokenizer
from verl_speculator.utils.atomic_io import atomic_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 6144])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.base)
    conversations = pq.read_table(args.data, columns=["messages"])["messages"].to_pylist()
    random.Random(args.seed).shuffle(conversations)
    rows = []
    for length in args.lengths:
        for conversation in conversations[: args.prompts]:
            messages = [next(message for message in conversation if message["role"] == "user")]
            for earlier in itertools.cycle(conversations[args.prompts :]):
                longer = [*earlier, *messages]
                if len(tokenize_prompt(tokenizer, longer)) > length:
                    break
                messages = longer
            rows.append({"category": f"{length:>5}", "messages": messages})
            Console().print(length, len(tokenize_prompt(tokenizer, messages)))
    with atomic_file(args.out) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    main()
