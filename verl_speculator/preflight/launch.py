"""The launcher behind `run_speculator_training.sh`: check the run in this process, then become torchrun.

The checks run before the base model loads and before anything is written, from the cheapest to the most expensive. Each
raises `UserError` with one line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

import verl_speculator
from verl_speculator.config.hydra import RunConfig, common_overrides, compose, read_recipe, recipe_names, resolve
from verl_speculator.config.schema import ignored_settings
from verl_speculator.preflight.base_model import check_base, check_checkpoints
from verl_speculator.preflight.data import check_cache, check_data, check_rows
from verl_speculator.preflight.settings import check_batch, check_device, check_loggers, check_optimizer, check_settings
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.process import CPU_ALLOCATOR
from verl_speculator.utils.settings import UserError

USAGE = f"""usage: run_speculator_training.sh <nproc_per_node> <save_path> [hydra overrides...]
       verl-speculator train <nproc_per_node> <save_path> [hydra overrides...]

  nproc_per_node   processes on this machine: one per GPU
  save_path        where checkpoints go: <save_path>/global_step_N

  --recipe NAME    overrides that come with the package ({", ".join(recipe_names())}); your own take precedence
  --cfg job        print the resolved configuration and stop
  --version        print the version and stop
  -h, --help       print this and stop

{common_overrides()}
More than one machine: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, or any of torchrun's
own PET_* variables.
"""
# Options of torchrun and the variables that set them, besides the PET_* variables that torchrun reads itself.
TORCHRUN_ENVIRONMENT = {
    f"--{name.lower().replace('_', '-')}": name for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
}
# Prefixes of torchrun's own variables for the rendezvous; others, such as PET_LOG_DIR, do not concern it.
RENDEZVOUS = ("PET_RDZV_", "PET_MASTER_", "PET_NODE_RANK", "PET_STANDALONE")


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


def torchrun_command(processes: int, overrides: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of torchrun for this machine."""
    command = [sys.executable, "-c", "from verl_speculator.train import torchrun; torchrun()"]
    command.append(f"--nproc-per-node={processes}")
    return [*command, *_rendezvous(environment), "-m", "verl_speculator.train", *overrides]


def _rendezvous(environment: Mapping[str, str]) -> list[str]:
    """torchrun's options for the rendezvous; it reads the PET_* variables itself."""
    if node_count(environment) > 1:
        return [f"{option}={environment[name]}" for option, name in TORCHRUN_ENVIRONMENT.items() if name in environment]
    # One machine needs no address: a scheduler or an outer job may have left MASTER_* variables in the environment.
    return [] if any(name.startswith(RENDEZVOUS) for name in environment) else ["--standalone"]


def node_count(environment: Mapping[str, str]) -> int:
    """Number of machines; the largest of an elastic `min:max`."""
    text = environment.get("NNODES", environment.get("PET_NNODES", "1")).rpartition(":")[2]
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UserError(f"NNODES={text}: expected a number of machines")
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environment]
    if "NNODES" in environment and int(text) > 1 and missing and not any(n.startswith("PET_") for n in environment):
        raise UserError(f"NNODES={text}: set {' and '.join(missing)} too, or torchrun's own PET_* variables")
    port = environment.get("MASTER_PORT", "29500")
    if int(text) > 1 and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535, the same on every machine")
    return int(text)


def worker_environment(device: str, processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the workers; on a CPU with a thread count and an allocator, unless these are set."""
    if device != "cpu":
        return dict(environment)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(threads)} | CPU_ALLOCATOR | dict(environment)


def parse_arguments(argv: Sequence[str]) -> tuple[int, Path, list[str]]:
    """Processes per node, save path and overrides."""
    if len(argv) < 2 or any(re.match(r"[+~]*\w+(\.\w+)+=", argument) for argument in argv[:2]):
        raise UserError(f"expected <nproc_per_node> <save_path>, got {' '.join(argv[:2]) or 'nothing'}\n\n{USAGE}")
    if not (argv[0].isascii() and argv[0].isdigit()) or int(argv[0]) < 1:
        raise UserError(f"nproc_per_node={argv[0]}: expected a positive integer")
    save_path = Path(argv[1]).expanduser()
    check_writable(f"save_path={argv[1]}", save_path)
    return int(argv[0]), save_path, list(argv[2:])


def _take_option(argv: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The other arguments, and the values of an option, `--option VALUE` or `--option=VALUE`."""
    others, values, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == option:
            values.append(next(arguments, ""))
        elif argument.startswith(f"{option}="):
            values.append(argument.removeprefix(f"{option}="))
        else:
            others.append(argument)
    return others, values


def launch(argv: Sequence[str]) -> None:
    """Check the run and replace this process by torchrun."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        sys.stdout.write(f"verl_speculator {verl_speculator.__version__}\n")
        return
    arguments, show = _take_option(argv, "--cfg")
    arguments, recipes = _take_option(arguments, "--recipe")
    processes, save_path, overrides = parse_arguments(arguments)
    overrides = [override for name in recipes for override in read_recipe(name)] + overrides
    if any(override.lstrip("+").startswith("trainer.default_local_dir=") for override in overrides):
        raise UserError("trainer.default_local_dir: this is <save_path>, the second argument")
    quoted = str(save_path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    overrides.append(f"trainer.default_local_dir='{quoted}'")

    config = compose(overrides)
    speculator = config.model.speculator  # as given: resolving replaces it
    run = resolve(config)
    if ignored := ignored_settings(OmegaConf.to_container(speculator)):
        method = run.speculator.config.method
        sys.stderr.write(f"note: model.speculator.method={method} does not read {', '.join(ignored)}: ignored\n")
    if show:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    check_run(
        run,
        processes=processes * node_count(os.environ),
        processes_per_node=processes,
        # Only the first machine reads checkpoints; the others' disks need not hold them.
        first_node=os.environ.get("NODE_RANK", os.environ.get("PET_NODE_RANK", "0")) == "0",
    )
    command = torchrun_command(processes, overrides, os.environ)
    sys.stdout.flush()
    os.execve(command[0], command, worker_environment(config.trainer.device, processes, os.environ))


def main() -> None:
    """Console entry: a user's error is one line and exit code 2."""
    try:
        launch(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
