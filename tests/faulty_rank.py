"""The program with one rank that goes wrong: `faulty_rank.py RANK PLACE BEATS WHAT arguments...`.

When that rank has begun PLACE ("phase update of step 2") and said so many times that it goes on, it
sends itself a signal ("SIGTERM", "SIGKILL"), stands still ("hang"), its teacher's scores are no
numbers any more ("nan"), or the system gives it 16 MiB of memory more and then none ("memory").
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_titan.distributed.heartbeat import Heartbeat


def when(place: str, beats: int, act: Callable[[], None]) -> tuple[Any, Any]:
    """Have `act` called there, once. Returns Heartbeat's own `set_phase` and `beat`."""
    set_phase, beat = Heartbeat.set_phase, Heartbeat.beat
    seen = {"beats": -1, "acted": False}

    def count(self: Heartbeat) -> None:
        seen["beats"] = seen["beats"] + 1 if self.phase == place else -1
        beat(self)
        if seen["beats"] == beats and not seen["acted"]:
            seen["acted"] = True
            act()

    Heartbeat.beat = count  # `set_phase` calls it too
    return set_phase, beat


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
