"""Training on a Ray cluster, for more than one machine without torchrun on each of them.

    python -m verl_speculator.train_ray trainer.default_local_dir=DIR trainer.nnodes=2 trainer.n_gpus_per_node=8 [...]

The settings and the checkpoints are those of `run_speculator_training.sh`, whose checks run first. Joins the cluster of
`RAY_ADDRESS`, and starts one on this machine without it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from verl_speculator.config.hydra import common_overrides, load_settings
from verl_speculator.preflight import check_run
from verl_speculator.preflight.launch import worker_environment
from verl_speculator.preflight.settings import check_settings
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError


def train(overrides: Sequence[str]) -> None:
    """Check everything, then train as the overrides say.

    Raises:
        UserError: for anything that the user can mend.
    """
    config = load_settings(overrides)
    settings = config.trainer
    if OmegaConf.is_missing(settings, "default_local_dir"):
        raise UserError("trainer.default_local_dir: expected a directory for checkpoints, which all machines share")
    directory = Path(settings.default_local_dir).expanduser().absolute()
    check_writable(f"trainer.default_local_dir={settings.default_local_dir}", directory)
    settings.default_local_dir = str(directory)  # workers may stand elsewhere
    check_settings(config)  # the next line multiplies two of them
    processes = settings.nnodes * settings.n_gpus_per_node
    check_run(config, processes=processes, processes_per_node=settings.n_gpus_per_node)
    own = worker_environment(settings.device, settings.n_gpus_per_node, os.environ)
    if settings.device == "cpu":
        own |= {"VERL_PLATFORM": "cpu", "VERL_DISABLE_FLASH_ATTN_CE": "1"}
        os.environ |= {name: own[name] for name in ("VERL_PLATFORM", "VERL_DISABLE_FLASH_ATTN_CE")}
    added = {name: value for name, value in own.items() if name not in os.environ or name.startswith("VERL_")}
    importlib.import_module("verl_speculator.training.plugin")  # after VERL_PLATFORM
    import ray
    import torch.distributed as dist

    from verl_speculator.training.ray_worker import RaySpeculatorTrainer

    here = {}
    if settings.device == "cpu" and "RAY_ADDRESS" not in os.environ:
        here["num_cpus"] = max(processes, os.cpu_count() or 1)  # a worker takes one, whatever there is
    ray.init(runtime_env={"env_vars": added}, include_dashboard=False, **here)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the trainer's, who is alone
    try:
        RaySpeculatorTrainer(config).fit()
    finally:
        dist.destroy_process_group()
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`; a user's error is one line and exit code 2."""
    given = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(given):
        sys.stdout.write(f"{__doc__}\n{common_overrides()}")
        return
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("verl_speculator").setLevel(logging.INFO)
    try:
        train(given)
    except UserError as error:
        # Of an error in a worker Ray makes one that has the traceback in its text, and the error itself as its cause.
        sys.stderr.write(f"error: {getattr(error, 'cause', error)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
