"""Peak memory of the speculator's loss, forward and backward, without parameters, optimizer and base model.

    python benchmarks/training_memory.py [--setting 8b|long|all] [--impl ours|plain|both] [--out FILE.csv]
    python benchmarks/training_memory.py --growth            # K = 1 … 8 and V = 32k … 256k
    python benchmarks/training_memory.py --heads --impl ours --loss kl     # draft vocabularies, the base model's tables
    python benchmarks/training_memory.py --eagle3 --loss kl                # all of eagle3's draft, with its attention
    python benchmarks/training_memory.py --by cuda           # on a GPU, from CUDA's allocator

Counted on fake tensors: every allocation and release is counted and none is made, so no GPU is needed. The gradients of
the parameters count; the parameters and the hidden states of the base model do not. `plain` is the usual loop:
all rows through all depths, K blocks of logits stacked, cross-entropy, autograd. With --eagle3 both attend without
keeping scores, as flash attention does; `plain` keeps all else, and the logits of all depths.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from dataclasses import replace
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
from verl_speculator.models import DraftState, Speculator, eagle3

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    # ArcticTraining's llama3.1-8b.yaml: 64 sequences of 256 tokens.
    "8b": {"rows": 64 * 256, "depths": 3, "vocab": 128256, "width": 4096},
    "long": {"rows": 8 * 2048, "depths": 3, "vocab": 151936, "width": 4096},
}
# 8 sequences of 2,048 tokens.
EAGLE3 = {"rows": 8 * 2048, "documents": 8, "depths": 7, "vocab": 128256, "draft_vocab_size": 32_000, "width": 4096}


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes held by all storages allocated while the mode is active: current and peak."""

    def __init__(self) -> None:
        super().__init__()
        self.tracked: dict[int, Any] = {}
        self.current = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.track(tensor.untyped_storage())
        return result

    def track(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is released."""
        key = storage._cdata
        if key in self.tracked:
            return
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)

        def release() -> None:
            self.current -= size
            del self.tracked[key]

        self.tracked[key] = weakref.finalize(storage, release)


def plain_loss(speculator: Speculator, hidden: Tensor, tokens: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The usual loop: unroll, stack all logits, cross-entropy of each depth in float32."""
    states = speculator.unroll(hidden, tokens)
    logits = torch.stack([state @ speculator.head(k).T for k, state in enumerate(states)])
    losses = []
    for k, depth in enumerate(logits):
        target = torch.where(valid[:, k], targets[:, k], -100)
        losses.append(F.cross_entropy(depth.float(), target))
    return torch.stack(losses).mean()


def run(
    impl: str, loss: str, shape: dict[str, int], device: str, allocations: AllocationCounter | None
) -> Callable[[], None]:
    """Allocate the inputs and return a function that runs the loss forward and backward."""
    rows, depths, vocab, width = (shape[name] for name in ("rows", "depths", "vocab", "width"))
    widths = {"inner_dim": width, "emb_dim": width, "proj_dim": width}
    heads = {name: shape[name] for name in ("draft_vocab_size", "embedding", "head") if name in shape}
    config = SpeculatorConfig(method="sum_lstm", n_predict=depths, tie_lstm_embs=True, **widths, **heads)
    half = {"dtype": torch.bfloat16, "device": device}
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, **half)
    hidden, head = torch.randn(rows, width, **half), torch.randn(vocab, width, **half)
    tokens, targets = (torch.randint(vocab, (rows, depths), device=device) for _ in range(2))
    valid = torch.ones(rows, depths, dtype=torch.bool, device=device)
    later = torch.arange(rows, device=device)[:, None] + torch.arange(depths, device=device)
    teacher = {"teacher_hidden": hidden, "teacher_rows": later.clamp(max=rows - 1), "base_head": head}
    if config.frozen_tables:
        part = head if config.draft_vocab_size is None else torch.randn(config.draft_vocab_size, width, **half)
        teacher["tables"] = {"emb.first.weight": head, "heads.0.weight": part}
    if allocations is not None:
        for tensor in (hidden, head, tokens, targets, valid, teacher["teacher_rows"], *speculator.parameters()):
            allocations.tracked[tensor.untyped_storage()._cdata] = None  # allocated before: not counted

    def call() -> None:
        if impl == "plain":
            plain_loss(speculator, hidden, tokens, targets, valid).backward()
        else:
            speculator_loss(speculator, hidden, tokens, targets, valid, **teacher, loss=loss)[0].backward()

    return call


def run_eagle3(
    impl: str, loss: str, shape: dict[str, int], device: str, allocations: AllocationCounter | None
) -> Callable[[], None]:
    """As `run`: Llama-3.1-8B's shapes, documents of equal length, every token with all its targets."""
    rows, depths, vocab, width = (shape[name] for name in ("rows", "depths", "vocab", "width"))
    count, length = shape["documents"], rows // shape["documents"]
    layer = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336}
    layer |= {"rms_norm_eps": 1e-5, "rope": {"rope_type": "default", "rope_theta": 5e5}, "positions": length}
    config = SpeculatorConfig(
        method="eagle3",
        n_predict=depths,
        draft_vocab_size=shape["draft_vocab_size"],
        embedding="base_frozen",
        aux_layers=[2, 16, 29],
        layer=layer,
    )
    half = {"dtype": torch.bfloat16, "device": device}
    speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, **half)
    states, head = torch.randn(rows, 3 * width, **half), torch.randn(vocab, width, **half)
    hidden, table = torch.randn(rows, width, **half), torch.randn(vocab, width, **half)
    following = torch.randint(vocab, (rows,), device=device)
    tokens, targets = (torch.randint(vocab, (rows, depths), device=device) for _ in range(2))
    valid = torch.ones(rows, depths, dtype=torch.bool, device=device)
    index = torch.arange(rows, device=device)
    later = (index[:, None] + torch.arange(depths, device=device)).clamp(max=rows - 1)
    teacher = {"teacher_hidden": hidden, "teacher_rows": later, "base_head": head}
    if allocations is not None:
        for tensor in (states, head, hidden, table, following, tokens, targets, valid, index, later):
            allocations.tracked[tensor.untyped_storage()._cdata] = None
        for tensor in speculator.parameters():
            allocations.tracked[tensor.untyped_storage()._cdata] = None
    spans = [
        eagle3.Span(start + first, start + first + eagle3.BLOCK, start, start + first + eagle3.BLOCK)
        for start in range(0, count * length, length)
        for first in range(0, length, eagle3.BLOCK)
    ]
    prefix = eagle3.Prefix(index % length, lambda ids: F.embedding(ids, table), index, spans, recomputes=True)

    def call() -> None:
        if impl == "plain":
            fused, entries = speculator.enter(
                states, following, prefix, lambda _, new: new.permute(1, 2, 0, 3).unbind()
            )
            state, steps = DraftState(fused, None, 0, sequence=replace(prefix, entries=entries)), []
            for token in tokens.unbind(1):
                state = speculator.step(state, token)
                steps.append(state.carried)
            inputs = torch.stack(steps, dim=1)
            plain_loss(speculator, inputs, tokens, targets % config.draft_vocab_size, valid).backward()
        else:
            inputs = speculator.sequence_states(states, following, tokens, prefix, prefix)
            more = {"tables": {}} | (teacher if loss != "ce" else {})
            speculator_loss(speculator, inputs, tokens, targets, valid, loss=loss, **more)[0].backward()

    return call


def measure(impl: str, loss: str, shape: dict[str, int], by: str) -> float:
    """Peak in GB (10⁹ bytes), counted on fake tensors or read from CUDA's allocator."""
    prepare = run_eagle3 if "documents" in shape else run
    if by == "cuda":
        call = prepare(impl, loss, shape, "cuda", None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    with FakeTensorMode():
        allocations = AllocationCounter()
        call = prepare(impl, loss, shape, "cpu", allocations)
        with allocations:
            call()
    return allocations.peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--impl", choices=["ours", "plain", "both"], default="both")
    parser.add_argument("--loss", default="ce", help="loss of speculator_loss; the plain loop always uses ce")
    parser.add_argument("--by", choices=["fake", "cuda"], default="fake", help="cuda needs a GPU with enough memory")
    parser.add_argument("--growth", action="store_true", help="vary K and V around the first setting")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training_memory.csv")
    parser.add_argument("--heads", action="store_true", help="smaller heads and the base model's tables, first setting")
    parser.add_argument("--eagle3", action="store_true", help="eagle3 instead of sum_lstm")
    args = parser.parse_args()
    chosen = SETTINGS if args.setting == "all" else {args.setting: SETTINGS[args.setting]}
    if args.growth:
        base = SETTINGS["8b"]
        chosen = {f"8b, K={k}": base | {"depths": k} for k in (1, 3, 5, 8)}
        chosen |= {f"8b, V={v // 1000}k": base | {"vocab": v} for v in (32_000, 64_000, 128_000, 256_000)}
    if args.heads:
        base, frozen = SETTINGS["8b"], {"embedding": "base_frozen", "head": "base_frozen"}
        chosen = {"8b": base, "8b, V'=32000": base | {"draft_vocab_size": 32_000}}
        chosen |= {"8b, V'=8192": base | {"draft_vocab_size": 8192}, "8b, base_frozen": base | frozen}
        chosen["8b, base_frozen, V'=8192"] = base | frozen | {"draft_vocab_size": 8192}
    if args.eagle3:
        chosen = {"eagle3, 8b": EAGLE3}
    where, console = environment(), Console()
    for name, shape in chosen.items():
        for impl in ("ours", "plain") if args.impl == "both" else (args.impl,):
            peak = round(measure(impl, args.loss, shape, args.by), 3)
            numbers = {name: shape[name] for name in ("rows", "depths", "vocab", "width")}
            row = {"setting": name, "impl": impl, "loss": args.loss if impl == "ours" else "ce", **numbers}
            row |= {"dtype": "bfloat16", "by": args.by, "peak_gb": peak}
            append_rows(args.out, [row | where])
            console.print(f"{name}: {impl} {peak:.2f} GB")


if __name__ == "__main__":
    main()
