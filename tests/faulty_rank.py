"""The program with one rank that goes wrong: `faulty_rank.py RANK PLACE BEATS WHAT arguments...`.

When that rank has begun PLACE ("phase update of step 2") and said so many times that it goes on, it
sends itself a signal ("SIGTERM", "SIGKILL"), stands still ("hang"), or its teacher's scores are no
numbers any more ("nan").
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from opd_titan.distributed.lifeline import Lifeline


def when(place: str, beats: int, act: Callable[[], None]) -> tuple[Any, Any]:
    """Have `act` called there, once. Returns Lifeline's own `enter` and `beat`."""
    enter, beat = Lifeline.enter, Lifeline.beat
    seen = {"beats": -1, "acted": False}

    def count(self: Lifeline) -> None:
        seen["beats"] = seen["beats"] + 1 if self.place == place else -1
        beat(self)
        if seen["beats"] == beats and not seen["acted"]:
            seen["acted"] = True
            act()

    Lifeline.beat = count  # `enter` calls it too
    return enter, beat


def poison() -> None:
    from opd_titan import trainer

    update = trainer.update

    def poisoned(model: Any, optimizer: Any, plan: Any, *args: Any, **options: Any) -> Any:
        plan[0].microbatches[0][0].teacher_logprobs[0] = math.nan
        trainer.update = update
        return update(model, optimizer, plan, *args, **options)

    trainer.update = poisoned


def go_wrong() -> None:
    rank, place, beats, what, *argv = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        acts = {"hang": lambda: time.sleep(3600), "nan": poison}
        act = acts.get(what) or (lambda: os.kill(os.getpid(), signal.Signals[what]))
        when(place, int(beats), act)
    sys.argv[1:] = argv
    from opd_titan.train import main, run_and_leave

    run_and_leave(main)


if __name__ == "__main__":
    go_wrong()
