"""Real runs of the trainer, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "run_speculator_training.sh"


def environment(**more: str) -> dict[str, str]:
    """The environment of a run: this interpreter, one thread a process."""
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def overrides(base: Path, train: Path, **settings: Any) -> list[str]:
    """Overrides for a small run; a setting's dots are written as two underscores."""
    small = {
        "model__partial_pretrain": base,
        "data__train_files": train,
        "data__train_batch_size": 8,
        "data__num_workers": 0,
        "trainer__device": "cpu",
        "engine__mixed_precision__param_dtype": "fp32",  # the same numbers on every CPU
        "model__speculator__n_predict": 3,
        "model__speculator__inner_dim": 16,
        "model__speculator__emb_dim": 16,
        "model__speculator__proj_dim": 16,
        "optim__lr": 5e-2,
    }
    merged = {name.replace("__", "."): value for name, value in (small | settings).items()}
    return [f"{name}={value}" for name, value in merged.items()]


def script(*arguments: Any, **more: str) -> subprocess.CompletedProcess:
    """The launcher, from start to end."""
    return subprocess.run([SCRIPT, *map(str, arguments)], env=environment(**more), capture_output=True, text=True)


def train(processes: int, save_path: Path, settings: list[str]) -> dict[int, dict[str, float]]:
    """Train without the launcher's checks; the metrics of every step, from verl's file logger.

    One process trains in this one, which saves ten seconds of imports, unless it is in a process group.
    """
    log = save_path.with_suffix(".jsonl")
    options = [f"trainer.default_local_dir={save_path}", "trainer.logger=file", *settings]
    if processes == 1 and not dist.is_initialized():
        train_here(options, log)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "verl_speculator.train", *options]
        result = subprocess.run(
            command, env=environment(VERL_FILE_LOGGER_PATH=str(log)), capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return read_log(log)


def train_here(options: list[str], log: Path) -> None:
    """The training of a single process that torchrun started, in this process."""
    from verl_speculator.train import train as train_with

    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, variables | {"VERL_FILE_LOGGER_PATH": str(log)}):
        try:
            train_with(options)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def read_log(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, as verl's file logger writes them."""
    return {entry["step"]: entry["data"] for entry in map(json.loads, path.read_text().splitlines())}
