"""Stop on a signal: all ranks leave at the same point, whichever of them the signal reached."""

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
    """All ranks leave what they are doing, for one of them got a signal.

    Not an `Exception`: nothing that handles faults on the way may keep it.
    """


class StopRequest:
    """SIGTERM or SIGUSR1, which a scheduler may send to one rank or to all.

    Attributes:
        signal: the number of what came, here or to another rank that has said so; 0 for nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._said = False
        self._look_at, self._rounds = 0.0, 0
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: Any) -> None:
        self.signal = number

    def _heard(self) -> bool:
        """Whether this rank knows of a signal. Cheap enough for a loop; ranks may differ."""
        if dist.get_world_size() == 1 or self._said:
            return self.signal > 0
        store = _get_default_store()
        if self.signal:
            store.set(_KEY, str(self.signal))
            self._said = True
        elif time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _SECONDS_BETWEEN_LOOKS
            if store.check([_KEY]):
                self.signal, self._said = int(store.get(_KEY)), True
        return self.signal > 0

    def check_axis(self, axis: Axis, device: torch.device) -> None:
        """Raise Stopped when this rank has heard of a signal; the ranks of `axis`, all together.

        For loops whose rounds the ranks of `axis` make together, and other ranks do not.
        """
        self._rounds += 1
        if axis.size == 1:
            told = self._heard()
        elif self._rounds % _ROUNDS_BETWEEN_VOTES:
            return
        else:
            told = self._vote(axis.group, device)
        if told:
            raise Stopped

    def check(self) -> None:
        """Raise Stopped on all ranks when one has heard of a signal. All ranks call."""
        # On the host: a GPU would have to finish its work first.
        if self._vote(None, torch.device("cpu")):
            raise Stopped

    def _vote(self, group: dist.ProcessGroup | None, device: torch.device) -> bool:
        vote = torch.tensor(self.signal if self._heard() else 0, device=device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
        told = int(vote)
        if told:  # or a signal that came during the vote would be forgotten
            self.signal = told
        return told > 0
