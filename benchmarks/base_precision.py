"""Effect of rounding a base model's fp32 buffers (RoPE's frequencies) to bf16 on its distributions.

    python benchmarks/base_precision.py BASE TEXT.parquet [--length 1000] [--rows 8]

Compares the base model in bf16 as `from_pretrained` returns it, which training uses, with the same model after
`.to(bfloat16)`, which rounds its buffers too: KL(fp32 ‖ bf16) of the next token, mean over all positions, and the share
of positions with a different most likely token. Texts are joined until a row has `--length` tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch
from common import append_rows, environment
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_tokens(path: Path, tokenizer, rows: int, length: int) -> torch.Tensor:
    """[rows, length] token ids of the answers in a parquet file of conversations, concatenated."""
    ids: list[int] = []
    for messages in pq.read_table(path, columns=["messages"])["messages"].to_pylist():
        ids += tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        if len(ids) >= rows * length:
            break
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    """[rows · length, V] log-probabilities of the next token, in fp32."""
    return torch.cat([model(row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()

    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, attn_implementation="sdpa").eval()

    tokens = read_tokens(args.text, AutoTokenizer.from_pretrained(args.base), args.rows, args.length)
    exact = log_probs(load(torch.float32), tokens)
    models = {"fp32 buffers": load(torch.bfloat16), "bf16 buffers": load(torch.bfloat16).to(torch.bfloat16)}
    rows, table = [], Table("buffers", "KL to fp32", "different top-1")
    for name, model in models.items():
        rounded = log_probs(model, tokens)
        kl = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
        other = (exact.argmax(-1) != rounded.argmax(-1)).float().mean().item()
        figures = {
            "length": args.length,
            "rows": args.rows,
            "kl": kl,
            "top1_differs": other,
        }
        rows.append({**environment(), "base": Path(args.base).name, "buffers": name.split()[0], **figures})
        table.add_row(name, f"{kl:.2e}", f"{100 * other:.2f} %")
    append_rows(args.out, rows)
    Console().print(table)


if __name__ == "__main__":
    main()
