"""The training process that torchrun starts: `torchrun -m verl_speculator.train [hydra overrides]`.

`run_speculator_training.sh` checks everything first, in a process of its own, and then starts this.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence

from verl_speculator.config.hydra import common_overrides, compute_dtype, load_settings
from verl_speculator.utils.errors import UserError
from verl_speculator.utils.process import end_with_parent


def train(overrides: Sequence[str]) -> None:
    """Train with these overrides, in a process started by torchrun.

    Raises:
        UserError: for a setting that cannot be used.
    """
    config = load_settings(overrides)
    if config.trainer.device == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"  # before verl looks for a device
        os.environ["VERL_DISABLE_FLASH_ATTN_CE"] = "1"  # verl would use flash-attn's loss if it is installed
    importlib.import_module("verl_speculator.training.plugin")  # registers platform and engine, and fails loudly
    import torch.distributed
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from verl_speculator.training.trainer import SpeculatorTrainer

    if config.trainer.device == "cpu":
        torch.distributed.init_process_group("gloo")  # verl would ask for "cpu:gloo,cpu:gloo"
    else:
        initialize_global_process_group()
    # By name, because this module is __main__ when torchrun starts it.
    logging.getLogger("verl_speculator.train").info(
        "device %s, compute type %s, attention %s",
        config.trainer.device,
        compute_dtype(config),
        config.model.override_config.attn_implementation,
    )
    SpeculatorTrainer(config).fit()
    destroy_global_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`; a user's error is one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{__doc__}\n{common_overrides()}")
        return
    end_with_parent()  # else a worker, which has its own session, would outlive a killed torchrun
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("verl_speculator").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        train(arguments)
    except UserError as error:
        if rank:
            time.sleep(30)  # rank 0 reports the same error; torchrun then ends this process
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
