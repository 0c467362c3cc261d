"""Run the program with a faulty rank: `faulty_rank.py RANK PLACE BEATS WHAT arguments...`.

The fault comes at the given heartbeat after the rank has begun PLACE ("phase update of step 2"). It
sends itself a signal ("SIGTERM", "SIGKILL"), hangs ("hang"), gets NaN from its teacher ("nan"), or
can allocate only 16 MiB more ("memory").
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd_titan.distributed.heartbeat import Heartbeat


def when(place: str, beats: int, act: Callable[[], None]) -> None:
    """Call `act` once, at this heartbeat after the phase `place` has begun."""
    beat = Heartbeat.beat
    seen = {"beats": -1, "acted": False}

    def count(self: Heartbeat) -> None:
        seen["beats"] = seen["beats"] + 1 if self.phase == place else -1
        beat(self)
        if seen["beats"] == beats and not seen["acted"]:
            seen["acted"] = True
            act()

    Heartbeat.beat = count  # `set_phase` calls it too


@contextmanager
def at(place: str, act: Callable[[], None], beats: int = 0) -> Iterator[None]:
    """Call `act` as `when` does, but only inside the body."""
    beat = Heartbeat.beat
    when(place, beats, act)
    try:
        yield
    finally:
        Heartbeat.beat = beat


def poison() -> None:
    from opd_titan.training import phases

    update = phases.update

    def poisoned(model: Any, optimizer: Any, plan: Any, *args: Any, **options: Any) -> Any:
        plan[0].microbatches[0][0].teacher_logprobs[0] = math.nan
        phases.update = update
        return update(model, optimizer, plan, *args, **options)

    phases.update = poisoned


def starve() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (16 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def go_wrong() -> None:
    rank, place, beats, what, *argv = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        acts = {"hang": lambda: time.sleep(3600), "nan": poison, "memory": starve}
        act = acts.get(what) or (lambda: os.kill(os.getpid(), signal.Signals[what]))
        when(place, int(beats), act)
    sys.argv[1:] = argv
    from opd_titan.train import main, run_and_leave

    run_and_leave(main)


if __name__ == "__main__":
    go_wrong()
