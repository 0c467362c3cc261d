"""What to run: which request holds which slot. Plain Python; running it is the generator's part.

Running requests always occupy slots 0 to n-1, so that decoding reads one dense slice of the cache:
where some end, the last ones move into their slots.
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
        prefill. One prompt is always admitted when a slot is free, however long it is.
        Their slots are the last ones of `running`.
        """
        admitted: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting[0]
            shared = bool(admitted) and admitted[-1].prompt.index == request.prompt.index
            if not shared:
                tokens += len(request.prompt.token_ids)
                if admitted and tokens > max_prefill_tokens:
                    break
            admitted.append(self.waiting.popleft())
            self.running.append(request)
        return admitted

    def release(self, finished: Sequence[int]) -> tuple[list[int], list[int]]:
        """Free these slots.

        Returns:
            Slots whose contents must move, and where to, pair by pair. No slot is in both lists.
        """
        left = len(self.running) - len(finished)
        targets = sorted(slot for slot in finished if slot < left)
        sources = sorted(set(range(left, len(self.running))).difference(finished))
        for source, target in zip(sources, targets, strict=True):
            self.running[target] = self.running[source]
        del self.running[left:]
        return sources, targets
