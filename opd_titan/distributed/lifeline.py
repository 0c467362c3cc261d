"""Where a rank is, for whoever asks why it died; and an end to one that stands still."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path

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


class Lifeline:
    """Ends this process with one line when it has not moved for `limit_seconds`.

    A rank that waits for others is ended by its collective's timeout. This is for the one that they
    wait for: it may hang in a file system or a library, where nobody else sees it.
    """

    def __init__(self, rank: int, limit_seconds: float) -> None:
        self.rank, self.limit, self.place = rank, limit_seconds, "the start"
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def enter(self, place: str) -> None:
        """Say what begins: "the update of step 3"."""
        self.place = place
        folder = os.environ.get(FOLDER)
        if folder:
            Path(folder, str(self.rank)).write_text(place, encoding="utf-8")
        self.beat()

    def beat(self) -> None:
        """Say that the work goes on."""
        self._moved_at = time.monotonic()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(self.limit / 10, 10.0)):
            still = time.monotonic() - self._moved_at
            if still > self.limit:
                self._end(still)

    def _end(self, still: float) -> None:
        text = f"rank {self.rank} has not moved for {still:.0f} s in {self.place}; ended"
        logger.error("%s (comm.train_timeout_seconds)", text)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                faulthandler.dump_traceback(file=handler.stream)
                handler.stream.flush()
        print(f"opd_titan: {text}", file=sys.stderr, flush=True)
        os._exit(1)
