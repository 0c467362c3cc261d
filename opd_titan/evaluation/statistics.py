"""Estimates of accuracy and of differences between models, with 95 % confidence intervals.

The prompts are the random sample; the responses to one prompt are not independent of each other.

Shapes: S validation sets, P prompts of a set, N responses to each, M models, R resamples.
Scores are from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
_PRIOR_PROMPTS = 2.0
_SEED = 20260101  # the same interval for the same scores, on all ranks and after a resume

Interval = tuple[float, float]


def wilson(mean: float, count: int) -> Interval:
    """Return Wilson's score interval for the mean of `count` independent trials (JASA 22, 1927).

    Unlike mean +- 1.96 standard errors it keeps its confidence level for few trials and near 0 and
    1 (Brown, Cai and DasGupta, Statistical Science 16, 2001).
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    scale = 1.0 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / scale
    half = z * sqrt(mean * (1.0 - mean) / count + z**2 / (4 * count**2)) / scale
    # Rounding must not leave the mean outside: in exact arithmetic the ends reach 0 and 1.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def bootstrap_interval(
    sets: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]
) -> Interval:
    """Return the paired percentile bootstrap interval of a statistic of accuracies.

    Prompts are drawn with replacement within each set, and the models' scores of a prompt stay
    together (Efron and Tibshirani 1993, chapter 13; Koehn, EMNLP 2004). Each set gets the weight of
    two more prompts, spread evenly over all combinations of right and wrong, as Agresti and Min do
    for two models (Statistics in Medicine 24, 2005). Without them, models with the same scores on
    every prompt would have an interval of length zero.

    Args:
        sets: for each set, the mean score of each prompt for each model [P, M].
        statistic: from accuracies, which are means over sets [R, M], to values [R].

    Returns:
        The ends, which are infinite where the statistic is.
    """
    random = np.random.default_rng(_SEED)
    means_RM = np.zeros((RESAMPLES, sets[0].shape[1]))
    for scores_PM in sets:
        prompts, models = scores_PM.shape
        values, counts = np.unique(scores_PM, axis=0, return_counts=True)
        prior = np.array(list(product((0.0, 1.0), repeat=models)))
        weights = np.append(counts, np.full(len(prior), _PRIOR_PROMPTS / len(prior)))
        drawn = random.multinomial(prompts, weights / weights.sum(), RESAMPLES)
        means_RM += drawn @ np.concatenate([values, prior]) / (prompts * len(sets))
    cut = int((1.0 - CONFIDENCE) / 2 * RESAMPLES)
    ordered = np.sort(statistic(means_RM))
    return float(ordered[cut]), float(ordered[-cut - 1])


def accuracy_interval(sets: Sequence[np.ndarray]) -> Interval:
    """Return the interval of the plain mean of the sets' accuracies.

    It is Wilson's for one set with one response to each prompt, else the bootstrap over prompts.

    Args:
        sets: the scores of each set [P, N].
    """
    if len(sets) == 1 and sets[0].shape[1] == 1:
        return wilson(float(sets[0].mean()), len(sets[0]))
    means = [scores_PN.mean(axis=1, keepdims=True) for scores_PN in sets]
    return bootstrap_interval(means, lambda means_RM: means_RM[:, 0])


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the probability that at least one of k responses is correct, 1 - C(n-c,k) / C(n,k).

    The k are drawn without replacement from the n responses to one prompt; c of the n are correct.
    This is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374).
    """
    assert 1 <= k <= samples and 0 <= correct <= samples
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def ks_of(samples: int) -> list[int]:
    """Return the k for which pass@k is reported: the powers of two, and the number of samples."""
    return sorted({*(1 << i for i in range(samples.bit_length()) if 1 << i <= samples), samples})


def gap_recovered(accuracies: np.ndarray) -> np.ndarray:
    """Return (student - start) / (teacher - start) of accuracies [..., (student, start, teacher)].

    Where the teacher is not better than the start, it is infinite: negative if the student is
    worse than the start, else positive.
    """
    gain = accuracies[..., 0] - accuracies[..., 1]
    gap = accuracies[..., 2] - accuracies[..., 1]
    share = gain / np.where(gap > 1e-12, gap, 1.0)
    return np.where(gap > 1e-12, share, np.where(gain < 0.0, -np.inf, np.inf))
