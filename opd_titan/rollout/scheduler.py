"""Decide what the engine runs next, and in which pages of the KV cache. Plain Python, no tensors.

A *prefix* is the part of a sequence that is computed before the sequence starts. For a prompt it is
all tokens but the last; it is computed once, and the samples of the prompt share its pages. For a
preempted sequence it is all tokens but the last that the sequence had. The last token goes through
the decoder with each sequence, so that all tokens are sampled in the same place.

Sequences share the full pages of their prefix. If the last page is only partly filled, each
sequence writes to its own copy of it; the last sequence of the group takes the original.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from opd_titan.data.types import Prompt

UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        key: selects the stream of random numbers.
        max_new_tokens: None for the limit of the sampling parameters.
    """

    prompt: Prompt
    sample_index: int
    key: int
    max_new_tokens: int | None = None


@dataclass(eq=False)
class SequenceState:
    """A request and its progress.

    Attributes:
        response, logprobs: tokens sampled before the last start; empty at the first start.
        pages: the pages of the tokens, in order. A sequence has pages exactly while it runs.
        slot: the row in a decoding step; -1 in line. It stays the same when the sequence ends.
        start: the number of the last start, counted over all sequences. The sequence with the
            highest number is preempted first.
        first_step: the number of the first decoding step after the last start.
    """

    request: Request
    response: list[int] = field(default_factory=list)
    logprobs: Sequence[float] = ()
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    start: int = -1
    first_step: int = -1

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt.token_ids, *self.response]

    @property
    def start_position(self) -> int:
        """The position of the first token that goes through the decoder, which is the last one."""
        return len(self.request.prompt.token_ids) + len(self.response) - 1


@dataclass(frozen=True)
class Chunk:
    """Tokens to compute keys and values for, from position `start` on, and the pages up to them."""

    tokens: list[int]
    start: int
    pages: list[int]


@dataclass(frozen=True)
class Work:
    """One step of the engine: what to do, in this order.

    Attributes:
        preempted: sequences that lost their pages, as (sequence, slot, tokens sampled so far).
            Their `response` and `logprobs` must be set to the sampled tokens before the next step.
        moves: slots with contents that move to a free slot, as (from, to). No slot is in two moves.
        new_pages: pages for the next tokens of running sequences, as (slot, index in the sequence's
            pages, page). The slots are those after the moves.
        chunks: parts of prefixes to compute.
        copies: pages to copy, as (from, to).
        started: sequences that start, in the last slots.
        running: the sequences in slots 0, 1, ..., including `started`. Each gets a token. It is
            empty if a long prefix must be continued first.
    """

    preempted: list[tuple[SequenceState, int, int]]
    moves: list[tuple[int, int]]
    new_pages: list[tuple[int, int, int]]
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    started: list[SequenceState]
    running: list[SequenceState]


def common_length(lengths: Iterable[int], max_tokens: int) -> int:
    """Return the greatest length to which all responses can be cut to fit into `max_tokens`.

    It depends on the responses alone, not on the order in which they were sampled. If some
    responses are not complete, the result may be too high, but never too low.
    """
    left, longest_first = max_tokens, sorted(lengths, reverse=True)
    while longest_first:
        if longest_first[-1] * len(longest_first) > left:
            return left // len(longest_first)
        left -= longest_first.pop()
    return UNLIMITED


class PagePool:
    """The free pages, and the number of holders of each page in use."""

    def __init__(self, num_pages: int) -> None:
        # The lowest page is taken first: attention on a CPU reads all pages up to the highest used.
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


class _Prefix:
    """The prefix of `members`, in line. The first `filled` of its `length` tokens are computed."""

    def __init__(self, members: Iterable[SequenceState], length: int) -> None:
        self.members, self.length = deque(members), length
        self.pages: list[int] = []
        self.filled = 0

    @property
    def ready(self) -> bool:
        return self.filled == self.length

    def advance(self, end: int) -> Chunk:
        start, self.filled = self.filled, end
        return Chunk(self.members[0].tokens[start:end], start, list(self.pages))


class Scheduler:
    """Continuous batching over slots and pages, first come, first served.

    Call `schedule` for the next step, run it, and call `postprocess` if it decoded tokens.

    Running sequences occupy slots 0 to n - 1. When sequences end, the last ones move into the free
    slots.

    Args:
        groups: the requests of each prompt. A group is read when a slot is free for it.
        slots: the most sequences that run at once.
        num_pages: size of the cache, which must hold any one sequence to its end.
        page_size: tokens of a page.
        max_new_tokens: for requests without their own limit.
        max_prefill_tokens: the most prefix tokens of one step. A longer prefix takes several steps.
        max_tokens: the most tokens of all responses together; 0 for no limit.
        lag: 1 if stop tokens are reported one step after they were sampled, else 0.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[Request]],
        slots: int,
        num_pages: int,
        page_size: int,
        max_new_tokens: int,
        max_prefill_tokens: int,
        max_tokens: int = 0,
        lag: int = 0,
    ) -> None:
        assert slots > 0 and lag in (0, 1)
        self.slots, self.num_pages, self.page_size = slots, num_pages, page_size
        self.max_new_tokens, self.max_prefill_tokens = max_new_tokens, max_prefill_tokens
        self.max_tokens, self.lag = max_tokens, lag
        self.pool = PagePool(num_pages)
        self.running: list[SequenceState] = []
        self._groups = iter(groups)
        # Only the first prefix that is not ready, and the prefixes before it, have pages.
        self._waiting: deque[_Prefix] = deque()
        self._step, self._starts = 0, count()
        self._free_slots: set[int] = set()  # below len(self.running), until the next step
        self._crowded = False  # from a preemption until a sequence ends, nothing starts
        # By decoding step: sequences that need a new page before it, and sequences that have all
        # tokens after it. An entry counts only if the sequence has not stopped or started again.
        self._needs_page: defaultdict[int, list[tuple[int, SequenceState]]] = defaultdict(list)
        self._ends: defaultdict[int, list[tuple[int, SequenceState]]] = defaultdict(list)
        self._sampled = 0
        self._lengths: list[int] = []  # of responses that have ended

    def schedule(self) -> Work | None:
        """Return the next step, or None if all requests are answered."""
        grown, preempted = self._grow()
        moves = self._close_gaps()
        new_pages = [(s.slot, len(s.pages) - 1, s.pages[-1]) for s in grown]
        chunks = self._prefill()
        started, copies = self._admit()
        if not self.running and not self._waiting:
            return None
        return Work(preempted, moves, new_pages, chunks, copies, started, [*self.running])

    def postprocess(self, stopped: Iterable[SequenceState] = ()) -> dict[SequenceState, int]:
        """Count a decoding step, and end the sequences that are complete.

        Args:
            stopped: sequences that got a stop token `lag` steps ago.

        Returns:
            The sequences that ended and the lengths of their responses. The response is on the
            device, in the sequence's slot, until the next step runs; or, if the sequence was
            preempted before its stop token was reported (slot -1), in `response`.
        """
        self._step += 1
        self._sampled += len(self.running)
        ended = self._beyond_limit()
        ended |= {s: self._num_tokens(s) for s in self._due(self._ends)}
        for s in stopped:
            if s.pages:
                ended[s] = self._num_tokens(s) - self.lag
            elif self._leave_line(s):
                ended[s] = len(s.response)
        for s, length in ended.items():
            self._lengths.append(length)
            self._crowded = False
            if s.pages:
                self._free(s)
        return ended

    # ------------------------------------------------------- running sequences

    def _num_tokens(self, s: SequenceState) -> int:
        """Return the number of response tokens that a running sequence has by now."""
        return len(s.response) + self._step - s.first_step

    def _limit(self, request: Request) -> int:
        return request.max_new_tokens or self.max_new_tokens

    def _due(
        self, events: defaultdict[int, list[tuple[int, SequenceState]]]
    ) -> Iterator[SequenceState]:
        """Yield the sequences with an event at this step, the first started first."""
        for start, s in sorted(events.pop(self._step, ()), key=lambda event: event[0]):
            if s.pages and s.start == start:
                yield s

    def _beyond_limit(self) -> dict[SequenceState, int]:
        """Return sequences that will be cut to their present length or less."""
        if not self.max_tokens or self._sampled <= self.max_tokens:
            return {}
        # The tokens of the last `lag` steps do not count if they came after a stop token.
        known = {s: self._num_tokens(s) - self.lag for s in self.running}
        limit = common_length([*self._lengths, *known.values()], self.max_tokens)
        return {s: n for s, n in known.items() if n >= limit}

    def _grow(self) -> tuple[list[SequenceState], list[tuple[SequenceState, int, int]]]:
        """Give each running sequence a page for its next token.

        If no page is free, first the prefixes in line lose their pages, the last one first; then
        the sequences that started last are preempted.
        """
        grown: list[SequenceState] = []
        preempted: list[tuple[SequenceState, int, int]] = []
        for s in self._due(self._needs_page):
            while s.pages and not self.pool.free and not self._empty_last():
                last = max((r for r in self.running if r.pages), key=lambda r: r.start)
                preempted.append(self._preempt(last))
            if s.pages:
                s.pages.append(self.pool.take())
                grown.append(s)
                self._needs_page[self._step + self.page_size].append((s.start, s))
        return grown, preempted

    def _preempt(self, s: SequenceState) -> tuple[SequenceState, int, int]:
        """Put a running sequence back in line, before the sequences that started after it."""
        slot, sampled = s.slot, self._num_tokens(s)
        self._free(s)
        s.slot = -1
        self._waiting.appendleft(_Prefix([s], len(s.request.prompt.token_ids) + sampled - 1))
        self._crowded = True
        return s, slot, sampled

    def _free(self, s: SequenceState) -> None:
        self.pool.give_back(s.pages)
        s.pages = []
        self._free_slots.add(s.slot)

    def _close_gaps(self) -> list[tuple[int, int]]:
        """Move the last sequences into free slots. Return the moves as (from, to)."""
        free, self._free_slots = self._free_slots, set()
        left = len(self.running) - len(free)
        targets = sorted(slot for slot in free if slot < left)
        sources = [slot for slot in range(left, len(self.running)) if slot not in free]
        for source, target in zip(sources, targets, strict=True):
            self.running[target] = self.running[source]
            self.running[target].slot = target
        del self.running[left:]
        return list(zip(sources, targets, strict=True))

    # ------------------------------------------------------- sequences in line

    def _read_groups(self, wanted: int) -> None:
        """Read groups until `wanted` sequences are in line, or no group is left."""
        in_line = sum(len(p.members) for p in self._waiting)
        while in_line < wanted and (group := next(self._groups, None)):
            length = len(group[0].prompt.token_ids)
            for r in group:
                longest = length + self._limit(r) - 1
                assert longest <= self.num_pages * self.page_size, "cache too small"
            self._waiting.append(_Prefix(map(SequenceState, group), length - 1))
            in_line += len(group)

    def _prefill(self) -> list[Chunk]:
        """Return the next chunks of prefixes of sequences for which there is a slot."""
        budget, slots = self.max_prefill_tokens, self.slots - len(self.running)
        chunks: list[Chunk] = []
        if self._crowded or slots == 0:
            return chunks
        self._read_groups(slots)  # and no more, so that all sequences in line have a slot waiting
        for prefix in self._waiting:
            if prefix.ready:
                continue
            if chunks and prefix.length - prefix.filled > budget:
                break  # the next step computes it in fewer pieces
            end = self._make_room(prefix, min(prefix.filled + budget, prefix.length))
            if end == prefix.filled:
                break  # no page is free
            budget -= end - prefix.filled
            chunks.append(prefix.advance(end))
        return chunks

    def _make_room(self, prefix: _Prefix, end: int) -> int:
        """Take free pages for tokens up to `end`. Return the end of the tokens that have pages."""
        while len(prefix.pages) * self.page_size < end and self.pool.free:
            prefix.pages.append(self.pool.take())
        return min(end, len(prefix.pages) * self.page_size)

    def _empty_last(self, until: _Prefix | None = None) -> bool:
        """Free a page by emptying prefixes from the end of the line, only those after `until`."""
        for prefix in reversed(self._waiting):
            if prefix is until:
                return False
            self.pool.give_back(prefix.pages)
            prefix.pages, prefix.filled = [], 0
            if self.pool.free:
                return True
        return False

    def _leave_line(self, s: SequenceState) -> bool:
        """Remove a preempted sequence from the line. Return whether it was in line."""
        for prefix in self._waiting:
            if prefix.members[0] is s:
                self.pool.give_back(prefix.pages)
                self._waiting.remove(prefix)
                return True
        return False

    def _admit(self) -> tuple[list[SequenceState], list[tuple[int, int]]]:
        """Start sequences with a computed prefix while there are slots and pages.

        Returns:
            The sequences, and the pages to copy first, as (from, to).
        """
        started: list[SequenceState] = []
        copies: list[tuple[int, int]] = []
        while self._waiting and len(self.running) < self.slots and not self._crowded:
            prefix = self._waiting[0]
            if not prefix.ready or not self._give_pages(prefix, copies):
                break
            started.append(prefix.members.popleft())
            self._start(started[-1])
            if not prefix.members:
                self.pool.give_back(prefix.pages)
                self._waiting.popleft()
        return started, copies

    def _give_pages(self, prefix: _Prefix, copies: list[tuple[int, int]]) -> bool:
        """Give the first member pages for the prefix and one more token, if there are any.

        Returns:
            Whether it has the pages.
        """
        full, in_last = divmod(prefix.length, self.page_size)
        if in_last and len(prefix.members) == 1:
            own = prefix.pages.pop()
        elif self.pool.free or (not self.running and self._empty_last(prefix)):
            own = self.pool.take()
            if in_last:
                copies.append((prefix.pages[full], own))
        elif self.running:
            return False
        else:
            # The sequence is alone and takes the last page. The next member computes it again.
            assert in_last, "the cache does not hold one sequence"
            own = prefix.pages.pop()
            prefix.filled = full * self.page_size
        shared = prefix.pages[:full]
        self.pool.share(shared)
        prefix.members[0].pages = [*shared, own]
        return True

    def _start(self, s: SequenceState) -> None:
        s.start, s.first_step, s.slot = next(self._starts), self._step, len(self.running)
        self.running.append(s)
        fit = self.page_size - s.start_position % self.page_size
        self._needs_page[self._step + fit].append((s.start, s))
        left = self._limit(s.request) - len(s.response)
        self._ends[self._step + left].append((s.start, s))
