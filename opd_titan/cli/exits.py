"""Exit codes of the programs, and one line on stderr for each expected error."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opd_titan.errors import Fault, LostOthers, OneLineError, UserError, print_error


def exit_code(job: Callable[[], int]) -> int:
    """Run a job and return its exit code. Print an expected error in one line."""
    try:
        return job()
    except UserError as error:
        _report(error)
        return 2
    except Fault as error:
        _report(error)
        return 1


def _report(error: OneLineError) -> None:
    """Print one line on stderr, or give it to the launcher, which prints it once for all ranks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        message = {"message": str(error), "timestamp": int(time.time())}
        message["follows"] = isinstance(error, LostOthers)
        try:
            Path(path).write_text(json.dumps(message), encoding="utf-8")
            return
        except OSError:  # no space: print it here, and remove the partial file
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)
    print_error(error)


def _leave(code: int) -> None:
    """Exit at once, without the end of the interpreter.

    A failed rank must not wait for threads (a background save, NCCL) that wait for other ranks.
    Threads of libraries may also need the interpreter while it ends. One of several hundred
    finished processes aborted there ("terminate called without an active exception").
    """
    if code != 1 and "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(code)


def run_and_leave(main: Callable[[list[str]], int]) -> None:
    """Run a program's `main` on the command line, and exit with its code."""
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    _leave(code)
