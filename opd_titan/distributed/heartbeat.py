"""Record the current phase of a rank for error reports, and end a rank that hangs."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from opd_titan.errors import print_error

_SECONDS_TO_REPORT = 5.0

T = TypeVar("T")
logger = logging.getLogger("opd_titan")

# Environment variable: the launcher's folder, where each of its ranks writes its phase.
FOLDER = "OPD_TITAN_PHASES"


def phase_of(rank: int) -> str:
    """Return the last phase of a rank of this node; "" if it is not known."""
    folder = os.environ.get(FOLDER, "")
    try:
        return Path(folder, str(rank)).read_text(encoding="utf-8") if folder else ""
    except OSError:
        return ""


def set_phase(phase: str) -> None:
    """Record the phase that begins, such as "the check of the data", if there is a heartbeat."""
    if Heartbeat.current is not None:
        Heartbeat.current.set_phase(phase)


def beat() -> None:
    """Record progress on the heartbeat of this process, if it has one.

    For long loops in code that has no access to the trainer's heartbeat. Thread-safe: background
    writes call it too.
    """
    if Heartbeat.current is not None:
        Heartbeat.current.beat()


def track_memory(name: str, owner: T, size: Callable[[T], float]) -> None:
    """Register an object that uses memory, if this process has a heartbeat.

    The report of an out-of-memory error lists it.

    Args:
        owner: the object, held by a weak reference.
        size: returns the bytes that it uses at the time of the call.
    """
    if Heartbeat.current is not None:
        Heartbeat.current.owners[name] = weakref.ref(owner), size


class Heartbeat:
    """End this process, with one line, after `limit_seconds` without a beat.

    The timeout of a collective ends the ranks that wait for another rank. The heartbeat ends that
    other rank, which may hang in a file system or in a library.
    """

    current: ClassVar[Heartbeat | None] = None  # the newest of this process that is not closed

    def __init__(self, rank: int, limit_seconds: float) -> None:
        self.rank, self.limit, self.phase = rank, limit_seconds, "the start"
        self.owners: dict[str, tuple[weakref.ref[Any], Callable[[Any], float]]] = {}
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        Heartbeat.current = self
        self.set_phase(self.phase)

    def set_phase(self, phase: str) -> None:
        """Record the phase that begins, such as "the update of step 3"."""
        self.phase = phase
        folder = os.environ.get(FOLDER)
        if folder:
            with suppress(OSError):  # only for error reports: the run must not fail because of it
                Path(folder, str(self.rank)).write_text(phase, encoding="utf-8")
        self.beat()

    def memory(self) -> dict[str, float]:
        """Return the bytes that each owner uses now, by name."""
        found = {name: (owner(), size) for name, (owner, size) in self.owners.items()}
        return {name: size(owner) for name, (owner, size) in found.items() if owner is not None}

    def beat(self) -> None:
        """Record progress."""
        self._moved_at = time.monotonic()

    def close(self) -> None:
        Heartbeat.current = None
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(self.limit / 10, 10.0)
        seen, still = self._moved_at, 0.0
        while True:
            # A library that does not release the GIL blocks this thread too.
            _end_from_outside(self.limit - still + 2 * tick + _SECONDS_TO_REPORT)
            began = time.monotonic()
            if self._over.wait(tick):
                return
            # Limit each wait, because the whole process may have been suspended meanwhile.
            still += min(time.monotonic() - began, 2 * tick)
            if self._moved_at != seen:
                seen, still = self._moved_at, 0.0
            elif still > self.limit:
                self._end(still)

    def _end(self, still: float) -> None:
        text = (
            f"rank {self.rank} has made no progress for {still:.0f} s in {self.phase}; ended "
            f"(comm.train_timeout_seconds)"
        )
        # In another thread, because the hang may be in the file system of the log, or in its lock.
        thread = threading.Thread(target=_report, args=(text,), daemon=True)
        try:
            thread.start()
            thread.join(_SECONDS_TO_REPORT)
        finally:
            os._exit(1)


def _report(text: str) -> None:
    with suppress(OSError, ValueError):
        print_error(text)
    logger.error("%s", text)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=handler.stream)
                handler.stream.flush()


def _end_from_outside(seconds: float) -> None:
    """Let faulthandler, which does not need the GIL, end this process after `seconds`."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no stderr to write to
        faulthandler.dump_traceback_later(seconds, exit=True)
