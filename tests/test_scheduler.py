"""The scheduler, driven by an engine that looks at every step whether all is as it must be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import Engine, Workload, identity, make_group, pages_for

from opd_titan.rollout.scheduler import Chunk, Growth, Request, RunningSequence, Scheduler

properties = settings(deadline=None, max_examples=200)
thoroughly = settings(deadline=None, max_examples=600)

# --------------------------------------------------------------------- workloads

LENGTHS = st.integers(1, 40)
NEW_TOKENS = st.integers(1, 20)
NEVER = 100
# What one request may have of its own: its limit, and when a stop token comes.
ENDS = st.tuples(st.none() | NEW_TOKENS, st.just(NEVER) | NEW_TOKENS)
GROUPS = st.tuples(LENGTHS, st.lists(ENDS, min_size=1, max_size=5))


@st.composite
def workloads(draw: st.DrawFn, plenty: bool = False) -> Workload:
    drawn = draw(st.lists(GROUPS, max_size=8))
    groups = [make_group(i, n, [limit for limit, _ in e]) for i, (n, e) in enumerate(drawn)]
    w = Workload(
        groups,
        {(i, k): stop for i, (_, ends) in enumerate(drawn) for k, (_, stop) in enumerate(ends)},
        slots=draw(st.integers(1, 12)),
        num_pages=0,
        page_size=draw(st.integers(1, 16)),
        budget=draw(st.integers(1, 120)),
        max_new_tokens=draw(NEW_TOKENS),
    )
    bare = max((w.pages(r) for r in w.requests), default=1)
    # Half of them are short of pages: there the scheduler has most to do.
    few = st.integers(bare, 2 * bare) | st.integers(bare, max(bare, w.enough_pages))
    w.num_pages = w.enough_pages if plenty else draw(few)
    return w


# ------------------------------------------------------------------- properties


@thoroughly
@given(workloads())
def test_every_request_gets_its_own_tokens_once_whatever_the_memory(w: Workload) -> None:
    engine = Engine(w).run()
    assert engine.answers == engine.expected
    assert list(engine.started) == [identity(r) for r in w.requests]
    assert engine.num_read == len(w.requests)


@properties
@given(workloads(plenty=True))
def test_with_enough_memory_a_prefix_is_computed_once_and_nobody_is_preempted(w: Workload) -> None:
    engine = Engine(w).run()
    assert engine.num_preempted == 0
    assert engine.num_prefilled == sum(len(g[0].prompt.token_ids) - 1 for g in w.groups)


@properties
@given(LENGTHS, NEW_TOKENS, *[st.integers(1, n) for n in (5, 12, 16, 120)])
def test_a_group_shares_the_full_pages_of_its_prompt(
    length: int, new: int, size: int, slots: int, page_size: int, budget: int
) -> None:
    w = Workload(
        [make_group(0, length, [None] * size)],
        {(0, i): NEVER for i in range(size)},
        slots,
        1000,
        page_size,
        budget,
        new,
    )
    shared, in_last = divmod(length - 1, page_size)
    own = pages_for(length + new - 1, page_size) - shared
    for_later = slots < size and in_last > 0  # the half-filled page, to be copied
    assert Engine(w).run().peak == shared + min(slots, size) * own + for_later


@properties
@given(st.lists(LENGTHS, min_size=1, max_size=3), NEW_TOKENS, *[st.integers(1, n) for n in (5, 16)])
def test_a_cache_for_one_sequence_is_enough(
    lengths: list[int], new: int, size: int, page_size: int
) -> None:
    groups = [make_group(i, length, [None] * size) for i, length in enumerate(lengths)]
    stops = {identity(r): NEVER for group in groups for r in group}
    num_pages = pages_for(max(lengths) + new - 1, page_size)
    engine = Engine(Workload(groups, stops, 12, num_pages, page_size, 7, new)).run()
    assert engine.answers == engine.expected


# ---------------------------------------------------------------------- by hand


def scheduler_of(
    *groups: list[Request], slots: int = 8, pages: int = 100, page_size: int = 4, new: int = 4
) -> Scheduler:
    return Scheduler(groups, slots, pages, page_size, new)


def pages_of(sequences: Sequence[RunningSequence]) -> list[list[int]]:
    return [s.pages for s in sequences]


def chunk(r: Request, start: int, end: int, pages: list[int]) -> Chunk:
    return Chunk(list(r.prompt.token_ids[start:end]), start, pages)


def test_a_half_filled_page_is_copied_and_the_last_one_takes_it_over() -> None:
    group = make_group(0, 6, [None] * 3)
    scheduler = scheduler_of(group, pages=10)
    # The prefix is five tokens: page 0 is full, one token is in page 1.
    assert scheduler.prefill(100) == [chunk(group[0], 0, 5, [0, 1])]
    started, copies = scheduler.admit()
    assert [s.request for s in started] == group and [s.slot for s in started] == [0, 1, 2]
    assert copies == [(1, 2), (1, 3)]
    assert pages_of(started) == [[0, 2], [0, 3], [0, 1]]
    assert scheduler.pool.free == 6
    # They feed positions 5 to 8: the last of them is in a new page.
    for _ in range(3):
        assert scheduler.grow() == Growth([], [])
        assert scheduler.advance() == []
    assert scheduler.grow() == Growth([(0, 2, 4), (1, 2, 5), (2, 2, 6)], [])
    assert scheduler.advance() == [0, 1, 2]
    assert scheduler.release([0, 1, 2]) == ([], [])
    assert scheduler.pool.free == 10 and not scheduler.has_work


def test_where_all_pages_are_full_none_is_copied() -> None:
    group = make_group(0, 5, [None] * 3)
    scheduler = scheduler_of(group)
    assert scheduler.prefill(100) == [chunk(group[0], 0, 4, [0])]
    started, copies = scheduler.admit()
    assert copies == [] and pages_of(started) == [[0, 1], [0, 2], [0, 3]]


def test_a_group_that_starts_in_parts_takes_the_page_over_at_its_end() -> None:
    group = make_group(0, 3, [1, 1, 1])
    scheduler = scheduler_of(group, slots=2)
    assert scheduler.prefill(100) == [chunk(group[0], 0, 2, [0])]
    started, copies = scheduler.admit()
    assert copies == [(0, 1), (0, 2)] and pages_of(started) == [[1], [2]]
    assert scheduler.grow() == Growth([], [])
    assert scheduler.advance() == [0, 1]
    scheduler.release([0, 1])
    assert scheduler.prefill(100) == []
    started, copies = scheduler.admit()
    assert copies == [] and pages_of(started) == [[0]]


def test_a_prompt_of_one_token_has_nothing_to_compute() -> None:
    scheduler = scheduler_of(make_group(0, 1, [None] * 2))
    assert scheduler.prefill(100) == []
    started, copies = scheduler.admit()
    assert copies == [] and pages_of(started) == [[0], [1]]
    assert [s.start_position for s in started] == [0, 0]


def test_a_long_prefix_takes_three_rounds_and_the_next_fills_the_last() -> None:
    (long,), (short,), (third,) = groups = [
        make_group(i, n, [None]) for i, n in enumerate((11, 2, 4))
    ]
    scheduler = scheduler_of(*groups)
    chunks, started = [], []
    for _ in range(4):
        chunks.append(scheduler.prefill(4))
        started.append([s.request for s in scheduler.admit()[0]])
    assert chunks == [
        [chunk(long, 0, 4, [0])],
        [chunk(long, 4, 8, [0, 1])],
        # One token of the budget is left, which is not all of the third.
        [chunk(long, 8, 10, [0, 1, 2]), chunk(short, 0, 1, [3])],
        [chunk(third, 0, 3, [4])],
    ]
    assert started == [[], [], [long, short], [third]]


def test_the_youngest_is_preempted_and_goes_on_when_one_has_ended() -> None:
    (first,), (second,) = groups = [make_group(i, 2, [None]) for i in range(2)]
    scheduler = scheduler_of(*groups, pages=3, page_size=2)
    assert scheduler.prefill(100) == [chunk(first, 0, 1, [0]), chunk(second, 0, 1, [1])]
    _, younger = scheduler.admit()[0]
    assert scheduler.grow() == Growth([], [])
    assert scheduler.advance() == []
    # Both need a page, and there is one.
    assert scheduler.grow() == Growth([(0, 1, 2)], [younger])
    assert scheduler.num_tokens(younger) == 1
    scheduler.requeue(younger, [7], [-0.5])
    assert scheduler.release([1]) == ([], [])
    for ended in ([], [], [0]):
        assert scheduler.advance() == ended
        # There is a page, but the first one is to have it.
        assert scheduler.prefill(100) == [] and scheduler.admit() == ([], [])
        if not ended:
            scheduler.grow()
    assert scheduler.pool.free == 0
    scheduler.release([0])
    assert scheduler.prefill(100) == [Chunk(list(second.prompt.token_ids), 0, [0])]
    (again,), copies = scheduler.admit()
    assert again.request is second and copies == []
    assert again.response == [7] and again.logprobs == [-0.5]
    assert again.tokens == [*second.prompt.token_ids, 7] and again.start_position == 2
    for ended in ([], [], [0]):  # three tokens are left to it
        scheduler.grow()
        assert scheduler.advance() == ended
    scheduler.release([0])
    assert scheduler.pool.free == 3 and not scheduler.has_work


def test_those_in_line_lose_their_pages_before_one_that_runs() -> None:
    first, group = make_group(0, 2, [None]), make_group(1, 3, [None] * 2)
    scheduler = scheduler_of(first, group, slots=2, pages=2, page_size=3)
    assert scheduler.prefill(100) == [chunk(first[0], 0, 1, [0]), chunk(group[0], 0, 2, [1])]
    started, copies = scheduler.admit()
    assert pages_of(started) == [[0]] and copies == []  # no page to copy that of the group into
    for _ in range(2):
        assert scheduler.grow() == Growth([], [])
        scheduler.advance()
        assert scheduler.prefill(100) == [] and scheduler.admit() == ([], [])
    assert scheduler.grow() == Growth([(0, 1, 1)], [])
    for _ in range(2):
        scheduler.advance()
    scheduler.release([0])
    assert scheduler.prefill(100) == [chunk(group[0], 0, 2, [0])]


def test_one_that_fills_the_cache_takes_what_its_group_had() -> None:
    group = make_group(0, 6, [2, 2])
    scheduler = scheduler_of(group, pages=2)
    assert scheduler.prefill(100) == [chunk(group[0], 0, 5, [0, 1])]
    started, copies = scheduler.admit()
    assert copies == [] and pages_of(started) == [[0, 1]]
    assert scheduler.prefill(100) == []  # no page
    scheduler.advance()
    assert scheduler.advance() == [0]
    scheduler.release([0])
    # The full page was kept.
    assert scheduler.prefill(100) == [chunk(group[0], 4, 5, [0, 1])]
    assert pages_of(scheduler.admit()[0]) == [[0, 1]]


def test_a_survivor_moves_at_most_once() -> None:
    scheduler = scheduler_of(*[make_group(i, 1, [None]) for i in range(100)], slots=100)
    scheduler.admit()
    assert scheduler.running == []  # `prefill` reads the groups
    assert scheduler.prefill(1000) == []
    scheduler.admit()
    assert scheduler.release(list(range(99))) == ([99], [0])
    assert [s.request.prompt.index for s in scheduler.running] == [99]
    assert scheduler.release([0]) == ([], [])
    assert scheduler.pool.free == 100 and not scheduler.has_work


def test_nothing_to_do() -> None:
    scheduler = scheduler_of()
    assert not scheduler.has_work
    assert scheduler.prefill(100) == [] and scheduler.admit() == ([], [])
    assert scheduler.grow() == Growth([], [])
    assert scheduler.advance() == [] and scheduler.release([]) == ([], [])


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, opd_titan.rollout.scheduler as s; print(s.__name__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["opd_titan.rollout.scheduler", "False"]
