"""Effect on Medusa heads of reading the hidden state before the final norm without a copy of the norm.

    python benchmarks/pre_norm.py BASE MEDUSA_CHECKPOINT PROMPTS.parquet [--num-prompts 40]

Untrained heads (which should repeat the base model) and trained heads read the hidden state after the norm, the one
before it through a copy of the norm, and the one before it without the norm. Reports greedy τ and, for untrained heads,
the probability Σ min(p, q) that the first head's draft is the base model's next token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import append_rows, environment
from rich.console import Console
from rich.table import Table

from verl_speculator import build_speculator, load_speculator
from verl_speculator.base_model.loading import load_base, load_tokenizer
from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.target import Target
from verl_speculator.evaluation.prompts import prompt_ids, read_prompts
from verl_speculator.models.layers import copy_norm, start_from_base
from verl_speculator.models.medusa import Medusa
from verl_speculator.utils.process import evenly_spaced


class WithoutNorm(Medusa):
    """Heads trained on the state after the norm that read the state before it."""

    @property
    def hidden_state_source(self) -> str:
        return "pre_norm"


class WithNorm(WithoutNorm):
    """The same heads, with a copy of the norm applied first."""

    def start(self, hidden: torch.Tensor) -> Any:
        return super().start(self.base_norm(hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("speculator")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    base = load_base(args.base, device="cpu", dtype=torch.float32)
    tokenizer = load_tokenizer(args.base)
    prompts = read_prompts(args.prompts)
    tokens = [prompt_ids(prompts[i], tokenizer, []) for i in evenly_spaced(len(prompts), args.num_prompts)]

    trained = load_speculator(args.speculator, base=args.base).requires_grad_(False)
    untrained = build_speculator(
        trained.config, hidden_size=trained.hidden_size, vocab_size=trained.vocab_size, seed=0
    ).requires_grad_(False)
    start_from_base(untrained, base)
    normed = {"hidden_state": "pre_norm"}
    copy = build_speculator(
        type(trained.config)(**trained.config.to_dict() | normed),
        hidden_size=trained.hidden_size,
        vocab_size=trained.vocab_size,
        seed=0,
    ).requires_grad_(False)
    copy_norm(copy, base)

    table = Table(title="Medusa heads and the final norm")
    for name in ("heads", "state", "τ", "share of drafts accepted", "Σ min(p, q) of untrained heads"):
        table.add_column(name, justify="left" if name in ("heads", "state") else "right")
    rows = []
    for heads, speculator in (("untrained", untrained), ("trained", trained)):
        speculator.__dict__["base_norm"] = copy.norm
        for state, kind in (
            ("post_norm", Medusa),
            ("pre_norm, with the norm", WithNorm),
            ("pre_norm, without", WithoutNorm),
        ):
            speculator.__class__ = kind
            rounds = [
                decoding_round
                for prompt in tokens
                for decoding_round in speculative_generate(
                    base, speculator, prompt, max_new_tokens=args.max_new_tokens
                ).counted
            ]
            accepted = sum(decoding_round.accepted for decoding_round in rounds) / len(rounds)
            overlap = overlap_with_base(base, speculator, tokens) if heads == "untrained" else float("nan")
            rows.append(
                {
                    "heads": heads,
                    "state": state,
                    "tau": round(1 + accepted, 4),
                    "accept_rate": round(accepted / speculator.n_predict, 4),
                    "overlap_with_next_token": round(overlap, 4),
                    "n_predict": speculator.n_predict,
                    "prompts": len(tokens),
                    "rounds": len(rounds),
                    **environment(),
                }
            )
            table.add_row(
                heads, state, f"{1 + accepted:.3f}", f"{accepted / speculator.n_predict:.1%}", f"{overlap:.3f}"
            )
    append_rows(args.out, rows)
    Console().print(table)


@torch.inference_mode()
def overlap_with_base(base: torch.nn.Module, speculator: Medusa, prompts: list[list[int]]) -> float:
    """Mean of Σ min(p, q) between the base model and the first head, over all positions of the prompts."""
    overlaps = []
    for prompt in prompts:
        with Target(base, speculator.hidden_state_source) as target:
            states, logits = target.read(torch.tensor(prompt))
        z = speculator.step(speculator.start(states), states).output
        q = (z @ speculator.head(0).T).softmax(-1)
        overlaps.append(torch.minimum(logits.softmax(-1), q).sum(-1))
    return float(torch.cat(overlaps).mean())


if __name__ == "__main__":
    main()
