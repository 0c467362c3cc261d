"""Run torchrun, but keep exit codes and signals: `python -m opd_titan.cli.launch [options] ...`.

torchrun turns every failure into exit code 1 and a long traceback. So it hides the exit codes 2
(wrong input) and 75 (stopped by a signal; start again). On SIGTERM torchrun kills the workers after
30 seconds, but a step and its checkpoint may take longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from opd_titan.cli.start import worker_environment
from opd_titan.distributed.heartbeat import FOLDER, phase_of
from opd_titan.errors import print_error

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
# The agent sends SIGKILL 30 s after its SIGTERM; the times that it keeps are whole seconds.
_SECONDS_TO_AGENTS_SIGKILL = 25


def main(argv: list[str]) -> int:
    """Run the workers. Return the exit code of the worker that failed first."""
    # The agent logs its own traceback for every failed worker.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # When all workers are done, the node that hosts the store may exit a moment before the others.
    logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(
        lambda record: "exit barrier" not in str(record.msg)
    )
    for number in FORWARDED:
        signal.signal(number, _forward)
    # If the folder cannot be deleted, the exit code must still be returned.
    with tempfile.TemporaryDirectory(prefix="opd_titan-", ignore_cleanup_errors=True) as places:
        os.environ[FOLDER] = places
        options = parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv])
        if options.nproc_per_node.isdecimal():
            for name, value in worker_environment(int(options.nproc_per_node)).items():
                os.environ.setdefault(name, value)
        try:
            run(options)
        except ChildFailedError as error:
            return _report(*_first(error.failures))
        except SignalException as error:
            print_error(f"launcher stopped by {error.sigval.name}")
            return 128 + error.sigval
    return 0


def _first(failures: dict[int, Any]) -> tuple[int, Any]:
    """Return the rank and the failure that caused the other failures."""
    begin = min(failure.timestamp for failure in failures.values())
    return min(failures.items(), key=lambda item: _order(item[1], begin))


def _order(failure: Any, begin: int) -> tuple[int, int]:
    """Return a sort key: the failure that caused the others has the smallest.

    Timestamps alone are not enough. The agent ends the remaining ranks with SIGTERM, and after 30 s
    with SIGKILL. The system also sends SIGKILL if memory runs out; then the other ranks report that
    they have lost a rank.

    Args:
        begin: when the first rank failed.
    """
    code, late = failure.exitcode, failure.timestamp - begin >= _SECONDS_TO_AGENTS_SIGKILL
    if code in (2, 75):  # all ranks have agreed on this code
        rank = 0
    elif code > 0:
        rank = 5 if failure.error_file_data.get("follows") else 1
    elif -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        rank = 2
    elif code == -signal.SIGKILL:
        rank = 6 if late else 3
    else:  # an abort is the consequence of a failed collective
        rank = 6 if code == -signal.SIGTERM else 4
    return rank, failure.timestamp


def _report(rank: int, failure: Any) -> int:
    """Print the failure, once for all workers. Return the exit code."""
    code, said = failure.exitcode, failure.error_file_data.get("message")
    if code == 2:
        print_error(failure.message)
    if code in (2, 75):
        return code
    if isinstance(said, str) and said != "<NONE>":  # a Fault, its message names the phase
        print_error(f"rank {rank}: {said}")
    else:
        place = phase_of(rank)
        where = f" in {place}" if place else ""
        how = f"failed with exit code {code}" if code > 0 else f"was ended by {_name(-code)}"
        print_error(f"rank {rank} {how}{where}")
    return 1 if code > 0 else 128 - code


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _forward(number: int, _frame: Any) -> None:
    """Pass a signal on to the workers, which then stop."""
    workers = list(_children())
    if not workers:  # not started yet, or not on Linux: handle it like torchrun
        raise SignalException("no workers to signal", signal.Signals(number))
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children() -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...", where the name may contain any character.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(stat.parent.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
