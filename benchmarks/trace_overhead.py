"""Overhead of a trace: alternating forward passes with and without hooks.

    OMP_NUM_THREADS=1 python benchmarks/trace_overhead.py BASE [--modules "layers.0.*" …] [--tokens 256] [--pairs 40]

A row of the CSV is one set of modules: the median over pairs of the time with hooks divided by the time without. The
one-time cost at the start and end of a trace (fingerprints of weights, the file) has its own column.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import append_rows, environment
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from verl_speculator.base_model.loading import choose_device, choose_dtype, load_base
from verl_speculator.diagnose import trace
from verl_speculator.diagnose.tracer import Tracer
from verl_speculator.utils.process import restart_with_allocator

ROOT = Path(__file__).resolve().parents[1]
SETS = {
    "one layer and the norm": ["model.layers.0", "model.norm"],
    "two layers, their attention and MLP": [
        f"model.layers.{i}{part}" for i in (0, 1) for part in ("", ".mlp", ".self_attn")
    ],
    "all": None,
}


def load(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A base model, or for `random-WIDTHxLAYERS` a Llama with random weights: speed does not depend on them."""
    if not name.startswith("random-"):
        return load_base(name, device=device, dtype=dtype)
    width, layers = (int(part) for part in name.removeprefix("random-").split("x"))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of one forward pass."""
    start = time.perf_counter()
    model(input_ids=tokens, use_cache=False)
    if tokens.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: torch.nn.Module, tokens: torch.Tensor, modules: list[str] | None, pairs: int) -> dict[str, float]:
    """Ratio of the medians of pairs, and the one-time cost of start and end."""
    tracer, with_hooks, without = Tracer(model, modules, (), weights=False), [], []
    for _ in range(3):
        seconds(model, tokens)
    for i in range(pairs):
        for hooked in ((True, False), (False, True))[i % 2]:
            if not hooked:
                without.append(seconds(model, tokens))
                continue
            with tracer.hooked():
                with_hooks.append(seconds(model, tokens))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with trace(model, Path(folder) / "trace", modules=modules):
            pass
        once = time.perf_counter() - start
    ratios = [a / b for a, b in zip(with_hooks, without, strict=True)]
    return {
        "pass_ms": round(1000 * statistics.median(without), 2),
        "ratio": round(statistics.median(ratios), 4),
        "once_ms": round(1000 * once, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--modules", nargs="*")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "trace_overhead.csv")
    args = parser.parse_args()
    restart_with_allocator()
    device = choose_device("auto")
    model = load(args.base, device, choose_dtype("auto", device))
    vocab = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocab, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    where, rows = environment(), []
    for name, modules in ({", ".join(args.modules): args.modules} if args.modules else SETS).items():
        facts = {"base": Path(args.base).name, "modules": name, "tokens": args.tokens, "pairs": args.pairs}
        facts |= {"threads": torch.get_num_threads(), "device": device}
        rows.append(facts | measure(model, tokens, modules, args.pairs) | where)
        Console().print(f"{name}: {rows[-1]['ratio'] - 1:+.1%} of {rows[-1]['pass_ms']} ms")
    append_rows(args.out, rows)


if __name__ == "__main__":
    main()
