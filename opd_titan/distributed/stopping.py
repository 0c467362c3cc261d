"""Stop on a signal: all ranks stop at the same point, even if only one rank received it."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from opd_titan.distributed.world import Axis

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_KEY = "opd_titan/stop"
_SECONDS_BETWEEN_LOOKS = 0.5
_ROUNDS_BETWEEN_VOTES = 16


class Stopped(BaseException):
    """All ranks stop, because one of them got a signal.

    It is not an `Exception`, so that code that handles errors does not catch it.
    """


class StopRequest:
    """SIGTERM or SIGUSR1, which a scheduler may send to one rank or to all.

    Attributes:
        signal: the number of the signal that this or another rank has received; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._shared = False  # through the store, with the other ranks
        self._next_look, self._rounds = 0.0, 0
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: Any) -> None:
        self.signal = number

    def _knows(self) -> bool:
        """Return whether this rank knows of a signal (ranks may differ). Fast enough for loops."""
        if dist.get_world_size() == 1 or self._shared:
            return self.signal > 0
        store = _get_default_store()
        if self.signal:
            store.set(_KEY, str(self.signal))
            self._shared = True
        elif time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
            if store.check([_KEY]):
                self.signal, self._shared = int(store.get(_KEY)), True
        return self.signal > 0

    def check_axis(self, axis: Axis, device: torch.device) -> None:
        """Raise Stopped on all ranks of `axis` together when one of them knows of a signal.

        For loops that the ranks of `axis` run in lockstep, but other ranks do not.
        """
        self._rounds += 1
        if axis.size == 1:
            stopped = self._knows()
        elif self._rounds % _ROUNDS_BETWEEN_VOTES:
            return
        else:
            stopped = self._vote(axis.group, device)
        if stopped:
            raise Stopped

    def check(self) -> None:
        """Raise Stopped on all ranks when one of them knows of a signal. All ranks must call."""
        # On the host, because a GPU would have to finish its work first.
        if self._vote(None, torch.device("cpu")):
            raise Stopped

    def _vote(self, group: dist.ProcessGroup | None, device: torch.device) -> bool:
        vote = torch.tensor(self.signal if self._knows() else 0, device=device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
        number = int(vote)
        if number:  # if 0, keep a signal that arrived during the vote
            self.signal = number
        return number > 0
