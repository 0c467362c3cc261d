"""The scheduler against a simulation of what stands in each slot. No torch anywhere here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from opd_titan.data.types import Prompt
from opd_titan.rollout.scheduler import Request, Scheduler

settings.register_profile("scheduler", deadline=None, max_examples=300)
settings.load_profile("scheduler")


@dataclass
class Workload:
    """`durations`: tokens that each request runs for, counting the one that prefill gives."""

    requests: list[Request]
    durations: dict[tuple[int, int], int]
    slots: int
    budget: int


def request(index: int, sample_index: int, length: int) -> Request:
    return Request(Prompt(index, "", (0,) * length), sample_index, key=0)


def identity(r: Request) -> tuple[int, int]:
    return r.prompt.index, r.sample_index


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    groups = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), max_size=10))
    requests = [request(i, s, n) for i, (n, size) in enumerate(groups) for s in range(size)]
    if draw(st.booleans()):  # samples of one prompt need not stand side by side
        requests = draw(st.permutations(requests))
    lengths = st.integers(1, 12)
    return Workload(
        requests,
        {identity(r): draw(lengths) for r in requests},
        draw(st.integers(1, 12)),
        draw(st.integers(1, 120)),
    )


@dataclass
class Trace:
    admissions: list[list[Request]] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    moves: int = 0


def simulate(w: Workload) -> Trace:
    """Play the generator: slots hold who runs there; every step gives each of them one token."""
    scheduler, trace = Scheduler(w.requests, w.slots), Trace()
    contents: list[tuple[int, int] | None] = [None] * w.slots
    left = dict(w.durations)
    while scheduler.has_work:
        admitted = scheduler.admit(w.budget)
        trace.admissions.append(admitted)
        n = len(scheduler.running)
        assert 0 < n <= w.slots, "work, but nothing runs"
        first = n - len(admitted) if admitted else 0
        assert scheduler.running[first:] == admitted or not admitted
        for slot, r in enumerate(admitted, start=first):
            assert contents[slot] is None, "a slot was given away twice"
            contents[slot] = identity(r)
        for slot in range(first, n):
            left[contents[slot]] -= 1
        finished = [slot for slot in range(first, n) if left[contents[slot]] == 0]
        trace.finished += [contents[slot] for slot in finished]
        sources, targets = scheduler.release(finished)
        assert set(targets) <= set(finished)
        assert not set(sources) & (set(targets) | set(finished))
        assert len(sources) == len(targets) == len(set(sources)) == len(set(targets))
        for source, target in zip(sources, targets, strict=True):
            contents[target] = contents[source]
        trace.moves += len(sources)
        running = [identity(r) for r in scheduler.running]
        assert contents[: len(running)] == running, "slots are not dense, or someone was mixed up"
        contents[len(running) :] = [None] * (w.slots - len(running))
    assert all(n == 0 for n in left.values())
    return trace


@given(workloads())
def test_every_request_runs_once_in_dense_slots_under_its_own_name(w: Workload) -> None:
    trace = simulate(w)
    assert sorted(trace.finished) == sorted(identity(r) for r in w.requests)


@given(workloads())
def test_first_come_first_served(w: Workload) -> None:
    assert [r for admitted in simulate(w).admissions for r in admitted] == w.requests


@given(workloads())
def test_prefill_stays_in_its_budget_and_fills_it(w: Workload) -> None:
    waiting, free = list(w.requests), w.slots
    scheduler = Scheduler(w.requests, w.slots)
    while waiting and free:
        admitted = scheduler.admit(w.budget)
        prompts = [p for p, _ in groupby(r.prompt for r in admitted)]
        tokens = sum(len(p.token_ids) for p in prompts)
        assert tokens <= w.budget or len(prompts) == 1
        waiting, free = waiting[len(admitted) :], free - len(admitted)
        if waiting and free:  # it stopped although a slot was free: the next prompt does not fit
            assert waiting[0].prompt != prompts[-1]
            assert tokens + len(waiting[0].prompt.token_ids) > w.budget


def test_samples_of_one_prompt_count_its_tokens_once() -> None:
    group = [request(0, s, 10) for s in range(4)]
    assert Scheduler(group, 8).admit(10) == group
    assert Scheduler(group, 3).admit(10) == group[:3]
    # Also when the prompt alone is over the budget: its siblings cost nothing more.
    assert Scheduler(group, 8).admit(1) == group
    assert Scheduler([*group, request(1, 0, 1)], 8).admit(10) == group
    assert len(Scheduler([*group, request(1, 0, 1)], 8).admit(11)) == 5
    alternating = [request(i, s, 10) for s in range(2) for i in range(2)]
    assert len(Scheduler(alternating, 8).admit(20)) == 2


def test_a_survivor_moves_at_most_once() -> None:
    scheduler = Scheduler([request(i, 0, 1) for i in range(100)], 100)
    scheduler.admit(1000)
    assert scheduler.release(list(range(99))) == ([99], [0])
    assert [r.prompt.index for r in scheduler.running] == [99]
    assert scheduler.release([0]) == ([], [])
    assert not scheduler.has_work


def test_nothing_to_do() -> None:
    scheduler = Scheduler([], 1)
    assert not scheduler.has_work
    assert scheduler.admit(100) == []
    assert scheduler.release([]) == ([], [])


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, opd_titan.rollout.scheduler as s; print(s.__name__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["opd_titan.rollout.scheduler", "False"]
