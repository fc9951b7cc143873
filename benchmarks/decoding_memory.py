"""Peak memory of decoding with the base model alone, with an early exit and with a sum_rnn, each in its own process.

    python benchmarks/decoding_memory.py [--layers 12] [--width 768] [--vocab 16384] [--exit-layer 5] [--trials 3]

The base model has random weights: memory does not depend on them. A row holds the peak of the resident set over loading
and decoding (median of the trials), the bytes of the speculator's parameters, and the peak divided by the sum of the
base model's own peak and those bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import append_rows, environment

METHODS = ("none", "early_exit head", "early_exit head_and_block", "sum_rnn")
PROMPT, TOKENS = 512, 128


def measure(args: argparse.Namespace, contender: str) -> dict[str, Any]:
    """Build, decode and read the peak in this process."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from verl_speculator import SpeculatorConfig, build_speculator
    from verl_speculator.decoding import speculative_generate
    from verl_speculator.evaluation.run import peak_memory, reset_peak_memory
    from verl_speculator.models.layers import block_shapes, copy_norm

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    speculator, size = None, 0
    if contender != "none":
        method, _, trainable = contender.partition(" ")
        dims = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), args.width)
        shape = SpeculatorConfig(
            method=method, n_predict=3, exit_layer=args.exit_layer, trainable=trainable or "head", **dims
        )
        shapes = block_shapes(base, shape)
        speculator = build_speculator(
            shape, hidden_size=args.width, vocab_size=args.vocab, block_shapes=shapes, seed=0
        ).requires_grad_(False)
        copy_norm(speculator, base)
        speculator.copy_block(base)
        size = sum(p.numel() * p.element_size() for p in speculator.parameters())
    reset_peak_memory(base.device)
    prompt = torch.randint(args.vocab, (PROMPT,), generator=torch.Generator().manual_seed(1))
    speculative_generate(base, speculator, prompt, max_new_tokens=TOKENS, eos_token_id=())
    return {"peak_mb": peak_memory(base.device), "parameters_mb": size / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("vocab", 16384), ("exit-layer", 5), ("trials", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(json.dumps(measure(args, args.child)))
        return
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    shape = [f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("layers", "width", "vocab", "exit-layer")]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for _ in range(args.trials):
        for name in METHODS:
            done = subprocess.run(
                [sys.executable, __file__, *shape, "--child", name],
                check=True,
                env=environ,
                stdout=subprocess.PIPE,
                text=True,
            )
            results[name].append(json.loads(done.stdout))
    peaks = {name: statistics.median(trial["peak_mb"] for trial in trials) for name, trials in results.items()}
    rows = []
    for name in METHODS:
        size = results[name][0]["parameters_mb"]
        rows.append(
            {
                "contender": name,
                "layers": args.layers,
                "width": args.width,
                "vocab": args.vocab,
                "exit_layer": args.exit_layer,
                "prompt": PROMPT,
                "tokens": TOKENS,
                "peak_mb": round(peaks[name], 1),
                "speculator_mb": round(size, 1),
                "against_base_and_speculator": round(peaks[name] / (peaks["none"] + size), 4),
                "trials": args.trials,
                **environment(),
            }
        )
        sys.stdout.write(f"{name:28} {peaks[name]:8.1f} MiB  {rows[-1]['against_base_and_speculator']:.3f}\n")
    append_rows(args.out, rows)


if __name__ == "__main__":
    main()
