"""The training process that torchrun starts: `torchrun -m verl_speculator.train [hydra overrides]`.

`run_speculator_training.sh` checks everything first, in a process of its own, and then starts this by `torchrun`.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from verl_speculator.config.hydra import common_overrides, compute_dtype, load_settings
from verl_speculator.utils.process import INTERRUPTED, StopRequest, end_with_parent, quiet_prints
from verl_speculator.utils.settings import UserError

# Read by verl, before it looks for a device; the second because verl would use flash-attn's loss if it is installed.
CPU_ENVIRONMENT = {"VERL_PLATFORM": "cpu", "VERL_DISABLE_FLASH_ATTN_CE": "1"}


def torchrun() -> None:
    """torchrun with its own arguments, except that a user's error in a worker ends it with exit code 2.

    torchrun itself turns every exit code into 1 and prints a traceback below the worker's line.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A worker that is asked to end saves a checkpoint first, for which it may need longer than the 30 seconds after
    # which torchrun would kill it: this process passes the signal on, and waits.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    for number in StopRequest.SIGNALS:
        signal.signal(number, _pass_on)
    # This logger repeats what the worker or the report of ChildFailedError says.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        if (code := error.get_first_failure()[1].exitcode) in (2, INTERRUPTED, -signal.SIGTERM):
            sys.exit(2 if code == 2 else INTERRUPTED)
        raise


def _pass_on(number: int, frame: object) -> None:
    """Send SIGTERM to the workers."""
    import psutil

    for worker in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGTERM)


def train(overrides: Sequence[str]) -> None:
    """Train with these overrides, in a process started by torchrun.

    Raises:
        UserError: for a setting that cannot be used.
    """
    config = load_settings(overrides)
    if config.trainer.device == "cpu":
        os.environ |= CPU_ENVIRONMENT
    importlib.import_module("verl_speculator.training.plugin")  # registers platform and engine, and fails loudly
    import torch.distributed
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from verl_speculator.training.platform_cpu import start_process_group
    from verl_speculator.training.trainer import SpeculatorTrainer

    start_process_group()
    if not torch.distributed.is_initialized():
        initialize_global_process_group()
    # By name, because this module is __main__ when torchrun starts it.
    logging.getLogger("verl_speculator.train").info(
        "device %s, compute type %s, attention %s",
        config.trainer.device,
        compute_dtype(config),
        config.model.override_config.attn_implementation,
    )
    with quiet_prints():
        trainer = SpeculatorTrainer(config)
    trainer.fit()
    destroy_global_process_group()


def run_command(
    function: Callable[[Sequence[str]], None],
    usage: str,
    argv: Sequence[str] | None,
    *,
    log_level: int = logging.INFO,
    error_delay: float = 0,
) -> None:
    """Call a function with the arguments of the command line; a user's error is one line and exit code 2.

    Args:
        function: takes Hydra overrides.
        usage: the text for `--help`.
        argv: the arguments; None for those of this process.
        log_level: of this package's log lines.
        error_delay: seconds until the error is printed.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(usage)
        return
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("verl_speculator").setLevel(log_level)
    try:
        function(arguments)
    except UserError as error:
        time.sleep(error_delay)
        # Ray wraps an error of a worker in one whose text has the traceback, and whose cause is the error itself.
        sys.stderr.write(f"error: {getattr(error, 'cause', error)}\n")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train`. A rank above 0 waits before it prints: rank 0 reports the same error and torchrun ends the rest."""
    end_with_parent()  # else a worker, which has its own session, would outlive a killed torchrun
    level, delay = (logging.WARNING, 30) if int(os.environ.get("RANK", 0)) else (logging.INFO, 0)
    run_command(train, f"{__doc__}\n{common_overrides()}", argv, log_level=level, error_delay=delay)


if __name__ == "__main__":
    main()
