"""torchrun, except that a user's error which a worker finds ends as it does everywhere: one line, exit code 2.

torchrun itself turns every exit code into 1 and prints a traceback of its own below the worker's line.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """torchrun's own arguments, from the command line."""
    # Says a second time, in torch's words, what the worker or the report of ChildFailedError says.
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
