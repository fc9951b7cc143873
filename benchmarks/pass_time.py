"""Time of a base model's forward pass by the number of tokens it reads, which decides whether drafts pay.

    python benchmarks/pass_time.py --base BASE [--threads 1 2] [--dtypes fp32 bf16] [--contexts 200 900]

Each pass reads N tokens after a context in the KV cache, as verification does. The model as transformers loads it and
as decoding prepares it for a CPU (`verl_speculator.base_model.cpu`) run in turn. A row holds the median over trials,
and its ratio to the first of `--tokens`, one: the cost of verifying N − 1 drafts in steps of the base model alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from common import append_rows, environment
from rich.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--dtypes", nargs="+", default=["auto"])
    for name, default in (("threads", [1, 2]), ("contexts", [200]), ("tokens", [1, 2, 4, 6, 9, 13, 17, 33])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--trials", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    import torch

    from verl_speculator.base_model.cpu import optimize_for_cpu
    from verl_speculator.base_model.loading import choose_dtype, load_base
    from verl_speculator.decoding.target import Target

    generator = torch.Generator().manual_seed(args.seed)
    for dtype in (choose_dtype(name, "cpu") for name in args.dtypes):
        models = {name: load_base(args.base, device="cpu", dtype=dtype) for name in ("as loaded", "prepared")}
        optimize_for_cpu(models["prepared"])
        text = torch.randint(models["prepared"].config.vocab_size, (max(args.contexts),), generator=generator)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for context in args.contexts:
                times = measure({name: Target(model) for name, model in models.items()}, text, context, args)
                facts = {
                    "base": Path(args.base).name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "context": context,
                }
                rows = []
                for (name, count), values in times.items():
                    one = statistics.median(times[name, args.tokens[0]])
                    median = statistics.median(values)
                    figures = {"ms": round(1000 * median, 2), "ratio": round(median / one, 3)}
                    rows.append(facts | {"model": name, "tokens": count} | figures | {"seed": args.seed})
                append_rows(args.out, [row | environment() for row in rows])
                for name in models:
                    shown = "  ".join(f"{row['tokens']}: {row['ms']:.1f}" for row in rows if row["model"] == name)
                    Console().print(*facts.values(), f"{name:>10}", " ", shown)


def measure(targets: dict, text, context: int, args: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Seconds of the passes of each target, by its name and the number of tokens."""
    import torch

    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for target in targets.values():
            target.__enter__()
            target.read(text[:context], last_only=True)
        for count in args.tokens:
            for trial in range(args.trials + 1):
                for name, target in targets.items():
                    start = time.perf_counter()
                    target.read(text[:count])
                    if trial:  # the first is a warm-up
                        times.setdefault((name, count), []).append(time.perf_counter() - start)
                    target.roll_back(context)
        for target in targets.values():
            target.__exit__(None, None, None)
    return times


if __name__ == "__main__":
    main()
