"""Which rank answers which prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch.distributed.distributed_c10d import _get_default_store

from opd_titan.distributed.collectives import min_integer
from opd_titan.distributed.world import Axis
from opd_titan.rollout.scheduler import Request

Group = Sequence[Request]  # the samples of one prompt

# Every rank makes the same shares in the same order, so that a number is a common name.
_numbers = count()


@dataclass(frozen=True)
class Share:
    """The groups that this rank answers.

    At first an even part, as many as it can run at once. Whoever gets free takes the next of the
    rest, so that no rank waits long for another one's last sequence. A token depends on nothing but
    its own sequence, whoever samples it; but the batches it is sampled in then depend on the ranks'
    speed, and with them its log-prob's rounding: where torch has to be deterministic, the rest is
    given out evenly as well.

    Args:
        dp: the ranks that divide the prompts.
        tp: the ranks that answer the same ones together.
    """

    dp: Axis
    tp: Axis
    device: torch.device

    def count_even(self, groups: Sequence[Group]) -> int:
        """Requests of the largest even part."""
        return sum(len(g) for g in groups[:: self.dp.size])

    def read(self, groups: Sequence[Group], slots: int) -> Iterator[Group]:
        """This rank's groups, one by one, as it gets free. All ranks must read to the end.

        Args:
            groups: the same on all ranks.
            slots: sequences that this rank runs at once.
        """
        even, size = groups[self.dp.rank :: self.dp.size], self.dp.size
        if size == 1 or torch.are_deterministic_algorithms_enabled():
            yield from even
            return
        name = f"opd_titan/rollout/{next(_numbers)}"
        slots = min_integer(slots, self.device, self.dp)
        # Of as many groups as each rank starts with, all are given out.
        first = -(-slots // max(len(g) for g in groups))
        yield from even[:first]
        rest = groups[first * size :]
        while rest and (taken := self._take(name)) < len(rest):
            yield rest[taken]

    def _take(self, name: str) -> int:
        """The next number that no rank has taken. Ranks of one model take it together."""
        number = 1 << 62
        if self.tp.rank == 0:
            number = _get_default_store().add(name, 1) - 1
        return min_integer(number, self.device, self.tp)
