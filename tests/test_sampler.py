"""The sampler against plain Python: SplitMix64 on integers, and slow reference distributions.

`test_head` compares truncation with a plain loop.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from tiny_student import naive_kept
from torch import Tensor

import opd_titan.rollout.sampler as sampler_module
from opd_titan.evaluation.validator import VALIDATION_STREAM
from opd_titan.models.kernels import uniforms
from opd_titan.models.logits import Distribution, VocabHead, truncate_, whole_logits
from opd_titan.rollout.sampler import (
    Sampler,
    SamplingParams,
    greedy,
    sample,
    sequence_key,
)

MASK = (1 << 64) - 1
ALMOST_ONE = math.nextafter(1.0, 0.0)


def draw(keys: list[int], positions: list[int]) -> np.ndarray:
    return uniforms(torch.tensor(keys), torch.tensor(positions)).numpy()


def random_logits(n: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- random numbers


def slow_uniform(key: int, position: int) -> float:
    """SplitMix64 as published (https://prng.di.unimi.it/splitmix64.c), on integers."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) >> 11) / 2**53


def test_uniforms_are_splitmix64_bit_for_bit() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(sequence_key(i) for i in range(50))]
    pairs = list(product(keys, [0, 1, 2, 100, 2**20, 2**31, 2**40]))
    got = draw([k for k, _ in pairs], [p for _, p in pairs])
    assert got.dtype == np.float64
    assert got.tolist() == [slow_uniform(k, p) for k, p in pairs]


def uniforms_along(axis: str, n: int) -> np.ndarray:
    """Return random numbers of n neighbours along one axis, the others held."""
    fixed = {"seed": 42, "step": 7, "prompt": 3, "sample": 1}
    if axis == "position":
        return draw([sequence_key(*fixed.values())] * n, list(range(n)))
    keys = [sequence_key(*{**fixed, axis: i}.values()) for i in range(n)]
    return draw(keys, [5] * n)


@pytest.mark.parametrize("axis", ["position", "sample", "prompt", "step", "seed"])
def test_uniform_and_independent_along_every_axis(axis: str) -> None:
    n, bins = 40_000, 16
    u = uniforms_along(axis, n)
    assert u.min() >= 0.0 and u.max() < 1.0
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in 1,000.
    ordered, steps = np.sort(u), np.arange(n + 1) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.95
    for lag in (1, 2, 64):
        # Pairs fill the unit square evenly: mean and deviation of chi-square are known.
        counts, _, _ = np.histogram2d(u[:-lag], u[lag:], bins, [[0, 1], [0, 1]])
        expected, freedom = (n - lag) / bins**2, bins**2 - 1
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_sequence_keys_do_not_collide() -> None:
    grid = product([0, 1, 42, -1, 2**63], [0, 1, 2, 500, VALIDATION_STREAM], range(500), range(8))
    keys = [sequence_key(*coordinates) for coordinates in grid]
    assert len(set(keys)) == len(keys) == 100_000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    others = [(), (0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1)]
    assert len({sequence_key(*c) for c in others}) == len(others)


# --------------------------------------------------------------------- sampling


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [1, 5, 128, 129, 1000])
def test_frequencies_are_the_softmax(vocab: int, scale: float) -> None:
    """A grid of u covers [0, 1) evenly, so each token comes up p times, to one grid step."""
    n = 10_000
    row = random_logits(1, vocab, seed=vocab, scale=scale)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logprobs = sample(row.expand(n, -1), u)
    exact = row[0].double().softmax(0)
    frequencies = torch.bincount(tokens, minlength=vocab).double() / n
    assert tokens.dtype == torch.int64 and len(frequencies) == vocab
    assert (frequencies - exact).abs().max() <= 1.01 / n
    # Inverting the distribution keeps its order: a larger u never gives a smaller id.
    assert (tokens.diff() >= 0).all()
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact.log()[tokens]).abs().max() < 1e-5


def test_a_large_vocabulary_is_inverted_to_rounding() -> None:
    logits, u = random_logits(8, 151_936), torch.rand(8, dtype=torch.float64)
    tokens, logprobs = sample(logits.clone(), u)
    exact = logits.double().log_softmax(1)
    chosen = exact.gather(1, tokens[:, None])[:, 0]
    upper = exact.exp().cumsum(1).gather(1, tokens[:, None])[:, 0]
    assert ((upper - chosen.exp() - 1e-6 <= u) & (u <= upper + 1e-6)).all()
    assert (logprobs - chosen).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [2, 128, 129, 1000])
def test_impossible_tokens_are_never_drawn(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    u = torch.tensor([0.0, 5e-324, 2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-30, ALMOST_ONE])
    u = u.double()
    for _ in range(20):
        row = torch.randn(vocab, generator=generator) * 3
        cut = torch.rand(vocab, generator=generator) < 0.7
        cut[torch.randint(vocab, (1,), generator=generator)] = False
        row[cut] = -torch.inf
        tokens, logprobs = sample(row.expand(len(u), -1), u)
        assert not cut[tokens].any()
        assert torch.isfinite(logprobs).all()
        # The ends: the first token that is possible at all, and the last, to fp32 rounding of sums.
        assert tokens[0] == (~cut).nonzero()[0]
        beyond = row.double().softmax(0)[tokens[-1] + 1 :].sum()
        assert beyond < 1e-6


@pytest.mark.parametrize("size", [1e3, 3e38])
def test_extreme_logits(size: float) -> None:
    row = torch.full((1, 300), -size)
    row[0, [17, 250]] = size
    u = torch.tensor([0.0, 0.25, 0.75, ALMOST_ONE], dtype=torch.float64)
    tokens, logprobs = sample(row.expand(4, -1), u)
    assert tokens.tolist() == [17, 17, 250, 250]
    assert (logprobs + math.log(2)).abs().max() < 1e-6
    row = torch.full((1, 300), size)  # all alike, however large
    tokens, logprobs = sample(row, torch.tensor([0.5], dtype=torch.float64))
    assert tokens.item() in (149, 150) and abs(logprobs.item() + math.log(300)) < 1e-5


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = random_logits(50, 333)
    logits[:, [40, 12, 300]] = 50.0
    tokens, logprobs = greedy(logits)
    assert tokens.tolist() == [12] * 50
    exact = logits.double().log_softmax(1)[:, 12]
    assert (logprobs - exact).abs().max() < 4e-6  # one fp32 step at 50


def test_top_k_alone_cuts_by_rank_only() -> None:
    """A peak whose probability rounds to 1 must not push the others out of the top k."""
    row = torch.tensor([[30.0, 3.0, 2.0, 1.0, 0.0]])
    assert truncate_(row, 3, 1.0).isfinite().tolist() == [[True, True, True, False, False]]


def test_temperature_comes_before_truncation() -> None:
    hidden = random_logits(6, 10, seed=3, scale=1.0)
    head = VocabHead(random_logits(50, 10, seed=4, scale=1.0))
    exact = hidden.double() @ head.weight_vD.double().T / 2.0
    got = whole_logits(hidden, head, Distribution(2.0, 5, 0.8))
    assert torch.equal(got.isfinite(), naive_kept(exact, 5, 0.8))
    assert torch.allclose(whole_logits(hidden, head, Distribution(2.0)), exact.float(), atol=1e-5)


# -------------------------------------------------------------- from hidden states


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("vocab", "chunk_bytes"), [(61, 1 << 20), (1000, 4096), (4096, 40000)])
def test_chunks_of_the_vocabulary_are_sampled_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, vocab: int, chunk_bytes: int, temperature: float
) -> None:
    monkeypatch.setitem(sampler_module.CHUNK_BYTES, "cpu", chunk_bytes)
    g = torch.Generator().manual_seed(vocab)
    # A few chunks hold nearly everything, others next to nothing: their units differ by e^100.
    weight_VD = torch.randn(vocab, 8, generator=g) * torch.linspace(0.1, 12, vocab)[:, None]
    sampler = Sampler(VocabHead(weight_VD), SamplingParams(1, temperature), max_rows=50)
    for n in (50, 7, 1):
        assert vocab == 61 or sampler._chunks(n)[1] > 1 or n == 1
        # With logits near zero, padding to whole blocks would count as much as a token.
        hidden_ND = torch.randn(n, 8, generator=g) * (0.01 if n == 7 else 1.0)
        u_N = torch.rand(n, generator=g, dtype=torch.float64)
        u_N[0] = 1e-9 if n == 50 else 1.0 - 2.0**-53
        tokens_N, logprobs_N = sampler(hidden_ND, u_N)
        expected = sample(hidden_ND @ weight_VD.t() / temperature, u_N)
        assert torch.equal(tokens_N, expected[0])
        torch.testing.assert_close(logprobs_N, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_a_token_that_exists(bad: float) -> None:
    """Its log-prob is not finite either; the next step must not raise an index error."""
    vocab = 1000
    sampler = Sampler(VocabHead(torch.ones(vocab, 2)), SamplingParams(1), max_rows=3)
    u_N = torch.tensor([0.1, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    for tokens_N, logprobs_N in (
        sampler(torch.full((3, 2), bad), u_N),
        sample(torch.full((3, vocab), bad), u_N),
    ):
        assert 0 <= tokens_N.min() and tokens_N.max() < vocab
        assert not logprobs_N.isfinite().any()


def test_every_number_of_rows_fits_the_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab, chunk_bytes in product((1, 128, 129, 3001), (512, 5000, 1 << 20)):
        monkeypatch.setitem(sampler_module.CHUNK_BYTES, "cpu", chunk_bytes)
        sampler = Sampler(VocabHead(torch.zeros(vocab, 2)), SamplingParams(1), max_rows=37)
        for n in range(1, 38):
            width, count = sampler._chunks(n)
            assert width * (count - 1) < vocab <= width * count
            assert n * width * count <= sampler.values.numel()
