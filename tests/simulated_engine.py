"""An engine for tests of the scheduler: its cache holds histories, not keys and values.

A cell of the cache holds a hash of all tokens up to its own, as keys and values depend on all of
them. So pages that are lost, shared too long, or written by two sequences lead to a wrong history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from opd_titan.data.types import Prompt
from opd_titan.rollout.scheduler import (
    Chunk,
    Request,
    Scheduler,
    SequenceState,
    Work,
    common_length,
)

Identity = tuple[int, int]


def identity(r: Request) -> Identity:
    return r.prompt.index, r.sample_index


def make_group(index: int, length: int, limits: Sequence[int | None]) -> list[Request]:
    """Return samples of one prompt. No two prompts have a token in common."""
    prompt = Prompt(index, "", tuple(1000 * (index + 1) + i for i in range(length)))
    return [Request(prompt, i, key=0, max_new_tokens=limit) for i, limit in enumerate(limits)]


def sampled_token(who: Identity, position: int) -> int:
    """Return the same after a preemption, as the engine's random numbers do."""
    return hash((who, position))


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


# --------------------------------------------------------------------- workloads


@dataclass
class Workload:
    """Requests, and the sizes of an engine for them.

    Attributes:
        stops: the number of tokens after which a stop token comes, unless the response ends before.
        lag: 1 if a stop token is known one step late.
        max_tokens: of all responses together; 0 for no limit.
    """

    groups: list[list[Request]]
    stops: dict[Identity, int]
    slots: int
    num_pages: int
    page_size: int
    budget: int
    max_new_tokens: int
    lag: int = 0
    max_tokens: int = 0

    @property
    def requests(self) -> list[Request]:
        return list(chain.from_iterable(self.groups))

    def limit(self, r: Request) -> int:
        return r.max_new_tokens or self.max_new_tokens

    def pages(self, r: Request) -> int:
        """Return the pages of a whole sequence. The last token is sampled, but never computed."""
        return pages_for(len(r.prompt.token_ids) + self.limit(r) - 1, self.page_size)

    def answer(self, r: Request) -> list[int]:
        n = min(self.limit(r), self.stops[identity(r)])
        first = len(r.prompt.token_ids)
        return [sampled_token(identity(r), p) for p in range(first, first + n)]

    @property
    def num_tokens(self) -> int:
        return sum(len(self.answer(r)) for r in self.requests)

    @property
    def enough_pages(self) -> int:
        """Pages for all sequences at the same time."""
        return sum(self.pages(r) for r in self.requests) + sum(
            pages_for(len(group[0].prompt.token_ids), self.page_size) for group in self.groups
        )


# ----------------------------------------------------------------------- engine


@dataclass
class Row:
    """The state of a slot. `pages` is its row of the page table."""

    state: SequenceState
    pages: list[int]
    response: list[int]
    stopped: bool = False

    @property
    def who(self) -> Identity:
        return identity(self.state.request)

    @property
    def tokens(self) -> list[int]:
        return [*self.state.request.prompt.token_ids, *self.response]


class Cache:
    """Cells by page and offset."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.cells: dict[tuple[int, int], int | None] = {}

    def _place(self, pages: Sequence[int], position: int) -> tuple[int, int]:
        number, offset = divmod(position, self.page_size)
        return pages[number], offset

    def read(self, pages: Sequence[int], length: int) -> list[int | None]:
        return [self.cells.get(self._place(pages, position)) for position in range(length)]

    def write(self, pages: Sequence[int], position: int, token: int) -> None:
        """Write the token's history, which continues the one in the cell before it."""
        before = self.cells[self._place(pages, position - 1)] if position else 0
        self.cells[self._place(pages, position)] = hash((before, token))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            for offset in range(self.page_size):
                self.cells[target, offset] = self.cells.get((source, offset))

    def forget(self, pages: set[int]) -> None:
        """Empty free pages, so that no sequence can use what they happen to hold."""
        self.cells = {place: cell for place, cell in self.cells.items() if place[0] not in pages}


def history(tokens: Sequence[int]) -> list[int]:
    """Return the expected contents of a sequence's cells."""
    out = [0]
    for token in tokens:
        out.append(hash((out[-1], token)))
    return out[1:]


class Engine:
    """A stand-in for generator, runner and cache that checks each step.

    Attributes:
        rows: by slot, as the steps so far say.
        vacated: slots of sequences that ended in the last step.
        order: how many sequences started before each for the first time.
        line: responses so far of preempted sequences that have not started again.
        peak: the most pages in use before a decoding step.
    """

    def __init__(self, w: Workload) -> None:
        self.w = w
        self.cache = Cache(w.page_size)
        self.rows: list[Row] = []
        self.vacated: set[int] = set()
        self.order: dict[Identity, int] = {}
        self.line: dict[Identity, list[int]] = {}
        self.stopped: list[list[SequenceState]] = [[]] * w.lag  # of the last steps
        self.answers: dict[Identity, list[int]] = {}
        self.steps = self.num_read = self.num_prefilled = self.num_preempted = self.peak = 0
        self.expected = {identity(r): w.answer(r) for r in w.requests}
        lengths = [len(answer) for answer in self.expected.values()]
        longest = max(lengths, default=0)
        self.limit = common_length(lengths, w.max_tokens) if w.max_tokens else longest
        self.histories = {
            identity(r): history([*r.prompt.token_ids, *w.answer(r)]) for r in w.requests
        }
        self.scheduler = Scheduler(
            self.read_groups(),
            w.slots,
            w.num_pages,
            w.page_size,
            w.max_new_tokens,
            w.budget,
            w.max_tokens,
            w.lag,
        )

    def read_groups(self) -> Iterator[list[Request]]:
        for group in self.w.groups:
            in_line = self.num_read - len(self.order) + len(self.line)
            wanted = self.w.slots - len(self.rows) + len(self.vacated)
            assert in_line < wanted, "a group was read before a slot was free for it"
            self.num_read += len(group)
            yield group

    def run(self) -> Engine:
        w = self.w
        # A step samples tokens, or it computes a prefix because nothing runs.
        longest = max((len(h) for h in self.histories.values()), default=0)
        bound = w.num_tokens + len(w.requests) * (longest // w.budget + 1 + w.lag)
        while (work := self.scheduler.schedule()) is not None:
            self.step(work)
            self.steps += 1
            assert self.steps <= bound, "it does not come to an end"
        pool = self.scheduler.pool
        assert len(self.vacated) == len(self.rows) and not self.line
        assert pool.free == w.num_pages and not pool._holders, "pages were lost"
        assert self.scheduler.schedule() is None
        return self

    def step(self, work: Work) -> None:
        self.preempt(work)
        self.move(work.moves)
        for slot, number, page in work.new_pages:
            assert number == len(self.rows[slot].pages), "a page was left out"
            self.rows[slot].pages.append(page)
        self.prefill(work.chunks)
        self.start(work)
        self.check_pages(work)
        if not self.rows:
            # Nothing could start: the first prefix took all that a step can compute.
            assert [len(c.tokens) for c in work.chunks] == [self.w.budget], "nothing goes on"
            return
        self.stopped.append(self.decode())
        self.finish(self.scheduler.postprocess(self.stopped.pop(0)))

    # --------------------------------------------------------- before decoding

    def preempt(self, work: Work) -> None:
        if not work.preempted:
            return
        assert not work.chunks and not work.started, "pages for new ones, but not for running ones"
        self.num_preempted += len(work.preempted)
        gone = self.vacated | {slot for _, slot, _ in work.preempted}
        ages = [self.order[row.who] for row in self.rows]
        stay = [age for slot, age in enumerate(ages) if slot not in gone]
        last = [ages[slot] for _, slot, _ in work.preempted]
        assert stay and max(stay) < min(last), "not the youngest"
        for s, slot, sampled in work.preempted:
            row = self.rows[slot]
            assert row.state is s and s.pages == [] and slot not in self.vacated
            assert sampled == len(row.response)
            self.line[row.who] = list(row.response)
            s.response, s.logprobs = list(row.response), [0.0] * sampled
        self.vacated = gone

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        left = len(self.rows) - len(self.vacated)
        both = [*chain(*moves)]
        assert len(set(both)) == len(both), "the order of the moves would matter"
        assert {target for _, target in moves} == {slot for slot in self.vacated if slot < left}
        assert not self.vacated & {source for source, _ in moves}
        for source, target in moves:
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        self.vacated = set()

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        lengths = [len(c.tokens) for c in chunks]
        assert sum(lengths) <= self.w.budget and 0 not in lengths
        assert not any(c.start for c in chunks[1:]), "only the first may continue its prefix"
        self.num_prefilled += sum(lengths)
        for c in chunks:
            for position, token in enumerate(c.tokens, start=c.start):
                self.cache.write(c.pages, position, token)

    def start(self, work: Work) -> None:
        targets = [target for _, target in work.copies]
        assert len(set(targets)) == len(targets)
        assert not {source for source, _ in work.copies} & set(targets), "the order would matter"
        self.cache.copy(work.copies)
        for s in work.started:
            who = identity(s.request)
            assert s.slot == len(self.rows), "slots are not dense"
            if who in self.order:
                assert s.response == self.line.pop(who)
            else:
                self.order[who] = len(self.order)
                assert s.response == []
            assert s.tokens == [*s.request.prompt.token_ids, *s.response]
            assert s.start_position == len(s.tokens) - 1
            self.rows.append(Row(s, list(s.pages), list(s.response)))
        assert len(self.rows) <= self.w.slots
        if work.started and self.line:
            last = max(self.order[row.who] for row in self.rows)
            assert last < min(self.order[who] for who in self.line), "a younger one went before"

    def check_pages(self, work: Work) -> None:
        pool = self.scheduler.pool
        free, held = set(pool._free), set(pool._holders)
        assert len(pool._free) == len(free) == pool.free
        assert not free & held and free | held == set(range(self.w.num_pages))
        for slot, (row, s) in enumerate(zip(self.rows, work.running, strict=True)):
            assert row.state is s and s.slot == slot and row.pages == s.pages
            assert not free.intersection(row.pages), "a page is free, but in use"
            assert len(row.pages) == pages_for(len(row.tokens), self.w.page_size)
        if work.preempted:
            used = {page for row in self.rows for page in row.pages}
            assert held == used, "prefixes in line must lose their pages first"
        self.peak = max(self.peak, len(held))
        self.cache.forget(free)

    # --------------------------------------------------------------- decoding

    def decode(self) -> list[SequenceState]:
        """Decode a token for each row. Return the sequences that got a stop token."""
        for row in self.rows:
            self.cache.write(row.pages, len(row.tokens) - 1, row.tokens[-1])
        stopped: list[SequenceState] = []
        for row in self.rows:
            if row.stopped:  # and the scheduler does not know it yet
                continue
            n = len(row.tokens)
            assert self.cache.read(row.pages, n) == self.histories[row.who][:n]
            row.response.append(sampled_token(row.who, n))
            if len(row.response) == self.w.stops[row.who]:
                row.stopped = True
                stopped.append(row.state)
        return stopped

    def finish(self, ended: Mapping[SequenceState, int]) -> None:
        for s, length in ended.items():
            who = identity(s.request)
            if s.slot < 0:
                response = s.response
                assert response == self.line.pop(who)
            else:
                response = self.rows[s.slot].response
                assert self.rows[s.slot].state is s
                self.vacated.add(s.slot)
            assert who not in self.answers, "answered twice"
            self.answers[who] = response[:length]
            assert response[:length] == self.expected[who][:length]
            assert length >= min(self.limit, len(self.expected[who])), "it was cut too short"
            assert length <= len(response), "tokens that were not sampled"
