"""Tokens per second of `regenerate`'s loop and of transformers' `generate` over the same prompts, run in turn.

    python benchmarks/regenerate_speed.py --base BASE --data prompts.parquet [--prompts 64] [--batch-size 32]

Both take the same batches' worth of rows at a time, sorted by length; `generate` waits for the longest answer of a
batch, `regenerate` puts the next prompt in the place of an answer that has ended. A row holds the median over trials of
answer tokens per second, and the share of answers with the same text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from common import append_rows, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    for name, default in (("prompts", 64), ("batch-size", 32), ("max-new-tokens", 256), ("trials", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    import torch

    from verl_speculator.base_model.loading import load_base
    from verl_speculator.data.generation_backends import HuggingFaceBackend
    from verl_speculator.data.regenerate import PromptFile, RegenerateSettings, _Run
    from verl_speculator.utils.process import evenly_spaced

    torch.set_num_threads(args.threads)
    settings = RegenerateSettings(
        base=args.base,
        data=args.data,
        out=Path("unused.parquet"),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
    )
    run, file = _Run(settings), PromptFile.read(args.data)
    conversations = file.conversations(evenly_spaced(file.table.num_rows, args.prompts))
    prompts = [run.prompt_ids(each, each.unanswered[0]) for each in conversations]
    backend = run.load_backend()
    assert isinstance(backend, HuggingFaceBackend)
    plain = run.load_backend()  # as transformers loads it
    plain.base = load_base(args.base, device="cpu", dtype=run.dtype)
    loops = {"regenerate": backend.generate, "generate": plain._generate_in_batches}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    texts: dict[str, list] = {}
    for trial in range(args.trials):
        for name in loops if trial % 2 == 0 else reversed(loops):
            start = time.perf_counter()
            answers = sorted(loops[name](prompts, [0] * len(prompts)))
            tokens = sum(len(answer.tokens) + answer.finished for answer in answers)
            rates[name].append(tokens / (time.perf_counter() - start))
            texts[name] = [answer.tokens for answer in answers]
    same = sum(a == b for a, b in zip(*texts.values(), strict=True)) / len(prompts)
    facts = {
        "base": Path(args.base).name,
        "dtype": str(run.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "answer_tokens": sum(map(len, texts["regenerate"])),
        "same_text": round(same, 3),
    }
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates[name], rates["generate"], strict=True)]
        row = {"loop": name, "tokens_per_s": round(statistics.median(values), 1)}
        append_rows(args.out, [facts | row | {"ratio": round(statistics.median(ratios), 3)} | environment()])


if __name__ == "__main__":
    main()
