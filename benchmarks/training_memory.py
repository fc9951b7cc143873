"""Peak memory of the speculator's loss, forward and backward, without parameters, optimizer and base.

    python benchmarks/training_memory.py [--setting 8b|long|all] [--impl ours|plain|both] [--out FILE.csv]
    python benchmarks/training_memory.py --growth            # K = 1 … 8 and V = 32k … 256k

Counted on fake tensors: every allocation and release is seen, none takes place, so that no GPU is needed. The gradients
of the parameters count, the parameters and the rows of hidden states that the base hands over do not. `plain` is the
loop of the field: all rows through all depths, K blocks of logits stacked, cross-entropy on them, autograd.
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

import torch
from common import append_rows, environment
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.losses import speculator_loss
from verl_speculator.models import Speculator

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    # ArcticTraining's llama3.1-8b.yaml: 64 sequences of 256 tokens.
    "8b": {"rows": 64 * 256, "depths": 3, "vocab": 128256, "width": 4096},
    "long": {"rows": 8 * 2048, "depths": 3, "vocab": 151936, "width": 4096},
}


class Account(TorchDispatchMode):
    """Bytes that are held now, and the most that were, over all storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.finalize(storage, gone)


def plain_loss(speculator: Speculator, hidden: Tensor, tokens: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The field's loop: unroll, stack all logits, cross-entropy of each depth in float32."""
    states = speculator.unroll(hidden, tokens)
    logits = torch.stack([state @ speculator.head(k).T for k, state in enumerate(states)])
    losses = []
    for k, depth in enumerate(logits):
        target = torch.where(valid[:, k], targets[:, k], -100)
        losses.append(F.cross_entropy(depth.float(), target))
    return torch.stack(losses).mean()


def measure(impl: str, rows: int, depths: int, vocab: int, width: int) -> float:
    """Peak in GB (10⁹ bytes)."""
    config = SpeculatorConfig(
        method="sum_lstm",
        n_predict=depths,
        inner_dim=width,
        emb_dim=width,
        proj_dim=width,
        tie_lstm_embs=True,
    )
    with FakeTensorMode():
        speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, dtype=torch.bfloat16)
        hidden = torch.empty(rows, width, dtype=torch.bfloat16)
        tokens, targets = (torch.empty(rows, depths, dtype=torch.long) for _ in range(2))
        valid = torch.ones(rows, depths, dtype=torch.bool)
        account = Account()
        for tensor in (hidden, tokens, targets, valid, *speculator.parameters()):
            account.seen[tensor.untyped_storage()._cdata] = None  # there before, and not counted
        with account:
            if impl == "ours":
                loss, _ = speculator_loss(speculator, hidden, tokens, targets, valid)
            else:
                loss = plain_loss(speculator, hidden, tokens, targets, valid)
            loss.backward()
    return account.peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--impl", choices=["ours", "plain", "both"], default="both")
    parser.add_argument("--growth", action="store_true", help="K and V around the first setting")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training_memory.csv")
    args = parser.parse_args()
    chosen = SETTINGS if args.setting == "all" else {args.setting: SETTINGS[args.setting]}
    if args.growth:
        base = SETTINGS["8b"]
        chosen = {f"8b, K={k}": base | {"depths": k} for k in (1, 3, 5, 8)}
        chosen |= {f"8b, V={v // 1000}k": base | {"vocab": v} for v in (32_000, 64_000, 128_000, 256_000)}
    where, console = environment(), Console()
    for name, shape in chosen.items():
        for impl in ("ours", "plain") if args.impl == "both" else (args.impl,):
            peak = round(measure(impl, **shape), 3)
            row = {"setting": name, "impl": impl, **shape, "dtype": "bfloat16", "by": "fake tensors", "peak_gb": peak}
            append_rows(args.out, [row | where])
            console.print(f"{name}: {impl} {peak:.2f} GB")


if __name__ == "__main__":
    main()
