"""Tokens per second of a whole training step: ours, the plain loop, and the base model's forward pass alone.

    python benchmarks/training_speed.py [--vocab 32768] [--width 256] [--method sum_rnn] [--loss ce] [--pairs 12]
    python benchmarks/training_speed.py --summary            # from the CSV

Conversations of GSM8K's shape (98 ± 25 prompt tokens, 127 ± 57 answer tokens) and a base model with random weights. All
variants alternate on each step, in one process. The plain loop is the usual one: padded batches, the whole base model
with all its hidden states, all rows through all depths, K blocks of logits stacked, cross-entropy, autograd. `cached`
reads the hidden states from the files of `data.cache_hidden_states`. Padding does not count as tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import append_rows, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from training_memory import plain_loss

from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.config.objective import Objective
from verl_speculator.data.alignment import align, padded_positions, states_read
from verl_speculator.data.hidden_state_cache import StateCache
from verl_speculator.losses import DraftLoss
from verl_speculator.models import Speculator

ROOT = Path(__file__).resolve().parents[1]
FLOOR, PLAIN, OURS, CACHED = "base forward", "plain loop", "ours", "ours, cached states"
END = 0  # ends a turn


def build_base(args: argparse.Namespace) -> torch.nn.Module:
    """A Qwen2 with random weights: speed does not depend on them."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        num_key_value_heads=max(1, args.width // 128),
        tie_word_embeddings=True,
    )
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    return base.to(args.device).eval().requires_grad_(False)


class Batch:
    """Conversations of random tokens, packed and padded."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randn(2, args.batch, generator=generator) * torch.tensor([[25.0], [57.0]])
        prompts, answers = (sizes + torch.tensor([[98.0], [127.0]])).round().long().clamp(min=16)
        rows, masks = [], []
        for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
            rows.append(torch.randint(1, args.vocab, (prompt + answer,), generator=generator))
            rows[-1][-1] = END
            masks.append(torch.tensor([0] * prompt + [1] * answer))
        lengths = torch.tensor([len(row) for row in rows])
        self.count = int(lengths.sum())
        self.borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(args.device)
        self.tokens, self.mask = torch.cat(rows).to(args.device), torch.cat(masks).to(args.device)
        self.positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(args.device)
        self.padded = pad_sequence(rows, batch_first=True).to(args.device)
        self.attention = (torch.arange(self.padded.shape[1])[None] < lengths[:, None]).long().to(args.device)


def packed_states(base: torch.nn.Module, batch: Batch) -> Tensor:
    """[T, D] hidden states of a packed batch, computed as in the engine."""
    inputs = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None], "use_cache": False}
    with torch.no_grad():
        return base.base_model(**inputs).last_hidden_state[0]


def plain_step(base: torch.nn.Module, speculator: Speculator, batch: Batch, depths: int) -> Tensor:
    """The loss of the plain loop."""
    with torch.no_grad():
        output = base(batch.padded, attention_mask=batch.attention, output_hidden_states=True, use_cache=False)
    hidden = output.hidden_states[-1].flatten(0, 1)
    rows = align(batch.tokens, batch.mask, batch.borders, depths, [END])
    # Every row of the padded batch takes part; what is no pair counts for nothing.
    tokens = torch.zeros(len(hidden), depths, dtype=torch.long, device=hidden.device)
    targets, valid = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    at = padded_positions(rows.positions, batch.borders, batch.padded.shape[1])
    tokens[at], targets[at], valid[at] = rows.tokens, rows.targets.T, rows.valid.T
    return plain_loss(speculator, hidden, tokens, targets, valid)


def our_step(base: torch.nn.Module, draft: DraftLoss, batch: Batch, depths: int, states: Tensor | None) -> Tensor:
    """The loss as the engine computes it; `states` [S, D] from a cache replace the base model's forward pass."""
    rows = align(batch.tokens, batch.mask, batch.borders, depths, [END])
    positions, teachers = rows.positions, rows.teachers
    if states is None:
        states = packed_states(base, batch)
    else:
        cached_positions = states_read(batch.mask, batch.borders)
        place = torch.zeros_like(batch.tokens)
        place[cached_positions] = torch.arange(len(cached_positions), device=place.device)
        positions, teachers = place[positions], place[teachers]
    head = base.get_output_embeddings().weight
    teacher = {"teacher_hidden": states, "teacher_rows": teachers, "base_head": lambda s: s.to(head.dtype) @ head.T}
    sums = draft(
        states[positions],
        rows.tokens,
        rows.targets,
        rows.valid,
        counts=rows.valid.sum(1),
        **(teacher if draft.objective.needs_teacher else {}),
    )
    return sums["total"]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    base = build_base(args)
    widths = {"inner_dim": args.width, "emb_dim": args.width, "proj_dim": args.width}
    config = SpeculatorConfig(method=args.method, n_predict=args.k, **widths)
    objective = Objective.parse(dict.fromkeys(args.loss.split("+"), 1.0))
    batches = [Batch(args, seed) for seed in range(args.pairs + args.warmup)]

    def trained(loss: Callable[[Any, Batch, int], Tensor]) -> Callable[[Batch, int], None]:
        speculator = build_speculator(config, hidden_size=args.width, vocab_size=args.vocab, seed=1, device=args.device)
        draft = DraftLoss(speculator, objective, compiled=args.compile)
        optimizer = torch.optim.AdamW(speculator.parameters(), lr=1e-3)

        def step(batch: Batch, number: int) -> None:
            with torch.autocast(args.device, args.dtype, enabled=args.dtype != torch.float32):
                total = loss(draft, batch, number)
            total.backward()
            torch.nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    with tempfile.TemporaryDirectory() as folder:
        lengths = [len(states_read(batch.mask, batch.borders)) for batch in batches]
        cache = StateCache.create(Path(folder) / "states", {}, lengths, args.width)
        for i, batch in enumerate(batches):
            cache.write(i, packed_states(base, batch)[states_read(batch.mask, batch.borders)])
        variants = {
            FLOOR: lambda batch, number: packed_states(base, batch),
            PLAIN: trained(lambda draft, batch, number: plain_step(base, draft.speculator, batch, args.k)),
            OURS: trained(lambda draft, batch, number: our_step(base, draft, batch, args.k, None)),
            CACHED: trained(
                lambda draft, batch, number: our_step(base, draft, batch, args.k, cache.read([number]).to(args.device))
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        peaks = dict.fromkeys(variants, 0.0)
        on_cuda = args.device == "cuda"
        for number, batch in enumerate(batches):
            for name, step in variants.items():
                if on_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                step(batch, number)
                if on_cuda:
                    torch.cuda.synchronize()
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 1e9)
                if number >= args.warmup:
                    seconds[name].append(time.perf_counter() - start)
    counts = [batch.count for batch in batches[args.warmup :]]
    rows = []
    for name, times in seconds.items():
        against = [plain / variant for plain, variant in zip(seconds[PLAIN], times, strict=True)]
        rows.append(
            {
                "contender": name,
                **{key: getattr(args, key) for key in ("vocab", "width", "layers", "method", "k", "batch", "loss")},
                "compile": args.compile,
                "dtype": str(args.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "pairs": args.pairs,
                "tokens_per_second": round(statistics.median(n / t for n, t in zip(counts, times, strict=True)), 1),
                "against_plain": round(statistics.median(against), 3),
                "against_plain_lo": round(min(against), 3),
                "against_plain_hi": round(max(against), 3),
                "of_base_forward": round(
                    statistics.median(variant / floor for variant, floor in zip(times, seconds[FLOOR], strict=True)), 3
                ),
                "peak_gb": round(peaks[name], 3) if on_cuda else "",
                "seed": args.seed,
                "device": args.device,
            }
        )
    return rows


def summarise(path: Path) -> None:
    """Print the CSV as a table."""
    table = Table(title=path.name)
    for name in (
        "V",
        "K",
        "method",
        "loss",
        "contender",
        "tokens/s",
        "against the plain loop",
        "of the base's forward",
    ):
        table.add_column(name)
    for row in pd.read_csv(path).itertuples():
        ratio = f"{row.against_plain:.2f} [{row.against_plain_lo:.2f}, {row.against_plain_hi:.2f}]"
        cells = (row.vocab, row.k, row.method, row.loss, row.contender, f"{row.tokens_per_second:,.0f}", ratio)
        table.add_row(*map(str, cells), f"{row.of_base_forward:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--method", default="sum_rnn")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--loss", default="ce", help="our loss, several joined by +; the plain loop always uses ce")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training_speed.csv")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        torch.set_num_threads(args.threads)
        args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        where = environment()
        append_rows(args.out, [row | where for row in measure(args)])
    summarise(args.out)


if __name__ == "__main__":
    from verl_speculator.utils.process import restart_with_allocator

    restart_with_allocator()
    main()
