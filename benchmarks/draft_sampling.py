"""Tokens per pass above temperature 0 with drafts that are drawn from the speculator and with its most likely ones.

    python benchmarks/draft_sampling.py --base BASE --speculators CHECKPOINT [...] --prompts test.parquet

The same prompts and seeds for both, in our own decoder, first messages alone. vLLM's setting is `draft_sample_method`.
τ counts all rounds after the first; the interval is a bootstrap over prompts of the ratio drawn / most likely.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from common import append_rows, environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import engines

from verl_speculator import load_speculator
from verl_speculator.base_model.loading import load_base
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.decoding import speculative_generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--speculators", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="prompts, the last of the file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    base = load_base(args.base, device="cpu", dtype=torch.float32)
    prompts = engines.chat_prompts(args.base, args.prompts)[-args.count :]
    for checkpoint in args.speculators:
        config = read_checkpoint_info(checkpoint).config
        speculator = load_speculator(checkpoint, base=base)
        for temperature in args.temperatures:
            # [kind, prompt, (tokens, rounds)] over all seeds
            sums = np.zeros((2, len(prompts), 2))
            for kind, sampled in enumerate((False, True)):
                for place, prompt in enumerate(prompts):
                    for seed in range(args.seeds):
                        settings = {"temperature": temperature, "sampled_drafts": sampled, "seed": seed}
                        answer = speculative_generate(
                            base, speculator, prompt, max_new_tokens=args.max_new_tokens, **settings
                        )
                        rounds = answer.rounds[1:]
                        sums[kind, place] += sum(r.accepted + 1 for r in rounds), len(rounds)
            draws = np.random.default_rng(0).integers(len(prompts), size=(1000, len(prompts)))
            resampled = sums[:, draws].sum(2)
            ratios = (resampled[1, :, 0] / resampled[1, :, 1]) / (resampled[0, :, 0] / resampled[0, :, 1])
            greedy, drawn = (total[0] / total[1] for total in sums.sum(1))
            row = {
                "base": args.base.name,
                "checkpoint": checkpoint.name,
                "method": config.method,
                "n_predict": config.n_predict,
                "temperature": temperature,
                "prompts": len(prompts),
                "seeds": args.seeds,
                "tau_most_likely": round(greedy, 4),
                "tau_drawn": round(drawn, 4),
                "ratio": round(drawn / greedy, 4),
                "ratio_low": round(float(np.quantile(ratios, 0.025)), 4),
                "ratio_high": round(float(np.quantile(ratios, 0.975)), 4),
                **environment(),
            }
            sys.stdout.write(f"{row}\n")
            append_rows(args.out, [row])


if __name__ == "__main__":
    main()
