"""verl's engine with a speculator in one process or several: builds it, feeds it, reads its gradients.

Run by torchrun it writes gradients: `torchrun engine_harness.py <parquet> <out> <cases>`, cases in JSON: pairs of a
base model and model.speculator settings.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group(folder: Path):
    """A gloo group of this one process."""
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def build_engine(
    base: Path | str,
    *,
    steps: int = 10,
    lr: float = 1e-3,
    param_dtype: str = "fp32",
    model_dtype: str | None = None,
    forward_only: bool = False,
    initialize: bool = True,
    strategy: str = "fsdp2",
    attention: str = "sdpa",
    **model_settings: Any,
):
    """An engine on the CPU, initialised unless told not to be; `speculator` holds the model.speculator keys."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
    from verl.workers.engine import EngineRegistry

    import verl_speculator.training.plugin
    from verl_speculator.training.model_config import SpeculatorModelConfig

    assert verl_speculator.training.plugin
    speculator = {"n_predict": 3, "inner_dim": 16, "emb_dim": 16, "proj_dim": 16} | model_settings.pop("speculator", {})
    precision = {"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = EngineRegistry.new(
        model_type="language_model_with_speculator",
        backend=strategy,
        model_config=SpeculatorModelConfig(
            path=str(base), override_config={"attn_implementation": attention}, speculator=speculator, **model_settings
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            mixed_precision=precision,
            model_dtype=model_dtype or param_dtype,
            forward_only=forward_only,
            seed=1,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=lr, total_training_steps=steps),
        checkpoint_config=CheckpointConfig(),
    )
    if initialize:
        engine.initialize()
    return engine


def load_rows(parquet: Path | str, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Tokenized conversations, through verl's own dataset."""
    from omegaconf import OmegaConf

    from verl_speculator.data.dataset import build_dataset

    config = OmegaConf.create(
        {
            "messages_key": "messages",
            "text_key": "text",
            "pad_mode": "no_padding",
            "max_length": 256,
            "truncation": "error",
            "custom_cls": {"path": None},
            "tools_key": "tools",
            "thinking_targets": True,
        }
    )
    dataset = build_dataset([str(parquet)], config, tokenizer, None, -1)
    return [dataset[i] for i in range(len(dataset))]


def make_batch(
    rows: list[dict[str, torch.Tensor]], *, micro: int = 4, packed: bool = True, max_tokens: int | None = None
):
    """This rank's share of a global batch, as the trainer makes it; with `max_tokens` cut by tokens, not by rows."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator

    mine = rows[dist.get_rank() :: dist.get_world_size()]
    settings = {
        "use_remove_padding": packed,
        "use_dynamic_bsz": max_tokens is not None,
        "max_token_len_per_gpu": max_tokens,
        "micro_batch_size_per_gpu": micro,
        "temperature": 1.0,
        "global_batch_size": len(rows),
        "pad_mode": DatasetPadMode.NO_PADDING,
        "pad_token_id": 0,
    }
    batch = SFTTensorCollator(DatasetPadMode.NO_PADDING)(mine)
    return tu.get_tensordict(tensor_dict=batch, non_tensor_dict=settings)


def run_batch(engine, batch, *, train: bool = True) -> dict[str, Any]:
    """Forward and, when training, backward over a batch; what the engine reports of it."""
    from verl.workers.utils.losses import sft_loss

    loss = partial(sft_loss, config=None)
    mode = engine.train_mode(zero_grad_on_exit=False) if train else engine.eval_mode()
    with mode, torch.set_grad_enabled(train):
        if train:
            engine.optimizer_zero_grad()
        return engine.forward_backward_batch(batch, loss, forward_only=not train)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(engine) -> dict[str, torch.Tensor]:
    """Every gradient there is, gathered, by parameter name."""
    named = engine.module.named_parameters()
    return {name: whole(p.grad).detach().clone() for name, p in named if p.grad is not None}


def weights(engine) -> dict[str, torch.Tensor]:
    """Every parameter, gathered, by name."""
    return {name: whole(p).detach().clone() for name, p in engine.module.named_parameters()}


def gradients_of_every_cut(base: str, parquet: str, speculator: dict[str, Any]) -> dict[tuple, dict[str, torch.Tensor]]:
    """Gradients by (joint, rows of a micro-batch, packed)."""
    result = {}
    for joint in (False, True):
        engine = build_engine(base, freeze_base_model=not joint, speculator=speculator)
        # Chunks as small as these, so that the ranks have different numbers of them.
        engine.draft.chunk_rows = 5
        rows = load_rows(parquet, engine.model_config.tokenizer)[:16]
        for micro in (1, 4):
            for packed in (True, False):
                run_batch(engine, make_batch(rows, micro=micro, packed=packed))
                result[joint, micro, packed] = gradients(engine)
    return result


if __name__ == "__main__":
    os.environ["VERL_PLATFORM"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [gradients_of_every_cut(base, sys.argv[1], settings) for base, settings in json.loads(sys.argv[3])]
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
