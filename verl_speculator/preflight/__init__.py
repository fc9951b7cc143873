"""Checks of a training run, before the base model loads and before anything is written.

They run in one light process, from the cheapest to the most expensive. Each raises `UserError` with one line.
"""

from __future__ import annotations

from verl_speculator.config.hydra import RunConfig
from verl_speculator.preflight.base_model import check_base, check_checkpoints
from verl_speculator.preflight.data import check_cache, check_data, check_rows
from verl_speculator.preflight.settings import (
    check_batch,
    check_device,
    check_loggers,
    check_optimizer,
    check_settings,
)

__all__ = ["check_run"]


def check_run(
    run: RunConfig, *, processes: int, processes_per_node: int, first_node: bool = True, read_rows: bool = True
) -> None:
    """Check everything that can be wrong with a run.

    Args:
        run: from `config.hydra.load_run_config`.
        processes: over all nodes.
        processes_per_node: on this node.
        first_node: whether this machine reads and writes checkpoints and logs.
        read_rows: whether to read every row of the data. A sweep reads those of many runs once.

    Raises:
        UserError: for the first thing that is wrong.
    """
    config = run.tree
    check_settings(run)
    if first_node:
        check_loggers(config)
    check_optimizer(config)
    check_device(run, processes, processes_per_node)
    check_batch(config, processes)
    train, val = check_data(config)
    base = check_base(run)
    if first_node:
        check_checkpoints(run, base, train.count)
    if read_rows and not config.data.custom_cls.get("path"):
        check_rows(config, base, train)
        if val is not None:
            check_rows(config, base, val)
    if first_node:
        check_cache(config, base, train)
