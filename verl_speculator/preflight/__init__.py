"""Everything that can be wrong with a training run, found before the base model loads and before anything is written.

The checks run in one light process, from the cheapest to the dearest. Each raises `UserError` with one line.
"""

from __future__ import annotations

from omegaconf import DictConfig

from verl_speculator.preflight.base_model import check_base, check_checkpoints
from verl_speculator.preflight.data import check_cache, check_data, check_rows
from verl_speculator.preflight.loggers import check_loggers
from verl_speculator.preflight.optimizer import check_optimizer
from verl_speculator.preflight.settings import check_batch, check_device, check_settings

__all__ = ["check_run"]


def check_run(
    config: DictConfig, *, processes: int, processes_per_node: int, first_node: bool = True, read_rows: bool = True
) -> None:
    """All checks of a resolved configuration.

    Args:
        config: from `settings.load_settings`.
        processes: over all nodes.
        processes_per_node: on this one.
        first_node: whether this machine is the one that reads and writes checkpoints and logs.
        read_rows: whether to read every row of the data; a sweep reads those of many runs once.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_settings(config)
    if first_node:
        check_loggers(config)
    check_optimizer(config)
    check_device(config, processes, processes_per_node)
    check_batch(config, processes)
    train, val = check_data(config)
    base = check_base(config)
    if first_node:
        check_checkpoints(config, base, train.count)
    if read_rows and not config.data.custom_cls.get("path"):
        check_rows(config, base, train, "data.train_files")
        if val is not None:
            check_rows(config, base, val, "data.val_files")
    if first_node:
        check_cache(config, base, train)
