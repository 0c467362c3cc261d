"""What to run: which request holds which slot. Plain Python; running it is the generator's part.

Running requests always occupy slots 0 to n-1, so that decoding reads one dense slice of the cache:
when one ends, the last one moves into its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from opd_titan.data.types import Prompt


@dataclass(frozen=True)
class Request:
    """One response to be sampled. `key` selects its stream of random numbers."""

    prompt: Prompt
    sample_index: int
    key: int


class Scheduler:
    """Continuous batching over a fixed number of slots, first come, first served."""

    def __init__(self, requests: Sequence[Request], slots: int) -> None:
        assert slots > 0
        self.slots = slots
        self.waiting = deque(requests)
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self, max_prefill_tokens: int) -> list[Request]:
        """Give free slots to waiting requests, in order, up to a budget of prompt tokens.

        Requests of one prompt that are admitted together count its tokens once: they share one
        prefill. One request is always admitted when a slot is free, however long its prompt.
        Their slots are the last ones of `running`.
        """
        admitted: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting[0]
            shared = bool(admitted) and admitted[-1].prompt.index == request.prompt.index
            tokens += 0 if shared else len(request.prompt.token_ids)
            if admitted and tokens > max_prefill_tokens:
                break
            admitted.append(self.waiting.popleft())
            self.running.append(request)
        return admitted

    def release(self, finished: Sequence[int]) -> list[tuple[int, int]]:
        """Free these slots.

        Returns:
            (source, destination) slots whose contents must move, to be done in this order.
        """
        moves = []
        for slot in sorted(finished, reverse=True):
            last = self.running.pop()
            if slot < len(self.running):
                self.running[slot] = last
                moves.append((len(self.running), slot))
        return moves
