"""torchrun, except that a user's error in a worker ends in one line and exit code 2, as it does everywhere else.

torchrun itself turns every exit code into 1 and prints a traceback below the worker's line.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun with its own arguments from the command line."""
    # This logger repeats what the worker or the report of ChildFailedError says.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode == 2:
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
