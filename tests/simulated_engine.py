"""An engine whose cache holds histories instead of keys and values, to drive the scheduler with.

A cell holds a hash of all tokens up to its own, as keys and values depend on all of them. So pages
that are lost, shared too long, or written by two sequences show as a wrong history. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from opd_titan.data.types import Prompt
from opd_titan.rollout.scheduler import Chunk, Growth, Request, RunningSequence, Scheduler

Identity = tuple[int, int]


def identity(r: Request) -> Identity:
    return r.prompt.index, r.sample_index


def make_group(index: int, length: int, limits: Sequence[int | None]) -> list[Request]:
    """Samples of one prompt. No two prompts have a token in common."""
    prompt = Prompt(index, "", tuple(1000 * (index + 1) + i for i in range(length)))
    return [Request(prompt, i, key=0, max_new_tokens=limit) for i, limit in enumerate(limits)]


def sampled_token(who: Identity, position: int) -> int:
    """The same again after a preemption, as the engine's random numbers are."""
    return hash((who, position))


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


# --------------------------------------------------------------------- workloads


@dataclass
class Workload:
    """`stops`: after how many tokens a stop token comes, if nothing else ends the response."""

    groups: list[list[Request]]
    stops: dict[Identity, int]
    slots: int
    num_pages: int
    page_size: int
    budget: int
    max_new_tokens: int

    @property
    def requests(self) -> list[Request]:
        return list(chain.from_iterable(self.groups))

    def limit(self, r: Request) -> int:
        return r.max_new_tokens or self.max_new_tokens

    def pages(self, r: Request) -> int:
        """Of a sequence to its end; the last token is sampled, but never fed."""
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
        """So many that nobody ever waits for one."""
        return sum(self.pages(r) for r in self.requests) + sum(
            pages_for(len(group[0].prompt.token_ids), self.page_size) for group in self.groups
        )


# ----------------------------------------------------------------------- engine


@dataclass
class Row:
    """What the engine knows of a slot. `pages` is its row of the block table."""

    request: Request
    pages: list[int]
    token: int
    position: int
    response: list[int]


@dataclass
class Cache:
    """Cells by page and offset."""

    page_size: int
    cells: dict[int, list[int | None]] = field(default_factory=dict)

    def read(self, pages: Sequence[int], length: int) -> list[int | None]:
        empty = [None] * self.page_size
        return list(chain.from_iterable(self.cells.get(p, empty) for p in pages))[:length]

    def write(self, pages: Sequence[int], position: int, token: int) -> None:
        """Put in the token's history, which goes on from what these pages hold before it."""
        before = self.cell(pages, position - 1) if position else 0
        number, offset = divmod(position, self.page_size)
        page = self.cells.setdefault(pages[number], [None] * self.page_size)
        page[offset] = hash((before, token))

    def cell(self, pages: Sequence[int], position: int) -> int | None:
        number, offset = divmod(position, self.page_size)
        return self.cells[pages[number]][offset]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        sources = [list(self.cells[source]) for source, _ in pairs]
        for (_, target), page in zip(pairs, sources, strict=True):
            self.cells[target] = page

    def forget(self, pages: set[int]) -> None:
        """So that nobody lives on what a free page happens to hold."""
        for page in self.cells.keys() & pages:
            del self.cells[page]


def history(tokens: Sequence[int]) -> list[int]:
    """What a sequence's cells must hold."""
    out = [0]
    for token in tokens:
        out.append(hash((out[-1], token)))
    return out[1:]


class Engine:
    """Plays generator, runner and cache, and looks at every step whether all is as it must be.

    Attributes:
        rows: by slot. Filled from what `admit` and `grow` told, and moved as `release` told.
        started: sequences, and how many started before them for the first time.
        line: those among them that were preempted and have not started again.
        peak: most pages in use before a decoding step.
    """

    def __init__(self, w: Workload) -> None:
        self.w = w
        self.cache = Cache(w.page_size)
        self.rows: list[Row] = []
        self.started: dict[Identity, int] = {}
        self.line: dict[Identity, list[int]] = {}
        self.answers: dict[Identity, list[int]] = {}
        self.rounds = self.num_read = self.num_prefilled = self.num_preempted = self.peak = 0
        self.expected = {identity(r): w.answer(r) for r in w.requests}
        self.histories = {
            identity(r): history([*r.prompt.token_ids, *w.answer(r)]) for r in w.requests
        }
        self.scheduler = Scheduler(
            self.read_groups(), w.slots, w.num_pages, w.page_size, w.max_new_tokens
        )

    def read_groups(self) -> Iterator[list[Request]]:
        for group in self.w.groups:
            in_line = self.num_read - len(self.started) + len(self.line)
            wanted = max(1, self.w.slots - len(self.rows))
            assert in_line < wanted, "a group was read before a slot was free for it"
            self.num_read += len(group)
            yield group

    def run(self) -> Engine:
        w = self.w
        # A round samples tokens, or it computes a prefix because nothing runs: so after an end.
        longest = max((len(h) for h in self.histories.values()), default=0)
        bound = w.num_tokens + len(w.requests) * (longest // w.budget + 1)
        while self.scheduler.has_work:
            self.round()
            self.rounds += 1
            assert self.rounds <= bound, "it does not come to an end"
        pool = self.scheduler.pool
        assert not self.rows and not self.scheduler.running and not self.line
        assert pool.free == w.num_pages and not pool._holders, "pages were lost"
        assert self.scheduler.prefill(w.budget) == [] and self.scheduler.admit() == ([], [])
        return self

    def round(self) -> None:
        chunks = self.scheduler.prefill(self.w.budget)
        self.prefill(chunks)
        self.start(*self.scheduler.admit())
        growth = self.scheduler.grow()
        self.grow(growth)
        if growth.preempted:
            self.preempt(growth.preempted)
        self.check_pages()
        if not self.rows:
            # Nothing could start: the first in line took all that a round can compute.
            assert [len(c.tokens) for c in chunks] == [self.w.budget], "nothing goes on"
            return
        stopped = self.decode()
        ended = sorted({*self.scheduler.advance(), *stopped})
        for slot in ended:
            self.check_answer(slot)
        if ended:
            self.release(ended)

    # --------------------------------------------------------- before decoding

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        lengths = [len(c.tokens) for c in chunks]
        assert sum(lengths) <= self.w.budget and 0 not in lengths
        assert not any(c.start for c in chunks[1:]), "only the first may go on with its prefix"
        self.num_prefilled += sum(lengths)
        written: set[tuple[int, int]] = set()
        for c in chunks:
            for position, token in enumerate(c.tokens, start=c.start):
                self.cache.write(c.pages, position, token)
                number, offset = divmod(position, self.w.page_size)
                cell = (c.pages[number], offset)
                assert cell not in written, "two prefixes in one cell"
                written.add(cell)

    def start(
        self, sequences: Sequence[RunningSequence], copies: Sequence[tuple[int, int]]
    ) -> None:
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets)
        assert not {source for source, _ in copies} & set(targets), "the order would matter"
        self.cache.copy(copies)
        for s in sequences:
            who = identity(s.request)
            assert s.slot == len(self.rows), "slots are not dense"
            if who in self.started:
                assert s.response == self.line.pop(who)
            else:
                self.started[who] = len(self.started)
                assert s.response == []
            assert s.tokens == [*s.request.prompt.token_ids, *s.response]
            assert s.start_position == len(s.tokens) - 1
            row = Row(s.request, list(s.pages), s.tokens[-1], s.start_position, list(s.response))
            self.rows.append(row)
        assert len(self.rows) <= self.w.slots
        if sequences and self.line:
            last = max(self.age(row) for row in self.rows)
            assert last < min(self.started[who] for who in self.line), "a younger one went before"

    def age(self, row: Row) -> int:
        return self.started[identity(row.request)]

    def grow(self, growth: Growth) -> None:
        for slot, number, page in growth.pages:
            assert number == len(self.rows[slot].pages), "a page was left out"
            self.rows[slot].pages.append(page)

    def preempt(self, preempted: Sequence[RunningSequence]) -> None:
        slots = [s.slot for s in preempted]
        ages = [self.age(row) for row in self.rows]
        stay = [age for slot, age in enumerate(ages) if slot not in slots]
        assert stay and max(stay) < min(ages[slot] for slot in slots), "not the youngest"
        for s in preempted:
            row = self.rows[s.slot]
            assert row.request is s.request
            assert self.scheduler.num_tokens(s) == len(row.response)
            assert s.pages == []
            self.line[identity(s.request)] = list(row.response)
            self.scheduler.requeue(s, row.response, [0.0] * len(row.response))
        self.num_preempted += len(preempted)
        self.release(slots)
        used = {page for row in self.rows for page in row.pages}
        in_use = self.w.num_pages - self.scheduler.pool.free
        assert in_use == len(used), "those in line were to lose their pages first"

    def check_pages(self) -> None:
        pool = self.scheduler.pool
        free, held = set(pool._free), set(pool._holders)
        assert len(pool._free) == len(free) == pool.free
        assert not free & held and free | held == set(range(self.w.num_pages))
        for row, s in zip(self.rows, self.scheduler.running, strict=True):
            assert row.request is s.request and row.pages == s.pages
            assert not free.intersection(row.pages), "a page is free, but in use"
            assert len(row.pages) == row.position // self.w.page_size + 1
        self.peak = max(self.peak, len(held))
        self.cache.forget(free)

    # --------------------------------------------------------------- decoding

    def decode(self) -> list[int]:
        """A step of all rows: first all write, then all read. Returns who met a stop token."""
        for row in self.rows:
            seen = self.cache.read(row.pages, row.position)
            assert seen == self.histories[identity(row.request)][: row.position]
        for row in self.rows:
            self.cache.write(row.pages, row.position, row.token)
        stopped: list[int] = []
        for slot, row in enumerate(self.rows):
            who = identity(row.request)
            row.position += 1
            own = self.histories[who][: row.position]
            assert self.cache.read(row.pages, row.position) == own
            row.token = sampled_token(who, row.position)
            row.response.append(row.token)
            if len(row.response) == self.w.stops[who]:
                stopped.append(slot)
        return stopped

    def check_answer(self, slot: int) -> None:
        row, s = self.rows[slot], self.scheduler.running[slot]
        who = identity(row.request)
        assert s.request is row.request
        assert self.scheduler.num_tokens(s) == len(row.response)
        assert who not in self.answers, "answered twice"
        assert row.response == self.expected[who]
        self.answers[who] = row.response

    def release(self, slots: list[int]) -> None:
        left = len(self.rows) - len(slots)
        sources, targets = self.scheduler.release(slots)
        assert len(sources) == len(targets) and len(set(targets)) == len(targets)
        assert set(targets) <= set(slots) and not set(sources) & set(slots)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        assert [s.slot for s in self.scheduler.running] == list(range(left))
