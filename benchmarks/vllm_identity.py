"""Greedy text and accepted drafts of speculators in vLLM, held against vLLM alone and against our own decoder.

    python benchmarks/vllm_identity.py BASE CHECKPOINT [CHECKPOINT ...] --prompts spec_bench.parquet [--routes V1 V2]

Float32, first messages alone, those that fit the base model with their answers. VLLM_V1_PYTHON and VLLM_V2_PYTHON name
the Pythons of environments with vLLM (`make test-vllm`); a route without one is left out. A row holds one checkpoint on
one route: how many answers are the same, and drafts by position. Both sides count the last round of an answer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import append_rows, environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import engines

from verl_speculator import load_speculator
from verl_speculator.base_model.loading import load_base
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.decoding import speculative_generate

ROUTES = {"V1": engines.V1, "V2": engines.V2}


def gap_of_logits(base: Any, prompt: list[int], first: list[int], second: list[int]) -> float:
    """The difference of the base model's logits of two answers' tokens, where they first differ."""
    place = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    with torch.inference_mode():
        logits = base(torch.tensor([prompt + first[:place]])).logits[0, -1]
    return (logits[first[place]] - logits[second[place]]).abs().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=0, help="at most so many prompts, 0 for all")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="at a time")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    base = load_base(args.base, device="cpu", dtype=torch.float32)
    length = base.config.max_position_embeddings
    prompts = engines.chat_prompts(args.base, args.prompts, longest=length - args.max_new_tokens)
    prompts = prompts[: args.count or None]
    answering = [{"generate": prompts, "max_tokens": args.max_new_tokens}]
    settings = engines.engine_settings(args.base, max_model_len=length, max_num_seqs=args.requests)
    ours: dict[Path, tuple[list[list[int]], dict[str, Any]]] = {}
    for route in args.routes:
        if (reason := engines.missing(ROUTES[route])) is not None:
            sys.stdout.write(f"{route} left out: {reason}\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            (alone,) = engines.run(ROUTES[route], Path(folder), settings, answering)
        for checkpoint in args.checkpoints:
            config = read_checkpoint_info(checkpoint).config
            if checkpoint not in ours:
                speculator = load_speculator(checkpoint, base=args.base)
                answers = [
                    speculative_generate(base, speculator, prompt, max_new_tokens=args.max_new_tokens)
                    for prompt in prompts
                ]
                counts = engines.draft_counts(answers, config.n_predict)
                ours[checkpoint] = [answer.tokens for answer in answers], counts
            texts, counts = ours[checkpoint]
            with tempfile.TemporaryDirectory() as folder:
                drafting = settings | engines.drafting(
                    ROUTES[route], checkpoint.resolve(), config.n_predict, export_to=Path(folder) / "export"
                )
                drafted, seen = engines.run(ROUTES[route], Path(folder), drafting, [*answering, {"counts": True}])
            triples = list(zip(prompts, alone["tokens"], drafted["tokens"], texts, strict=True))
            gaps = [gap_of_logits(base, prompt, a, b) for prompt, a, b, _ in triples if a != b]
            row = {
                "route": route,
                "vllm": engines.vllm_version(ROUTES[route]),
                "base": args.base.name,
                "method": config.method,
                "n_predict": config.n_predict,
                "prompts": len(prompts),
                "same_text_as_alone": sum(a == b for _, a, b, _ in triples),
                "same_text_as_our_decoder": sum(b == c for _, _, b, c in triples),
                "largest_gap_where_different": max(gaps, default=0.0),
                "drafted": seen["drafted"],
                "drafted_our_decoder": counts["drafted"],
                "accepted_per_position": "/".join(map(str, seen["accepted_per_position"])),
                "accepted_per_position_our_decoder": "/".join(map(str, counts["accepted_per_position"])),
                "seconds": round(drafted["seconds"], 1),
                "threads": os.environ.get("OMP_NUM_THREADS", ""),
                **environment(),
            }
            sys.stdout.write(f"{row}\n")
            append_rows(args.out, [row])


if __name__ == "__main__":
    main()
