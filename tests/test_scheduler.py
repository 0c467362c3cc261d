"""The scheduler in an engine that checks each step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_python
from simulated_engine import Engine, Workload, identity, make_group, pages_for

from opd_titan.rollout.scheduler import Chunk, Request, Scheduler

properties = settings(deadline=None, max_examples=200)

# --------------------------------------------------------------------- workloads

LENGTHS = st.integers(1, 40)
NEW_TOKENS = st.integers(1, 20)
NEVER = 100
# What a request has of its own: its limit, and when a stop token comes.
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
        lag=draw(st.integers(0, 1)),
    )
    bare = max((w.pages(r) for r in w.requests), default=1)
    # Half of them are short of pages, where the scheduler has most to do.
    few = st.integers(bare, 2 * bare) | st.integers(bare, max(bare, w.enough_pages))
    w.num_pages = w.enough_pages if plenty else draw(few)
    return w


# ------------------------------------------------------------------- properties


@settings(deadline=None, max_examples=400)
@given(workloads())
def test_every_request_gets_its_own_tokens_once_whatever_the_memory(w: Workload) -> None:
    engine = Engine(w).run()
    assert engine.answers == engine.expected
    assert list(engine.order) == [identity(r) for r in w.requests]
    assert engine.num_read == len(w.requests)


@properties
@given(workloads(), st.data())
def test_a_limit_on_all_tokens_ends_only_what_is_cut(w: Workload, data: st.DataObject) -> None:
    w.max_tokens = data.draw(st.integers(max(1, len(w.requests)), max(1, w.num_tokens)))
    engine = Engine(w).run()  # checks that no response is shorter than the cut
    assert engine.answers.keys() == engine.expected.keys()


@properties
@given(workloads(plenty=True))
def test_with_enough_memory_a_prefix_is_computed_once_and_none_is_preempted(w: Workload) -> None:
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
    for_later = slots < size and in_last > 0  # the partly filled page, to be copied
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


def test_the_budget_of_a_step_is_filled_with_whole_prefixes() -> None:
    long, short, third = groups = [make_group(i, n, [None]) for i, n in enumerate((11, 2, 4))]
    scheduler = Scheduler(
        groups, slots=8, num_pages=100, page_size=4, max_new_tokens=4, max_prefill_tokens=4
    )
    work = [scheduler.schedule() for _ in range(3)]
    scheduler.postprocess()
    work.append(scheduler.schedule())

    def chunk(group: list[Request], start: int, end: int, pages: list[int]) -> Chunk:
        return Chunk(list(group[0].prompt.token_ids[start:end]), start, pages)

    assert [w.chunks for w in work] == [
        [chunk(long, 0, 4, [0])],
        [chunk(long, 4, 8, [0, 1])],
        # One token of the budget is left, which is not all of the third prefix.
        [chunk(long, 8, 10, [0, 1, 2]), chunk(short, 0, 1, [3])],
        [chunk(third, 0, 3, [4])],
    ]
    started = [[s.request for s in w.started] for w in work]
    assert started == [[], [], [*long, *short], third]


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, opd_titan.rollout.scheduler as s; print(s.__name__, 'torch' in sys.modules)"
    assert run_python("-c", code).stdout.split() == ["opd_titan.rollout.scheduler", "False"]
