"""Training on a Ray cluster, for more than one machine without torchrun on each of them.

    python -m verl_speculator.train_ray trainer.default_local_dir=DIR trainer.nnodes=2 trainer.n_gpus_per_node=8 [...]

The settings and the checkpoints are those of `run_speculator_training.sh`, whose checks run first. Joins the cluster of
`RAY_ADDRESS`, and starts one on this machine without it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from verl_speculator.config.hydra import common_overrides, load_run_config
from verl_speculator.preflight.launch import check_run, worker_environment
from verl_speculator.preflight.settings import check_settings
from verl_speculator.train import CPU_ENVIRONMENT, run_command
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.process import quiet_prints
from verl_speculator.utils.settings import UserError


def train(overrides: Sequence[str]) -> None:
    """Check everything, then train with these overrides.

    Raises:
        UserError: for the first thing that is wrong.
    """
    run = load_run_config(overrides)
    settings = run.tree.trainer
    if OmegaConf.is_missing(settings, "default_local_dir"):
        raise UserError("trainer.default_local_dir: expected a directory for checkpoints, which all machines share")
    directory = Path(settings.default_local_dir).expanduser().absolute()
    check_writable(f"trainer.default_local_dir={settings.default_local_dir}", directory)
    settings.default_local_dir = str(directory)  # workers may have another working directory
    check_settings(run)  # the next line multiplies two of them
    processes = settings.nnodes * settings.n_gpus_per_node
    check_run(run, processes=processes, processes_per_node=settings.n_gpus_per_node)
    variables = worker_environment(settings.device, settings.n_gpus_per_node, os.environ)
    if settings.device == "cpu":
        variables |= CPU_ENVIRONMENT
        os.environ |= CPU_ENVIRONMENT
    added = {name: value for name, value in variables.items() if name not in os.environ or name.startswith("VERL_")}
    importlib.import_module("verl_speculator.training.plugin")  # after VERL_PLATFORM
    import ray
    import torch.distributed as dist

    from verl_speculator.training.ray_worker import RaySpeculatorTrainer

    resources = {}
    if settings.device == "cpu" and "RAY_ADDRESS" not in os.environ:
        resources["num_cpus"] = max(processes, os.cpu_count() or 1)  # each worker asks for one CPU
    ray.init(runtime_env={"env_vars": added}, include_dashboard=False, **resources)
    # The trainer's own group, of one process.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with quiet_prints():
            trainer = RaySpeculatorTrainer(run.tree)
        trainer.fit()
    finally:
        dist.destroy_process_group()
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`."""
    run_command(train, f"{__doc__}\n{common_overrides()}", argv)


if __name__ == "__main__":
    main()
