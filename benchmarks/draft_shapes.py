"""Speed and acceptance of draft shapes: chains of fixed lengths, adaptive draft length, and trees of several sizes.

    OMP_NUM_THREADS=1 python benchmarks/draft_shapes.py BASE SAMPLE PROMPTS SPECULATOR [--prompts 40] [--trials 2]
        [--sizes 8,16,32] [--lengths 3]
    python benchmarks/draft_shapes.py --summary

The trees are chosen on the base model's answers to SAMPLE, in the same process. A row of the CSV is one run of one
shape on one prompt of PROMPTS. The shapes alternate on each prompt and trial and are compared in pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from common import append_rows, environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

from verl_speculator import load_speculator
from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.loading import choose_device, choose_dtype, load_base, load_tokenizer
from verl_speculator.decoding import DraftTree
from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.decoding.target import position_limit
from verl_speculator.decoding.tree import most_frequent
from verl_speculator.evaluation.prompts import prompt_ids, read_prompts
from verl_speculator.evaluation.run import SpeculativeMethod
from verl_speculator.evaluation.tree_search import sample_ranks
from verl_speculator.utils.process import evenly_spaced, restart_with_allocator

ROOT = Path(__file__).resolve().parents[1]


def measure(args: argparse.Namespace) -> None:
    """Run all shapes and append to the CSV."""
    where = environment()
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    tokenizer, base = load_tokenizer(args.base), load_base(args.base, device=device, dtype=dtype)
    ends, policy = end_token_ids(tokenizer, base.generation_config), SamplingPolicy()
    speculator = load_speculator(args.speculator, base=base, device=device, dtype=dtype).eval()
    sample = sample_ranks(
        *(base, tokenizer, speculator, read_prompts(args.sample)),
        ends=ends,
        num_prompts=args.sample_prompts,
        max_new_tokens=args.max_new_tokens,
    )
    full = speculator.n_predict
    contenders, expected = {"alone": SpeculativeMethod(base, None, policy, None, ends)}, {}
    for length in dict.fromkeys([full, *map(int, args.lengths.split(","))]):
        contenders[f"chain of {length}"] = SpeculativeMethod(base, speculator, policy, length, ends)
        expected[f"chain of {length}"] = sample.tau(DraftTree.chain(length))
    contenders["auto"] = SpeculativeMethod(base, speculator, policy, "auto", ends)
    for size in map(int, args.sizes.split(",")):
        tree = most_frequent(sample.paths, size)
        contenders[f"tree of {size}"] = SpeculativeMethod(base, speculator, policy, None, ends, tree)
        expected[f"tree of {size}"] = sample.tau(tree)
    prompts = read_prompts(args.file)
    chosen = [prompt_ids(prompts[i], tokenizer) for i in evenly_spaced(len(prompts), args.prompts)]
    chosen = [ids for ids in chosen if len(ids) + args.max_new_tokens <= position_limit(base)]
    for contender in contenders.values():
        contender.generate(chosen[0], max_new_tokens=32, seed=0)
    facts = {"base": args.base, "speculator": args.speculator, "method": speculator.config.method, "n_predict": full}
    facts |= {"sample": len(sample.paths), "threads": torch.get_num_threads(), "device": device}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "max_new_tokens": args.max_new_tokens, "seed": 0} | where
    for index, ids in enumerate(track(chosen)):
        rows = []
        for trial in range(args.trials):
            names = list(contenders) if (index + trial) % 2 == 0 else list(contenders)[::-1]
            runs = {name: contenders[name].generate(ids, max_new_tokens=args.max_new_tokens, seed=0) for name in names}
            for name, run in runs.items():
                row = {"contender": name, "prompt": index, "trial": trial, "prompt_tokens": len(ids)}
                row |= {"tokens": len(run.tokens), "same_text": run.tokens == runs["alone"].tokens}
                counts, times = run.counts, {name.replace("target", "base"): s for name, s in run.seconds.items()}
                row |= {"rounds": sum(counts["histogram"]), "nodes": counts["nodes"][0]}
                row |= {"accepted": sum(j * count for j, count in enumerate(counts["histogram"]))}
                row |= {"drafted": sum(j * count for j, count in enumerate(counts["drafted"]))}
                row |= {"expected_tau": round(expected[name], 4) if name in expected else ""}
                rows.append(row | {f"{name}_s": round(seconds, 6) for name, seconds in times.items()} | facts)
        append_rows(args.out, rows)


def summarise(path: Path) -> None:
    """τ over all rounds and medians over pairs, from the CSV; a table for each speculator."""
    runs = pd.read_csv(path)
    runs["total_s"] = runs["prefill_s"] + runs["decode_s"]
    runs["rate"] = runs["tokens"] / runs["total_s"]
    keys = ["prompt", "trial"]
    for (base, name, device, commit), speculator_runs in runs.groupby(
        ["base", "speculator", "device", "commit"], sort=False
    ):
        rates = speculator_runs.pivot_table(index=keys, columns="contender", values="rate")
        table = Table(title=f"{name} on {base}, {device}, {commit[:7]}: {len(rates)} pairs")
        columns = (
            "drafts",
            "nodes",
            "expected τ",
            "τ",
            "accepted",
            "tokens/s",
            "speedup",
            "base pass ms",
            "draft",
            "loop",
        )
        for column in (*columns, "same text"):
            table.add_column(column, justify="left" if column == "drafts" else "right")
        for contender, rows in speculator_runs.groupby("contender", sort=False):
            rounds, drafted = rows["rounds"].sum(), rows["drafted"].sum()
            draft, target, decode = (rows[f"{part}_s"].sum(min_count=1) for part in ("draft", "base", "decode"))
            expected = rows["expected_tau"].iloc[0]
            table.add_row(
                contender,
                f"{rows['nodes'].sum() / rounds:.1f}",
                "–" if pd.isna(expected) else f"{expected:.2f}",
                f"{1 + rows['accepted'].sum() / rounds:.2f}",
                f"{rows['accepted'].sum() / drafted:.1%}" if drafted else "–",
                f"{rates[contender].median():.1f}",
                f"{(rates[contender] / rates['alone']).median():.2f}",
                # The last round of a text is timed and not counted.
                f"{1000 * target / (rounds + len(rows)):.2f}",
                f"{draft / decode:.1%}",
                f"{1 - (draft + target) / decode:.1%}",
                f"{rows['same_text'].sum()} of {len(rows)}",
            )
        Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("sample", nargs="?", type=Path)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("speculator", nargs="?")
    parser.add_argument("--sample-prompts", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--sizes", default="8,16,32", help="nodes of the trees, separated by commas")
    parser.add_argument("--lengths", default="3", help="lengths of chains besides n_predict, separated by commas")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "draft_shapes.csv")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        if args.speculator is None:
            parser.error("expected a base, a file to choose trees on, a file of prompts and a speculator")
        restart_with_allocator()
        measure(args)
    summarise(args.out)


if __name__ == "__main__":
    main()
