"""Intervals against the coverage that they promise, estimators against enumeration."""

from __future__ import annotations

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest

from opd_titan.data.types import Prompt, Sample
from opd_titan.evaluation.metrics import Comparison, HeldOut, Measurement, SetResult
from opd_titan.evaluation.statistics import (
    accuracy_interval,
    bootstrap_interval,
    gap_recovered,
    ks_of,
    pass_at_k,
    wilson,
)
from opd_titan.grading.graders import GRADERS, Grade

Z = 1.959963984540054


def binomial(count: int, share: float) -> list[float]:
    return [comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(count + 1)]


def right_and_wrong(right: int, count: int) -> np.ndarray:
    """Scores of one model, one response to each prompt [P, 1]."""
    return (np.arange(count) < right).astype(float)[:, None]


# ------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("count", [1, 2, 7, 1319])
def test_the_ends_of_wilson_are_where_its_test_rejects(count: int) -> None:
    """Its definition: |mean - p| is Z standard errors of p itself; and the ends 0 and 1."""
    for right in {0, 1, count // 3, count - 1, count}:
        mean = right / count
        low, high = wilson(mean, count)
        assert 0.0 <= low <= mean <= high <= 1.0
        for end in (low, high):
            if 0.0 < end < 1.0:
                assert abs(mean - end) == pytest.approx(Z * sqrt(end * (1 - end) / count))
    assert wilson(0.0, count)[0] == 0.0 and wilson(1.0, count)[1] == 1.0


@pytest.mark.parametrize("count", [10, 30, 100])
def test_coverage_of_one_set_over_all_outcomes(count: int) -> None:
    """Exact, for shares from 1 % to 99 %: Wilson's interval, and the bootstrap in its place."""

    def covered(intervals: list[tuple[float, float]], share: float) -> float:
        chances = zip(binomial(count, share), intervals, strict=True)
        return sum(chance for chance, (low, high) in chances if low <= share <= high)

    outcomes = [right_and_wrong(right, count) for right in range(count + 1)]
    shares = np.linspace(0.01, 0.99, 99)
    by_wilson = [accuracy_interval([scores_P1]) for scores_P1 in outcomes]
    coverage = [covered(by_wilson, share) for share in shares]
    assert 0.945 <= np.mean(coverage) <= 0.965
    assert min(coverage) >= 0.83  # as Brown, Cai and DasGupta have it for Wilson's
    by_bootstrap = [bootstrap_interval([s], lambda means_R1: means_R1[:, 0]) for s in outcomes]
    coverage = [covered(by_bootstrap, share) for share in shares]
    assert 0.95 <= np.mean(coverage) <= 0.975
    assert min(coverage) >= 0.92


@pytest.mark.parametrize("shares", [(0.5, 0.9), (0.95, 0.98), (0.1, 0.6)])
def test_coverage_of_the_mean_of_two_sets_over_all_outcomes(shares: tuple[float, float]) -> None:
    counts, covered = (20, 30), 0.0
    chances = [binomial(n, p) for n, p in zip(counts, shares, strict=True)]
    for i, first in enumerate(chances[0]):
        for j, second in enumerate(chances[1]):
            if first * second < 1e-7:
                continue
            sets = [right_and_wrong(i, counts[0]), right_and_wrong(j, counts[1])]
            low, high = accuracy_interval(sets)
            covered += first * second * (low <= np.mean(shares) <= high)
    assert 0.94 <= covered <= 0.985


@pytest.mark.parametrize(("prompts", "samples"), [(40, 4), (100, 8)])
def test_several_samples_each_are_covered_where_they_depend_on_the_prompt(
    prompts: int, samples: int
) -> None:
    """Easy and hard prompts; to take all samples for independent would cover far less."""
    random = np.random.default_rng(0)
    truth, rounds = 0.5 / 1.2, 300
    over_prompts = over_samples = 0
    for _ in range(rounds):
        skill_P = random.beta(0.5, 0.7, prompts)
        scores_PN = (random.random((prompts, samples)) < skill_P[:, None]).astype(float)
        low, high = accuracy_interval([scores_PN])
        over_prompts += low <= truth <= high
        low, high = wilson(scores_PN.mean(), scores_PN.size)
        over_samples += low <= truth <= high
    assert 0.93 <= over_prompts / rounds <= 0.98
    assert over_samples / rounds < 0.85


def test_equal_scores_everywhere_leave_some_doubt() -> None:
    for score in (0.0, 1.0):
        for sets in ([np.full((10, 2), score)], [np.full((4, 1), score), np.full((6, 1), score)]):
            low, high = accuracy_interval(sets)
            assert low <= score <= high and 0.2 <= high - low <= 0.45


# ------------------------------------------------------------------------- pass@k


def test_pass_at_k_is_the_share_of_all_choices_of_k() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            outcomes = [i < correct for i in range(n)]
            for k in range(1, n + 1):
                chosen = [any(c) for c in combinations(outcomes, k)]
                assert pass_at_k(correct, n, k) == pytest.approx(sum(chosen) / len(chosen))
    assert [ks_of(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def measured(*sets: list[list[float]]) -> Measurement:
    results = []
    for i, scores_PN in enumerate(sets):
        prompts = [Prompt(p, "", (1,), answer="1") for p in range(len(scores_PN))]
        samples = [
            Sample(prompts[p], n, [1] * (n + 1), "stop")
            for p, scores in enumerate(scores_PN)
            for n in range(len(scores))
        ]
        grades = [Grade(score) for scores in scores_PN for score in scores]
        results.append(SetResult(HeldOut(f"s{i}", prompts, GRADERS["auto"]), samples, grades))
    return Measurement(results)


def test_a_measurement_of_several_sets_is_the_plain_mean_of_its_sets() -> None:
    m = measured([[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 0]])
    scalars = m.scalars()
    assert scalars["validation/s0/accuracy"] == 0.25 and scalars["validation/s1/accuracy"] == 0.75
    assert scalars["validation/accuracy"] == 0.5
    assert m.sets[0].pass_at == {1: 0.25, 2: pytest.approx(5 / 12), 4: 0.5}
    assert scalars["validation/pass_at_2"] == pytest.approx((5 / 12 + 1) / 2)
    assert scalars["validation/s1/pass_at_4"] == 1.0
    assert scalars["validation/response_tokens_mean"] == 2.5
    # A partial score does not pass.
    assert measured([[0.5, 1.0, 0.0, 0.5]]).pass_at == {1: 0.25, 2: 0.5, 4: 1.0}
    only = measured([[1.0], [0.5]])
    assert only.accuracy == 0.75 and only.pass_at == {} and only.by_prompt == [[1.0, 0.5]]
    assert only.interval == wilson(0.75, 2)
    assert not any(name.count("/") > 1 for name in only.scalars())


# ------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(("count", "differ"), [(30, 0.1), (30, 0.4), (100, 0.05)])
def test_equal_models_are_within_noise_in_95_of_100_cases(count: int, differ: float) -> None:
    """Exact, over all numbers of prompts on which two models differ, and of those that one wins."""
    alarms = 0.0
    for differing, chance in enumerate(binomial(count, differ)):
        if chance < 1e-4:
            continue
        for won, share in enumerate(binomial(differing, 0.5)):
            if share < 1e-4:
                continue
            student = [1.0] * won + [0.0] * (differing - won) + [1.0] * (count - differing)
            start = [0.0] * won + [1.0] * (differing - won) + [1.0] * (count - differing)
            compared = Comparison([student], [start], [start])
            alarms += chance * share * (not compared.within_noise("student", "start"))
    assert alarms <= 0.05


def comparison(student: float, start: float, teacher: float, prompts: int) -> Comparison:
    """Scores of one sample each, drawn independently with these shares."""
    random = np.random.default_rng(5)
    shares = (student, start, teacher)
    return Comparison(*([(random.random(prompts) < p).astype(float).tolist()] for p in shares))


def test_what_is_within_noise_is_said() -> None:
    clear = comparison(0.7, 0.3, 0.9, 200)
    assert not clear.within_noise("student", "start") and "noise" not in clear.text()
    unclear = comparison(0.33, 0.3, 0.9, 100)
    assert "; the student is within noise of the start" in unclear.text()
    no_gap = comparison(0.5, 0.5, 0.54, 60)
    assert no_gap.gap is not None and "the teacher is within noise of the start" in no_gap.text()
    assert no_gap.gap_interval is None and "validation/gap_recovered_low" not in no_gap.scalars()
    worse = comparison(0.5, 0.6, 0.2, 100)
    assert worse.gap is None and "gap" not in worse.text()
    # Two sets, each of them too small to tell.
    better, worse_scores = [1.0] * 4 + [0.0] * 16, [0.0] * 20
    alone = Comparison([better], [worse_scores], [better])
    both = Comparison([better] * 2, [worse_scores] * 2, [better] * 2)
    assert not both.within_noise("student", "start")
    assert alone.each[0].text() == both.each[1].text()


def test_the_gap_has_the_interval_of_a_ratio() -> None:
    """Against the delta method, which many prompts and a wide gap allow."""
    c = comparison(0.6, 0.3, 0.9, 4000)
    student, start, teacher = (np.array(scores[0]) for scores in (c.student, c.start, c.teacher))
    gap = (student.mean() - start.mean()) / (teacher.mean() - start.mean())
    residual = (student - start) - gap * (teacher - start)
    error = residual.std() / sqrt(4000) / (teacher.mean() - start.mean())
    assert c.gap == pytest.approx(gap)
    assert c.gap_interval == pytest.approx((gap - Z * error, gap + Z * error), abs=0.15 * error)
    again = Comparison(c.student, c.start, c.teacher)
    assert again.gap_interval == c.gap_interval  # no other figures the next time


def test_the_gap_is_covered_as_promised() -> None:
    """Answers that depend on each other through the prompt, from few prompts to the ceiling."""
    random = np.random.default_rng(7)
    for truth, prompts in [((0.6, 0.3, 0.8), 60), ((0.97, 0.3, 0.98), 100)]:
        gap, covered, rounds = (truth[0] - truth[1]) / (truth[2] - truth[1]), 0, 100
        for _ in range(rounds):
            shared_P1, own_P3 = random.random((prompts, 1)), random.random((prompts, 3))
            alike_P1 = random.random((prompts, 1)) < 0.6
            scores_PM = (np.where(alike_P1, shared_P1, own_P3) < np.array(truth)).astype(float)
            low, high = bootstrap_interval([scores_PM], gap_recovered)
            covered += low <= gap <= high
        assert covered / rounds >= 0.93, truth
    equal = comparison(1.0, 0.3, 1.0, 500).gap_interval
    assert equal is not None and equal[0] < 0.998 and equal[1] >= 1.0


def test_a_ratio_without_bounds_has_no_interval() -> None:
    equal = Comparison([[1.0, 0.0]], [[0.0, 0.0]], [[0.5, 0.0]])
    assert equal.gap == 2.0 and equal.gap_interval is None
    assert gap_recovered(np.array([0.5, 0.0, 1.0])) == 0.5
    assert gap_recovered(np.array([[0.4, 0.5, 0.5], [0.6, 0.5, 0.5]])).tolist() == [-np.inf, np.inf]
