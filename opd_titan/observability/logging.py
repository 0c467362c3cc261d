"""The "opd_titan" logger: rank 0 writes to the console, every rank to its own file."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import suppress
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

from opd_titan.errors import print_error, reason
from opd_titan.observability.progress import Bar

# A log file of this size is renamed to `.log.1` and replaces the previous one.
FILE_BYTES = 64 * 2**20
# Set this environment variable to 1 to see the other ranks on the console too.
ALL_RANKS = "OPD_TITAN_LOG_ALL_RANKS"

_COLORS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}
_ANSI = re.compile(r"\x1b\[\d*m")


def paint(text: str, color: str) -> str:
    """Return the text in a terminal color. Log files and pipes get the text without color."""
    return f"\x1b[{_COLORS[color]}m{text}\x1b[0m"


class _ConsoleHandler(logging.Handler):
    """Write to the current `sys.stdout` through tqdm, which prints above a progress bar."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO)
        self.prefix = f"rank {rank}: " if rank else ""
        self.color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # no-color.org

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.prefix + self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
                text = paint(text, "red" if record.levelno >= logging.ERROR else "yellow")
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            line = f"[{clock}] {text}"
            Bar.write(line if self.color else _ANSI.sub("", line), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


class _FileHandler(RotatingFileHandler):
    """Report a full disk once. Python would print a traceback for every line."""

    reported = False

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            print_error(f"{self.baseFilename}: lines are missing: {reason(error)}")

    def close(self) -> None:
        with suppress(OSError):  # `handleError` has reported it
            super().close()


def init_logging(dump_folder: Path | None, rank: int) -> logging.Logger:
    """Set up and return the "opd_titan" logger. Another call replaces the handlers.

    The console shows INFO and above as `[HH:MM:SS] message`, in color on a terminal unless
    NO_COLOR is set, on rank 0 only unless OPD_TITAN_LOG_ALL_RANKS is 1. The file
    `<dump_folder>/logs/rank-N.log` gets DEBUG and above with full timestamps and is appended to on
    resume. It and one older file, `rank-N.log.1`, take at most `FILE_BYTES` each.

    Args:
        dump_folder: None keeps the lines in memory; the next call writes them to its file.
    """
    # This logger warns on each rank, at every export, that two axes are gathered in turn.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    logger = logging.getLogger("opd_titan")
    logger.setLevel(logging.DEBUG)
    # Some libraries call logging.basicConfig(). The root logger would then print each line again.
    logger.propagate = False
    file: logging.Handler
    if dump_folder is None:
        file = MemoryHandler(capacity=0)  # without a target it keeps all lines
    else:
        path = Path(dump_folder) / "logs" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(
            path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for old in list(logger.handlers):
        if isinstance(old, MemoryHandler):
            old.setTarget(file)
        logger.removeHandler(old)
        old.close()
    if rank == 0 or os.environ.get(ALL_RANKS, "0") not in ("", "0"):
        logger.addHandler(_ConsoleHandler(rank))
    logger.addHandler(file)
    return logger
