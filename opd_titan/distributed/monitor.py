"""Callbacks for long phases: they update progress bar and heartbeat, and check for signals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Protocol

from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.distributed.stopping import StopRequest
from opd_titan.distributed.world import World


class ProgressBar(Protocol):
    def update(self, n: float | None = 1) -> bool | None: ...


class Monitor:
    """Make the callbacks that the loops of a phase call. They raise Stopped after a signal."""

    def __init__(self, stop: StopRequest, heartbeat: Heartbeat, world: World) -> None:
        self.stop, self.heartbeat, self.world = stop, heartbeat, world

    def on_tokens(self, bar: ProgressBar) -> Callable[[int], None]:
        """Return the callback for rollouts, where only tensor-parallel ranks run in lockstep."""

        def sampled(tokens: int) -> None:
            bar.update(tokens)
            self.heartbeat.beat()
            self.stop.check_axis(self.world.tp, self.world.device)

        return sampled

    def on_sequences(self, bar: ProgressBar, stops: int | None = None) -> Callable[[int], None]:
        """Return the callback for passes over micro-batches, which all ranks run in lockstep.

        Args:
            stops: the number of calls that check for a signal; None: all.
        """
        calls = count(1)

        def done(sequences: int) -> None:
            bar.update(sequences)
            self.heartbeat.beat()
            if stops is None or next(calls) <= stops:
                self.stop.check()

        return done
