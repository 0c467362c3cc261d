"""What goes on beside a long phase: a bar moves, the lifeline hears of it, a signal is heard."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from opd_titan.distributed.agreement import StopRequest
from opd_titan.distributed.lifeline import Lifeline
from opd_titan.distributed.world import World
from opd_titan.observability.progress import Bar


class Watch:
    """Makes what the loops of a phase call as they go on.

    Both kinds of calls raise Stopped.
    """

    def __init__(self, stop: StopRequest, lifeline: Lifeline, world: World) -> None:
        self.stop, self.lifeline, self.world = stop, lifeline, world

    def enter(self, place: str) -> None:
        """Say what begins."""
        self.lifeline.enter(place)

    def on_tokens(self, bar: Bar) -> Callable[[int], None]:
        """For rollouts, whose rounds only the ranks of one model make together."""

        def sampled(tokens: int) -> None:
            bar.update(tokens)
            self.lifeline.beat()
            self.stop.listen(self.world.tp, self.world.device)

        return sampled

    def on_sequences(self, bar: Bar, stops: int | None = None) -> Callable[[int], None]:
        """For passes over micro-batches, which all ranks make together.

        Args:
            stops: so many calls look for a signal; None: all.
        """
        calls = count(1)

        def done(sequences: int) -> None:
            bar.update(sequences)
            self.lifeline.beat()
            if stops is None or next(calls) <= stops:
                self.stop.check()

        return done
