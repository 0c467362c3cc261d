"""How far a measured accuracy can be trusted: intervals, pass@k, paired comparisons.

Prompts are what is drawn at random; the samples of one prompt are not independent of each other.
A score is a number from 0 to 1. `scores_PN` is [prompts, samples of each].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
RESAMPLES = 2000
_FLIPS = 9999
_SEED = 20260101  # the same figures for the same scores, on all ranks and after a resume

Interval = tuple[float, float]


def wilson(mean: float, count: float) -> Interval:
    """The score interval of Wilson (JASA 22, 1927) for a share of `count` independent trials.

    Unlike mean +- 1.96 standard errors it holds its level for few trials and near 0 and 1 (Brown,
    Cai and DasGupta, Statistical Science 16, 2001).
    """
    shrink = 1.0 + _Z**2 / count
    centre = (mean + _Z**2 / (2 * count)) / shrink
    half = _Z * sqrt(mean * (1.0 - mean) / count + _Z**2 / (4 * count**2)) / shrink
    # By the formula the ends are 0 and 1 there; rounding must not leave the mean outside.
    return (max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


def accuracy_interval(scores_PN: Sequence[Sequence[float]]) -> Interval:
    """95 % interval of the mean score, over prompts that might have been drawn instead.

    Wilson's, with the number of independent trials that would have given the standard error that
    the prompts' means have (the clustered standard error of Miller, arXiv 2411.00640; Wilson's form
    with an effective sample size: Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015). That number
    lies between prompts and samples; with one sample for each prompt it is Wilson's own.
    """
    prompts, samples = len(scores_PN), sum(len(scores) for scores in scores_PN)
    mean = sum(sum(scores) for scores in scores_PN) / samples
    effective = float(prompts)
    if samples > prompts > 1:
        variance_of_mean = float(prompt_means(scores_PN).var(ddof=1)) / prompts
        # Without any variance nothing is known of it: one trial for each prompt.
        if variance_of_mean > 0.0:
            trials = mean * (1.0 - mean) / variance_of_mean
            trials *= (_Z / _t(prompts - 1)) ** 2  # the variance is itself an estimate
            effective = min(max(trials, prompts), samples)
    return wilson(mean, effective)


def _t(freedom: int) -> float:
    """Student's t for `_Z`, by Cornish and Fisher's expansion; within 3 % from 4 degrees on.

    Abramowitz and Stegun, 26.7.5.
    """
    z, n = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2


def prompt_means(scores_PN: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean score of each prompt [P], float64."""
    return np.array([sum(scores) / len(scores) for scores in scores_PN], dtype=np.float64)


def mean_interval(means: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """95 % interval of the plain mean of independent means, from each one's own interval.

    The distances from mean to bound add up as standard errors do (MOVER: Zou and Donner, Statistics
    in Medicine 27, 2008, after Newcombe 1998), which keeps the intervals' lopsidedness.
    """
    number = len(means)
    mean = sum(means) / number
    below, above = (
        sqrt(sum((m - ends[side]) ** 2 for m, ends in zip(means, intervals, strict=True))) / number
        for side in (0, 1)
    )
    return (max(0.0, mean - below), min(1.0, mean + above))


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Probability that of k samples drawn without replacement one is correct, 1 - C(n-c,k)/C(n,k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), for one prompt.
    """
    assert 1 <= k <= samples and 0 <= correct <= samples
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def ks_of(samples: int) -> list[int]:
    """The k for which pass@k is reported: powers of two, and all samples."""
    return sorted({*(1 << i for i in range(samples.bit_length()) if 1 << i <= samples), samples})


# ------------------------------------------------------------------ paired over prompts


def paired_p_value(differences: Sequence[np.ndarray]) -> float:
    """How often chance alone parts two models this far: two-sided, by flipping signs.

    Under the null hypothesis either model might have had either one's score on a prompt, so each
    prompt's difference keeps its size and has its sign by chance (Fisher's randomisation test).
    With one right-or-wrong sample for each prompt of one set that is the exact test of McNemar
    (Psychometrika 12, 1947), and computed as such; otherwise from 9,999 random flips.

    Args:
        differences: by set, of each prompt's mean scores [P].
    """
    parts = [d / (len(differences) * len(d)) for d in differences]
    weighted = np.concatenate(parts)
    weighted = weighted[np.abs(weighted) > 1e-12]
    if weighted.size == 0:
        return 1.0
    sizes, observed = np.abs(weighted), abs(float(weighted.sum()))
    if np.ptp(sizes) <= 1e-9 * sizes[0]:
        more, number = int((weighted > 0).sum()), weighted.size
        tail = sum(comb(number, i) for i in range(min(more, number - more) + 1))
        return min(1.0, 2 * tail / 2**number)
    random = np.random.default_rng(_SEED)
    at_least = 0
    for start in range(0, _FLIPS, 500):
        rows = min(500, _FLIPS - start)
        signs = random.integers(0, 2, (rows, sizes.size), dtype=np.int8) * 2 - 1
        at_least += int((np.abs(signs @ sizes) >= observed * (1 - 1e-9)).sum())
    return (1 + at_least) / (1 + _FLIPS)


def bootstrap_interval(
    sets: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]
) -> Interval | None:
    """95 % percentile interval, prompts resampled with replacement within each set.

    The models' scores on a prompt stay together (the paired bootstrap: Efron and Tibshirani 1993,
    chapter 13; Koehn, EMNLP 2004). What no prompt has shown may still happen: two prompts' weight
    is spread over all ways to be right and wrong, as Agresti and Min do for two models (Statistics
    in Medicine 24, 2005), or equal scores on every prompt would leave no doubt at all.

    Args:
        sets: by set, the models' mean scores of each prompt [P, models].
        statistic: of resampled accuracies, means over sets [resamples, models] -> [resamples].

    Returns:
        None where an end is not finite: a ratio whose denominator may be zero.
    """
    random = np.random.default_rng(_SEED)
    means = np.zeros((RESAMPLES, sets[0].shape[1]))
    for scores_PM in sets:
        number, models = scores_PM.shape
        corners = np.array(list(product((0.0, 1.0), repeat=models)))
        weights = np.array([1.0] * number + [2.0 / len(corners)] * len(corners))
        points, chances = np.concatenate([scores_PM, corners]), weights / weights.sum()
        for start in range(0, RESAMPLES, 100):
            rows = min(100, RESAMPLES - start)
            counts = random.multinomial(number, chances, rows)
            means[start : start + rows] += counts @ points / (number * len(sets))
    values = np.sort(statistic(means))
    cut = (1.0 - CONFIDENCE) / 2
    low, high = values[int(cut * RESAMPLES)], values[int((1 - cut) * RESAMPLES) - 1]
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return (float(low), float(high))


def gap_recovered(accuracies: np.ndarray) -> np.ndarray:
    """(student - start) / (teacher - start) of [..., (student, start, teacher)].

    Infinite where the teacher is not better than the start: negative where the student lost.
    """
    gain = accuracies[..., 0] - accuracies[..., 1]
    gap = accuracies[..., 2] - accuracies[..., 1]
    share = gain / np.where(gap > 1e-12, gap, 1.0)
    return np.where(gap > 1e-12, share, np.where(gain < 0.0, -np.inf, np.inf))
