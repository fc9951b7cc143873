"""Decoding speed of our loop with and without speculators, of `base.generate` and of its prompt lookup.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py BASE PROMPTS SPECULATOR [SPECULATOR …] [--prompts 40] [--trials 3]

A row of the CSV is one run of one method on one prompt. The methods alternate on each prompt and trial and are compared
in pairs. `--summary` only reads the CSV.
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
from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.decoding.target import position_limit
from verl_speculator.evaluation.prompts import prompt_ids, read_prompts
from verl_speculator.evaluation.run import HuggingFaceMethod, SpeculativeMethod
from verl_speculator.utils.process import evenly_spaced, restart_with_allocator

ROOT = Path(__file__).resolve().parents[1]


def measure(args: argparse.Namespace) -> None:
    """Run all methods and append to the CSV."""
    where = environment()
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    tokenizer, base = load_tokenizer(args.base), load_base(args.base, device=device, dtype=dtype)
    ends, policy = end_token_ids(tokenizer, base.generation_config), SamplingPolicy()
    speculators = {name: load_speculator(name, base=base, device=device).eval() for name in args.speculators}
    length = max(s.n_predict for s in speculators.values())
    contenders = {
        "generate": HuggingFaceMethod(base, policy, 0, ends),
        "alone": SpeculativeMethod(base, None, policy, None, ends),
        "prompt_lookup": HuggingFaceMethod(base, policy, length, ends),
    } | {name: SpeculativeMethod(base, s, policy, None, ends) for name, s in speculators.items()}
    prompts = read_prompts(args.file)
    chosen = [prompt_ids(prompts[i], tokenizer) for i in evenly_spaced(len(prompts), args.prompts)]
    chosen = [ids for ids in chosen if len(ids) + args.max_new_tokens <= position_limit(base)]
    for contender in contenders.values():
        contender.generate(chosen[0], max_new_tokens=32, seed=0)
    for index, ids in enumerate(track(chosen)):
        rows = []
        for trial in range(args.trials):
            names = list(contenders) if (index + trial) % 2 == 0 else list(contenders)[::-1]
            for name in names:
                run = contenders[name].generate(ids, max_new_tokens=args.max_new_tokens, seed=0)
                row = {"contender": name, "prompt": index, "trial": trial, "prompt_tokens": len(ids)}
                row |= {"tokens": len(run.tokens), "rounds": sum(run.counts["histogram"])}
                times = {name.replace("target", "base"): seconds for name, seconds in run.seconds.items()}
                row |= {f"{name}_s": round(seconds, 6) for name, seconds in times.items()}
                row |= {"threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch.")}
                rows.append(row | {"max_new_tokens": args.max_new_tokens, "seed": 0} | where)
        append_rows(args.out, rows)


def summarise(path: Path) -> None:
    """Medians over pairs, from the CSV."""
    runs = pd.read_csv(path)
    runs["total_s"] = runs["prefill_s"] + runs["decode_s"]
    runs["rate"] = runs["tokens"] / runs["total_s"]
    keys = ["prompt", "trial", "threads", "date", "commit"]
    table = Table(title=f"{path.name}: medians over {len(runs.drop_duplicates(keys))} pairs")
    for name in ("contender", "tokens/s", "against generate", "against alone", "against the faster", "draft", "loop"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    rates = runs.pivot_table(index=keys, columns="contender", values="rate")
    faster = rates[["generate", "alone"]].max(axis=1)
    for name in runs["contender"].unique():
        method_runs = runs[runs["contender"] == name]
        draft, base, decode = (method_runs[f"{part}_s"].sum(min_count=1) for part in ("draft", "base", "decode"))
        ratios = [(rates[name] / other).median() for other in (rates["generate"], rates["alone"], faster)]
        shares = ["–", "–"] if pd.isna(draft) else [f"{draft / decode:.1%}", f"{1 - (draft + base) / decode:.1%}"]
        table.add_row(name, f"{rates[name].median():.1f}", *(f"{ratio:.2f}" for ratio in ratios), *shares)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("speculators", nargs="*")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "decoding.csv")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        if not args.speculators:
            parser.error("expected a base, a file of prompts and at least one speculator")
        restart_with_allocator()
        measure(args)
    summarise(args.out)


if __name__ == "__main__":
    main()
