"""Time and weights of speculators with a whole, a smaller and a low-rank head, at a small base model's sizes.

    python benchmarks/head_speed.py [--width 576] [--vocab 49152] [--rows 128] [--threads 1]

sum_rnn. The loss (kl+tv, forward and backward, over `--rows` hidden states) and a chain of K drafts of one state, which
reads the head K times. A low-rank head is the last layer of `inner_dim`: V × r after r × D. Heads run in turn; a row
holds medians over trials, and ratios to the first head.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import append_rows, environment
from rich.console import Console

from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.losses import speculator_loss

FROZEN = {"embedding": "base_frozen", "head": "base_frozen"}
HEADS = {
    "own": {},
    "own, 32,000 tokens": {"draft_vocab_size": 32_000},
    "own, 8,192 tokens": {"draft_vocab_size": 8192},
    "base_frozen": FROZEN,
    "base_frozen, 8,192 tokens": FROZEN | {"draft_vocab_size": 8192},
    "own of rank 128": {"embedding": "base_frozen", "inner_dim": "{width}.128"},
    "own of rank 64": {"embedding": "base_frozen", "inner_dim": "{width}.64"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 576, "vocab": 49152, "rows": 128, "k": 5, "threads": 1, "trials": 7, "seed": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    head = torch.randn(args.vocab, args.width) / args.width**0.5
    hidden = torch.randn(args.rows, args.width)
    tokens = torch.randint(args.vocab, (args.rows, args.k))
    later = (torch.arange(args.rows)[:, None] + torch.arange(args.k)).clamp(max=args.rows - 1)
    teacher = {"teacher_hidden": hidden, "teacher_rows": later, "base_head": head}

    class Base(torch.nn.Module):
        """What a speculator takes of a base model: its tables."""

        config = type("Config", (), {"vocab_size": args.vocab, "hidden_size": args.width})

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(args.width, args.vocab, bias=False)
            self.embedding = torch.nn.Embedding(args.vocab, args.width)
            self.head.weight = self.embedding.weight = torch.nn.Parameter(head)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    base, speculators = Base(), {}
    widths = {"inner_dim": args.width, "emb_dim": args.width, "proj_dim": args.width}
    for name, settings in HEADS.items():
        chosen = widths | {k: v.format(width=args.width) if isinstance(v, str) else v for k, v in settings.items()}
        config = SpeculatorConfig(method="sum_rnn", n_predict=args.k, **chosen)
        size = config.draft_vocab_size
        draft_tokens = None if size is None else torch.randperm(args.vocab)[:size].sort().values
        shape = {"hidden_size": args.width, "vocab_size": args.vocab, "draft_tokens": draft_tokens}
        speculators[name] = build_speculator(config, seed=1, **shape)
        speculators[name].attach(base)

    def loss(speculator: torch.nn.Module) -> None:
        valid = torch.ones_like(tokens, dtype=torch.bool)
        objective = {"kl": 1.0, "tv": 1.0}
        speculator_loss(speculator, hidden, tokens, tokens, valid, **teacher, loss=objective)[0].backward()
        speculator.zero_grad()

    @torch.inference_mode()
    def draft(speculator: torch.nn.Module) -> None:
        speculator.draft(speculator.start(hidden[:1]), tokens[:1, 0], args.k)

    times: dict[tuple[str, str], list[float]] = {}
    for trial in range(args.trials + 1):
        for name, speculator in speculators.items():
            for what, call, repeats in (("loss", loss, 1), ("draft", draft, 5)):
                start = time.perf_counter()
                for _ in range(repeats):
                    call(speculator)
                if trial:  # the first is a warm-up
                    times.setdefault((name, what), []).append((time.perf_counter() - start) / repeats)
    first = next(iter(speculators))
    for name, speculator in speculators.items():
        trained = sum(p.numel() for p in speculator.parameters())
        figures = {"head": name, "weights_millions": round(trained / 1e6, 2)}
        for what in ("loss", "draft"):
            figures[f"{what}_ms"] = round(1000 * statistics.median(times[name, what]), 2)
            ratios = [a / b for a, b in zip(times[name, what], times[first, what], strict=True)]
            figures[f"{what}_ratio"] = round(statistics.median(ratios), 3)
        append_rows(args.out, [figures | {name: getattr(args, name) for name in defaults} | environment()])
        Console().print(figures)


if __name__ == "__main__":
    main()
