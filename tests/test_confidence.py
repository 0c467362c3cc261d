"""Intervals against the coverage that they promise, estimators against enumeration."""

from __future__ import annotations

from itertools import combinations, product
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
    mean_interval,
    paired_p_value,
    pass_at_k,
    wilson,
)
from opd_titan.grading.graders import GRADERS, Grade

Z = 1.959963984540054


def binomial(count: int, share: float) -> list[float]:
    return [comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(count + 1)]


# ------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1319])
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


@pytest.mark.parametrize("count", [10, 30, 100, 500])
def test_one_sample_each_is_covered_as_promised(count: int) -> None:
    """Exact coverage over all outcomes, for shares from 1 % to 99 %."""
    intervals = [accuracy_interval([[1.0]] * i + [[0.0]] * (count - i)) for i in range(count + 1)]
    covered = []
    for share in np.linspace(0.01, 0.99, 197):
        chances = binomial(count, share)
        covered.append(
            sum(p for p, (a, b) in zip(chances, intervals, strict=True) if a <= share <= b)
        )
    assert 0.945 <= np.mean(covered) <= 0.965
    assert min(covered) >= 0.83  # as Brown, Cai and DasGupta have it for Wilson's


@pytest.mark.parametrize(("prompts", "samples"), [(40, 4), (150, 8)])
def test_several_samples_each_are_covered_where_they_depend_on_the_prompt(
    prompts: int, samples: int
) -> None:
    """Easy and hard prompts; to take all samples for independent would cover far less."""
    random = np.random.default_rng(0)
    truth, rounds = 0.5 / 1.2, 600
    clustered = naive = 0
    for _ in range(rounds):
        skill_P = random.beta(0.5, 0.7, prompts)
        scores_PN = (random.random((prompts, samples)) < skill_P[:, None]).astype(float)
        low, high = accuracy_interval(scores_PN.tolist())
        clustered += low <= truth <= high
        low, high = wilson(scores_PN.mean(), scores_PN.size)
        naive += low <= truth <= high
    assert 0.93 <= clustered / rounds <= 0.975
    assert naive / rounds < 0.85


def test_limits_of_several_samples() -> None:
    apart = accuracy_interval([[0.0, 1.0]] * 50)  # no difference between prompts
    assert apart == pytest.approx(wilson(0.5, 50))
    alike = accuracy_interval([[1.0] * 4] * 10 + [[0.0] * 4] * 10)  # none within
    assert alike == pytest.approx(wilson(0.5, 20))
    assert accuracy_interval([[1.0, 1.0]] * 10) == wilson(1.0, 10)
    assert accuracy_interval([[1.0, 0.0, 1.0, 1.0]]) == wilson(0.75, 1)


def test_the_mean_of_sets_is_covered_as_promised() -> None:
    random = np.random.default_rng(1)
    shares, counts, rounds, covered = (0.9, 0.5, 0.98), (30, 100, 60), 2000, 0
    for _ in range(rounds):
        means = [random.binomial(n, p) / n for n, p in zip(counts, shares, strict=True)]
        ends = [wilson(m, n) for m, n in zip(means, counts, strict=True)]
        low, high = mean_interval(means, ends)
        covered += low <= np.mean(shares) <= high
    assert 0.935 <= covered / rounds <= 0.975
    assert mean_interval([0.3], [(0.2, 0.5)]) == pytest.approx((0.2, 0.5))


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
    m = measured([[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0]])
    scalars = m.scalars()
    assert scalars["validation/s0/accuracy"] == 0.25 == scalars["validation/s1/accuracy"]
    assert scalars["validation/accuracy"] == 0.25
    assert m.sets[0].pass_at == {1: 0.25, 2: pytest.approx(5 / 12), 4: 0.5}
    assert scalars["validation/pass_at_2"] == pytest.approx((5 / 12 + 1 / 2) / 2)
    assert scalars["validation/s1/pass_at_4"] == 1.0
    assert scalars["validation/response_tokens_mean"] == 2.5
    (only,) = measured([[1.0], [0.5]]).sets
    assert only.accuracy == 0.75 and only.pass_at == {}
    assert not any(name.count("/") > 1 for name in measured([[1.0], [0.5]]).scalars())


# ------------------------------------------------------------------------- pairs


def by_enumeration(sets: list[np.ndarray]) -> float:
    """The share of all sign patterns that part the models at least as far."""
    weighted = np.concatenate([d / len(d) / len(sets) for d in sets])
    patterns = np.array(list(product((-1, 1), repeat=weighted.size)))
    observed = abs(weighted.sum())
    return float((np.abs(patterns @ weighted) >= observed - 1e-12).mean())


@pytest.mark.parametrize("better, worse", [(0, 0), (3, 0), (5, 1), (6, 0), (4, 4), (9, 2)])
def test_one_sample_each_is_the_exact_test_of_mcnemar(better: int, worse: int) -> None:
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 3)
    n = better + worse
    tail = sum(comb(n, i) for i in range(max(better, worse), n + 1)) / 2**n
    assert paired_p_value([differences]) == pytest.approx(min(1.0, 2 * tail))
    assert paired_p_value([differences]) == pytest.approx(by_enumeration([differences]))
    assert paired_p_value([-differences]) == paired_p_value([differences])


def test_several_samples_each_are_tested_by_flipping_signs() -> None:
    random = np.random.default_rng(3)
    for shift in (0, 1, 2):
        first = random.integers(-3, 4, 9) / 4 + shift / 8
        second = random.integers(-3, 4, 5) / 4 + shift / 8
        for sets in ([first], [first, second]):
            assert paired_p_value(sets) == pytest.approx(by_enumeration(sets), abs=0.02)


def comparison(student: float, start: float, teacher: float, prompts: int) -> Comparison:
    """Scores of one sample each, drawn independently with these shares."""
    random = np.random.default_rng(5)
    shares = (student, start, teacher)
    return Comparison(*([(random.random(prompts) < p).astype(float).tolist()] for p in shares))


def test_the_gap_has_the_interval_of_a_ratio() -> None:
    """Against the delta method, which many prompts and a wide gap allow."""
    c = comparison(0.6, 0.3, 0.9, 4000)
    student, start, teacher = (np.array(scores[0]) for scores in (c.student, c.start, c.teacher))
    gap = (student.mean() - start.mean()) / (teacher.mean() - start.mean())
    residual = (student - start) - gap * (teacher - start)
    error = residual.std() / sqrt(4000) / (teacher.mean() - start.mean())
    assert c.gap == pytest.approx(gap)
    assert c.gap_interval == pytest.approx((gap - Z * error, gap + Z * error), abs=0.15 * error)
    assert c.gap_interval == c.gap_interval  # no other figures the next time


def test_what_is_within_noise_is_said() -> None:
    clear = comparison(0.7, 0.3, 0.9, 200)
    assert clear.chance("student", "start") < 1e-6 and "noise" not in clear.text()
    unclear = comparison(0.33, 0.3, 0.9, 100)
    assert "; within noise of the start (p = " in unclear.text()
    no_gap = comparison(0.5, 0.5, 0.54, 60)
    assert no_gap.gap is not None and "the teacher is within noise of the start" in no_gap.text()
    assert no_gap.gap_interval is None and "validation/gap_recovered_low" not in no_gap.scalars()
    worse = comparison(0.5, 0.6, 0.2, 100)
    assert worse.gap is None and "gap" not in worse.text()


def test_the_gap_is_covered_as_promised() -> None:
    """Answers that depend on each other through the prompt, from few prompts to the ceiling."""
    random = np.random.default_rng(7)
    for truth, prompts in [((0.6, 0.3, 0.8), 60), ((0.97, 0.3, 0.98), 100)]:
        gap, covered, rounds = (truth[0] - truth[1]) / (truth[2] - truth[1]), 0, 60
        for _ in range(rounds):
            shared_P1, own_P3 = random.random((prompts, 1)), random.random((prompts, 3))
            alike_P1 = random.random((prompts, 1)) < 0.6
            scores_PM = (np.where(alike_P1, shared_P1, own_P3) < np.array(truth)).astype(float)
            ends = bootstrap_interval([scores_PM], gap_recovered)
            covered += ends is None or ends[0] <= gap <= ends[1]
        assert covered / rounds >= 0.9, truth
    equal = comparison(1.0, 0.3, 1.0, 500).gap_interval
    assert equal is not None and equal[0] < 0.998 and equal[1] >= 1.0


def test_a_ratio_without_bounds_has_no_interval() -> None:
    equal = [np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]
    assert bootstrap_interval(equal, gap_recovered) is None
    assert gap_recovered(np.array([0.5, 0.0, 1.0])) == 0.5
