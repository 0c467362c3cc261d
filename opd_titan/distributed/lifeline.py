"""Where a rank is, for whoever asks why it died; and an end to one that stands still."""

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

from opd_titan.errors import tell

_SECONDS_TO_TELL = 5.0

T = TypeVar("T")
logger = logging.getLogger("opd_titan")

# The launcher's folder, where each of its ranks writes down what it is doing.
FOLDER = "OPD_TITAN_PLACES"


def place_of(rank: int) -> str:
    """What a rank of this node was doing last; "" where it has not said."""
    folder = os.environ.get(FOLDER, "")
    try:
        return Path(folder, str(rank)).read_text(encoding="utf-8") if folder else ""
    except OSError:
        return ""


def enter(place: str) -> None:
    """Say to this process's lifeline, where there is one, what begins: "the check of the data"."""
    if Lifeline.current is not None:
        Lifeline.current.enter(place)


def beat() -> None:
    """Say to this process's lifeline, where there is one, that the work goes on.

    For loops deep down. Threads may call it: a write in the background, for which others wait.
    """
    if Lifeline.current is not None:
        Lifeline.current.beat()


def hold(name: str, owner: T, size: Callable[[T], float]) -> None:
    """Tell this process's lifeline, where there is one, what takes memory, for whoever runs out.

    Args:
        owner: is not kept alive by this.
        size: bytes that it takes when asked.
    """
    if Lifeline.current is not None:
        Lifeline.current.owners[name] = weakref.ref(owner), size


class Lifeline:
    """Ends this process with one line when it has not moved for `limit_seconds`.

    A rank that waits for others is ended by its collective's timeout. This is for the one that they
    wait for: it may hang in a file system or a library, where nobody else sees it.
    """

    current: ClassVar[Lifeline | None] = None  # the newest of this process that is not closed

    def __init__(self, rank: int, limit_seconds: float) -> None:
        self.rank, self.limit, self.place = rank, limit_seconds, "the start"
        self.owners: dict[str, tuple[weakref.ref[Any], Callable[[Any], float]]] = {}
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()
        Lifeline.current = self
        self.enter(self.place)

    def enter(self, place: str) -> None:
        """Say what begins: "the update of step 3"."""
        self.place = place
        folder = os.environ.get(FOLDER)
        if folder:
            with suppress(OSError):  # a note for whoever asks: no reason to lose the run
                Path(folder, str(self.rank)).write_text(place, encoding="utf-8")
        self.beat()

    def held(self) -> dict[str, float]:
        """Return the bytes that each owner takes now, by name."""
        found = {name: (owner(), size) for name, (owner, size) in self.owners.items()}
        return {name: size(owner) for name, (owner, size) in found.items() if owner is not None}

    def beat(self) -> None:
        """Say that the work goes on."""
        self._moved_at = time.monotonic()

    def close(self) -> None:
        Lifeline.current = None
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(self.limit / 10, 10.0)
        seen, still = self._moved_at, 0.0
        while True:
            # A library that does not let go of the interpreter keeps this thread still, too.
            _end_from_outside(self.limit - still + 2 * tick + _SECONDS_TO_TELL)
            began = time.monotonic()
            if self._over.wait(tick):
                return
            # Not the clock's time: the whole process may have been suspended meanwhile.
            still += min(time.monotonic() - began, 2 * tick)
            if self._moved_at != seen:
                seen, still = self._moved_at, 0.0
            elif still > self.limit:
                self._end(still)

    def _end(self, still: float) -> None:
        text = (
            f"rank {self.rank} has not moved for {still:.0f} s in {self.place}; ended "
            f"(comm.train_timeout_seconds)"
        )
        # By another thread: what hangs may be the log's file system, or its lock.
        telling = threading.Thread(target=_tell, args=(text,), daemon=True)
        try:
            telling.start()
            telling.join(_SECONDS_TO_TELL)
        finally:
            os._exit(1)


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):
        tell(text)
    logger.error("%s", text)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=handler.stream)
                handler.stream.flush()


def _end_from_outside(seconds: float) -> None:
    """Have the interpreter's own watchdog, which needs no lock of it, end this process then."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no stderr to write to
        faulthandler.dump_traceback_later(seconds, exit=True)
