"""What to run next, and in which pages of the cache. Plain Python; running it is others' part.

A *prefix* is what sequences start from: the tokens of a prompt but its last, whose keys and values
are computed once and whose pages all samples of the group share; or everything that a preempted
sequence had. The last token goes through the decoder with each sequence, so that every token is
sampled in one place.

A prefix's full pages are shared for good. The page that it fills only in part is copied for each
sequence, since each goes on writing there; the last one to start takes it over.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from opd_titan.data.types import Prompt


@dataclass(frozen=True)
class Request:
    """One response to be sampled.

    Attributes:
        key: selects its stream of random numbers.
        max_new_tokens: None for what the sampling parameters say.
    """

    prompt: Prompt
    sample_index: int
    key: int
    max_new_tokens: int | None = None


class PagePool:
    """Numbers of pages, and how many hold each."""

    def __init__(self, num_pages: int) -> None:
        # The lowest first: attention on a CPU runs over the pages up to the highest in use.
        self._free = list(range(num_pages))
        self._holders: Counter[int] = Counter()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        page = heapq.heappop(self._free)
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        self._holders.update(pages)

    def give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                heapq.heappush(self._free, page)


@dataclass(eq=False)
class RunningSequence:
    """A sequence that runs or is in line. One that goes on after a preemption is a new one.

    Attributes:
        response, logprobs: what it has before it starts: after a preemption not nothing.
        pages: of its tokens, in order. It runs as long as it has any.
        slot: its row in a decoding step.
        number: counts starts. Who started last is preempted first.
        started: the decoding step before which it did.
    """

    request: Request
    response: list[int] = field(default_factory=list)
    logprobs: Sequence[float] = ()
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    number: int = -1
    started: int = -1

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt.token_ids, *self.response]

    @property
    def start_position(self) -> int:
        """Of the first token that it feeds: the last one that it had."""
        return len(self.request.prompt.token_ids) + len(self.response) - 1


@dataclass(eq=False)
class Prefix:
    """Keys and values of the first `filled` tokens are in `pages`, for `members` to start from."""

    members: deque[RunningSequence]
    pages: list[int] = field(default_factory=list)
    filled: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.members[0].tokens[:-1]

    @property
    def ready(self) -> bool:
        return self.filled == len(self.tokens)


@dataclass(frozen=True)
class Chunk:
    """Tokens whose keys and values come next, from position `start` on, and the pages to them."""

    tokens: list[int]
    start: int
    pages: list[int]


@dataclass(frozen=True)
class Growth:
    """What changes before a decoding step.

    Attributes:
        pages: new ones, as (slot, its number among the sequence's pages, page).
        preempted: their pages are gone. Each goes back in line by `requeue`.
    """

    pages: list[tuple[int, int, int]]
    preempted: list[RunningSequence]


class Scheduler:
    """Continuous batching over slots and pages, first come, first served.

    Running sequences always occupy slots 0 to n-1: where some end, the last ones move into their
    slots. A decoding step gives each of them one token. A round is:
    `prefill`, `admit`, `grow`, (`requeue`, `release`), decode, `advance`, `release`.

    Args:
        groups: the requests of one prompt together. Read as slots get free, not before.
        slots: sequences that run at once.
        num_pages: of the cache; enough for any one sequence to its end.
        page_size: tokens in a page.
        max_new_tokens: of requests that do not say it.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[Request]],
        slots: int,
        num_pages: int,
        page_size: int,
        max_new_tokens: int,
    ) -> None:
        assert slots > 0
        self.max_new_tokens = max_new_tokens
        self.slots, self.num_pages, self.page_size = slots, num_pages, page_size
        self.pool = PagePool(num_pages)
        self.running: list[RunningSequence] = []
        self._groups = iter(groups)
        # Of those in line only the first that is not ready, and those before it, have pages.
        self._waiting: deque[Prefix] = deque()
        self._step, self._numbers = 0, count()
        self._crowded = False  # from a preemption until a sequence ends: nothing new may start
        # By decoding step: who needs a new page before it, and who has all its tokens after it,
        # if it still runs then.
        self._needs_page: defaultdict[int, list[RunningSequence]] = defaultdict(list)
        self._ends: defaultdict[int, list[RunningSequence]] = defaultdict(list)

    @property
    def has_work(self) -> bool:
        if not self.running:  # else whoever is free first may have the next group
            self._read_groups(1)
        return bool(self._waiting or self.running)

    def _read_groups(self, wanted: int) -> None:
        """Have as many sequences in line, if there are."""
        in_line = sum(len(p.members) for p in self._waiting)
        while in_line < wanted and (group := next(self._groups, None)):
            for r in group:
                longest = len(r.prompt.token_ids) + self._limit(r) - 1
                assert longest <= self.num_pages * self.page_size, "cache too small"
            self._waiting.append(Prefix(deque(RunningSequence(r) for r in group)))
            in_line += len(group)

    def _limit(self, request: Request) -> int:
        return request.max_new_tokens or self.max_new_tokens

    # ----------------------------------------------------------------- prefill

    def prefill(self, max_tokens: int) -> list[Chunk]:
        """What to compute next for prefixes whose sequences have slots waiting.

        Args:
            max_tokens: of all chunks together. A longer prefix takes several rounds.
        """
        slots = self.slots - len(self.running)
        chunks: list[Chunk] = []
        if self._crowded or slots == 0:
            return chunks
        self._read_groups(slots)  # and no more: all that are in line then have a slot waiting
        for prefix in self._waiting:
            if prefix.ready:
                continue
            if chunks and len(prefix.tokens) - prefix.filled > max_tokens:
                break  # the next round takes it in fewer pieces
            end = self._make_room(prefix, min(prefix.filled + max_tokens, len(prefix.tokens)))
            if end == prefix.filled:
                break  # no page is free
            chunks.append(
                Chunk(prefix.tokens[prefix.filled : end], prefix.filled, list(prefix.pages))
            )
            max_tokens -= end - prefix.filled
            prefix.filled = end
        return chunks

    def _make_room(self, prefix: Prefix, end: int) -> int:
        """Take pages for tokens up to `end`, as far as there are. Returns how far that is."""
        while len(prefix.pages) * self.page_size < end and self.pool.free:
            prefix.pages.append(self.pool.take())
        return min(end, len(prefix.pages) * self.page_size)

    def _empty_last(self, until: Prefix | None = None) -> bool:
        """Free a page by emptying prefixes from the end of the line; not `until` or before it."""
        for prefix in reversed(self._waiting):
            if prefix is until:
                return False
            self.pool.give_back(prefix.pages)
            prefix.pages, prefix.filled = [], 0
            if self.pool.free:
                return True
        return False

    # -------------------------------------------------------------------- start

    def admit(self) -> tuple[list[RunningSequence], list[tuple[int, int]]]:
        """Start sequences whose prefix is computed, as far as there are slots and pages.

        Returns:
            The sequences, in the last slots; and pages to be copied first, as (from, to).
        """
        admitted: list[RunningSequence] = []
        copies: list[tuple[int, int]] = []
        while self._waiting and len(self.running) < self.slots and not self._crowded:
            prefix = self._waiting[0]
            if not prefix.ready or not self._give_pages(prefix, copies):
                break
            sequence = prefix.members.popleft()
            self._start(sequence)
            admitted.append(sequence)
            if not prefix.members:
                self.pool.give_back(prefix.pages)
                self._waiting.popleft()
        return admitted, copies

    def _give_pages(self, prefix: Prefix, copies: list[tuple[int, int]]) -> bool:
        """Pages for the first member's prefix and next token; False while there is none free."""
        full, in_last = divmod(len(prefix.tokens), self.page_size)
        if in_last and len(prefix.members) == 1:
            own = prefix.pages.pop()
        elif self.pool.free or (not self.running and self._empty_last(prefix)):
            own = self.pool.take()
            if in_last:
                copies.append((prefix.pages[full], own))
        elif self.running:
            return False
        else:
            # It is alone and there is no page to spare. The next one computes it again.
            assert in_last, "the cache does not hold one sequence"
            own = prefix.pages.pop()
            prefix.filled = full * self.page_size
        shared = prefix.pages[:full]
        self.pool.share(shared)
        prefix.members[0].pages = [*shared, own]
        return True

    def _start(self, sequence: RunningSequence) -> None:
        sequence.number, sequence.started = next(self._numbers), self._step
        sequence.slot = len(self.running)
        self.running.append(sequence)
        fit = self.page_size - sequence.start_position % self.page_size
        self._needs_page[self._step + fit].append(sequence)
        left = self._limit(sequence.request) - len(sequence.response)
        self._ends[self._step + left].append(sequence)

    # ------------------------------------------------------------- while running

    def grow(self) -> Growth:
        """Give every running sequence a page for its next token.

        Where none is free, those in line lose what was computed for them; then the youngest that
        run are preempted.
        """
        growth = Growth([], [])
        # The oldest first: then no page goes to one that is preempted after it.
        for s in sorted(self._needs_page.pop(self._step, ()), key=lambda s: s.number):
            while s.pages and not self.pool.free and not self._empty_last():
                youngest = max((r for r in self.running if r.pages), key=lambda r: r.number)
                self._free_pages(youngest)
                growth.preempted.append(youngest)
                self._crowded = True
            if s.pages:
                page = self.pool.take()
                growth.pages.append((s.slot, len(s.pages), page))
                s.pages.append(page)
                self._needs_page[self._step + self.page_size].append(s)
        return growth

    def num_tokens(self, sequence: RunningSequence) -> int:
        """Response tokens that a running sequence has by now."""
        return len(sequence.response) + self._step - sequence.started

    def requeue(
        self, sequence: RunningSequence, response: list[int], logprobs: Sequence[float] = ()
    ) -> None:
        """Put a preempted sequence back in line, before all that are younger; then `release` it.

        Args:
            response, logprobs: all that it has. It goes on after them.
        """
        again = RunningSequence(sequence.request, response, logprobs)
        self._waiting.appendleft(Prefix(deque([again])))

    def advance(self) -> list[int]:
        """Count a decoding step. Returns the slots of sequences that now have all their tokens."""
        self._step += 1
        return [s.slot for s in self._ends.pop(self._step, ()) if s.pages]

    def release(self, slots: Iterable[int], ended: bool = False) -> tuple[list[int], list[int]]:
        """Free the slots of sequences that ended or were preempted.

        Args:
            ended: one of those that lost their pages had ended, as was seen too late.

        Returns:
            Slots whose contents must move, and where to, pair by pair. No slot is in both lists.
        """
        gone = set(slots)
        if ended:
            self._crowded = False
        for sequence in (self.running[slot] for slot in gone):
            if sequence.pages:  # it ended
                self._free_pages(sequence)
                self._crowded = False
        left = len(self.running) - len(gone)
        targets = sorted(slot for slot in gone if slot < left)
        sources = sorted(set(range(left, len(self.running))) - gone)
        for source, target in zip(sources, targets, strict=True):
            self.running[target] = self.running[source]
            self.running[target].slot = target
        del self.running[left:]
        return sources, targets

    def _free_pages(self, sequence: RunningSequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages = []
