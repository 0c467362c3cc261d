"""The "opd_titan" logger: rank 0 on the console, every rank in its own file."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from opd_titan.errors import reason, tell
from opd_titan.observability.progress import Bar

# A rank's log file becomes `.log.1`, in the place of the one before, when it is this long.
FILE_BYTES = 64 * 2**20
# Where this is 1 in the environment, the other ranks speak on the console too.
ALL_RANKS = "OPD_TITAN_LOG_ALL_RANKS"

_CODES = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}
_ANSI = re.compile(r"\x1b\[\d*m")


def paint(text: str, color: str) -> str:
    """Text in one of the terminal's colours; the handlers take it out where it does not belong."""
    return f"\x1b[{_CODES[color]}m{text}\x1b[0m"


def use_color(color: bool | None = None) -> bool:
    """What was asked; when nothing was, colours on a terminal unless NO_COLOR (no-color.org)."""
    if color is not None:
        return color
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class _ConsoleHandler(logging.Handler):
    """Writes to today's `sys.stdout` through tqdm, which moves a live bar aside for the line."""

    def __init__(self, color: bool) -> None:
        super().__init__(logging.INFO)
        self.color = color

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
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
    """Of a disk that is full it tells once, where Python would print a traceback for every line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            tell(f"{self.baseFilename}: lines are missing: {reason(error)}")

    def close(self) -> None:
        with suppress(OSError):  # of the lines that are missing
            super().close()


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))


class _Keeper(logging.Handler):
    """Keeps what is said before there is a folder to write it in."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def init_logging(
    dump_folder: Path | None, rank: int, *, color: bool | None = None
) -> logging.Logger:
    """Set up and return the "opd_titan" logger; calling it again replaces the handlers.

    The console shows INFO and above as `[HH:MM:SS] message`, on rank 0 only
    unless the environment variable OPD_TITAN_LOG_ALL_RANKS is 1. The file
    `<dump_folder>/logs/rank-N.log` gets DEBUG and above with full timestamps, is appended to on
    resume, and never holds a colour code. It and one older file, `rank-N.log.1`, take
    `FILE_BYTES` each at most.

    Args:
        dump_folder: None writes no file yet: the lines go to the next call's.
        color: None decides by the terminal and NO_COLOR.
    """
    # Tells each rank, at every export, that two axes are gathered one after the other.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    logger = logging.getLogger("opd_titan")
    early: list[logging.LogRecord] = []
    for handler in list(logger.handlers):
        early += handler.records if isinstance(handler, _Keeper) else []
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    # Some libraries call logging.basicConfig(); the root would then print each line again.
    logger.propagate = False
    if rank == 0 or os.environ.get(ALL_RANKS, "0") not in ("", "0"):
        console = _ConsoleHandler(use_color(color))
        console.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else None))
        logger.addHandler(console)
    if dump_folder is not None:
        path = Path(dump_folder) / "logs" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(
            path,
            maxBytes=FILE_BYTES,
            backupCount=1,
            encoding="utf-8",
            errors="backslashreplace",
        )
        file.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        for record in early:
            file.handle(record)
        logger.addHandler(file)
    else:
        # Also because without any handler Python would print warnings through its last resort.
        logger.addHandler(_Keeper())
    return logger
