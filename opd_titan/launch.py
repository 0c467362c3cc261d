"""`torchrun` that keeps the exit code: `python -m opd_titan.launch [torchrun options] ...`.

torchrun itself turns every failure into exit code 1 and a page of traceback, which would hide what
2 (your input is wrong) and 75 (stopped on a signal, start again) mean.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

KEPT = (2, 75)


def main(argv: list[str]) -> int:
    """Run the workers; the exit code of the one that failed first."""
    # The agent logs a traceback of its own for every failed worker.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in KEPT:
            return failure.exitcode
        print(f"opd_titan: rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"opd_titan: launcher stopped by {error.sigval.name}", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
