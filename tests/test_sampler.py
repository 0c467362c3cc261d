"""The sampler against plain Python: SplitMix64 on integers, and slow reference distributions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
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
VOCABULARIES = [1, 2, 5, 127, 128, 129, 1000]


def splitmix64(x: int) -> int:
    """The output function, as published (https://prng.di.unimi.it/splitmix64.c)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_uniform(key: int, position: int) -> float:
    return (splitmix64((key + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def draw(keys: list[int], positions: list[int]) -> np.ndarray:
    return uniforms(torch.tensor(keys), torch.tensor(positions)).numpy()


def random_logits(n: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- random numbers


def test_uniforms_are_splitmix64_bit_for_bit() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(sequence_key(i) for i in range(50))]
    positions = [0, 1, 2, 100, 2**20, 2**31, 2**40]
    pairs = list(product(keys, positions))
    got = draw([k for k, _ in pairs], [p for _, p in pairs])
    assert got.dtype == np.float64
    assert got.tolist() == [slow_uniform(k, p) for k, p in pairs]


def uniforms_along(axis: str, n: int) -> np.ndarray:
    """Return n random numbers that differ in one coordinate of their keys."""
    fixed = {"seed": 42, "step": 7, "prompt": 3, "sample": 1}
    if axis == "position":
        return draw([sequence_key(*fixed.values())] * n, list(range(n)))
    keys = [sequence_key(*{**fixed, axis: i}.values()) for i in range(n)]
    return draw(keys, [5] * n)


@pytest.mark.parametrize("axis", ["position", "sample", "prompt", "step", "seed"])
def test_uniform_and_independent_along_every_axis(axis: str) -> None:
    n = 40_000
    u = uniforms_along(axis, n)
    assert u.min() >= 0.0 and u.max() < 1.0
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in 1,000.
    ordered, steps = np.sort(u), np.arange(n + 1) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.95
    for lag in (1, 2, 3, 64):
        chi_square(u[:-lag], u[lag:])


def chi_square(first: np.ndarray, second: np.ndarray, bins: int = 16) -> None:
    """Pairs must fill the unit square evenly: mean and deviation of chi-square are known."""
    counts, _, _ = np.histogram2d(first, second, bins, [[0, 1], [0, 1]])
    expected = len(first) / bins**2
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), bins**2 - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_sequence_keys_do_not_collide() -> None:
    grid = product([0, 1, 42, -1, 2**63], [0, 1, 2, 500, VALIDATION_STREAM], range(500), range(8))
    keys = [sequence_key(*coordinates) for coordinates in grid]
    assert len(set(keys)) == len(keys) == 100_000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    others = [(), (0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1)]
    assert len({sequence_key(*c) for c in others}) == len(others)


# --------------------------------------------------------------------- sampling


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
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


@pytest.mark.parametrize("vocab", [*VOCABULARIES, 151_936])
def test_rows_are_inverted_one_by_one(vocab: int) -> None:
    """Each token is the inverse of the cumulative distribution at u, up to rounding."""
    n = 8 if vocab > 1000 else 200
    logits, u = random_logits(n, vocab), torch.rand(n, dtype=torch.float64)
    tokens, logprobs = sample(logits.clone(), u)
    exact = logits.double().log_softmax(1)
    edges = exact.exp().cumsum(1)
    upper = edges.gather(1, tokens[:, None])[:, 0]
    lower = upper - exact.exp().gather(1, tokens[:, None])[:, 0]
    assert ((lower - 1e-6 <= u) & (u <= upper + 1e-6)).all()
    assert (logprobs - exact.gather(1, tokens[:, None])[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [2, 5, 127, 128, 129, 1000])
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


@pytest.mark.parametrize("only", [0, 127, 128, 700, 999])
def test_a_single_possible_token_is_certain(only: int) -> None:
    row = torch.full((1, 1000), -torch.inf)
    row[0, only] = -3.0
    u = torch.tensor([0.0, 0.5, ALMOST_ONE], dtype=torch.float64)
    tokens, logprobs = sample(row.expand(3, -1), u)
    assert tokens.tolist() == [only] * 3 and logprobs.tolist() == [0.0] * 3


@pytest.mark.parametrize("size", [1e3, 1e10, 3e38])
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


def test_unlikely_tokens_come_up_as_often_as_they_should() -> None:
    """With u's from the generator itself: probability 1e-4 is neither lost nor favoured."""
    n = 200_000
    probabilities = torch.tensor([1e-4, 0.5, 1e-3, 0.4989], dtype=torch.float64)
    u = uniforms(torch.full((n,), sequence_key(1, 2, 3, 4)), torch.arange(n))
    tokens, _ = sample(probabilities.log().float().expand(n, -1), u)
    counts = torch.bincount(tokens, minlength=4)
    expected = probabilities * n
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = random_logits(50, 333)
    logits[:, [40, 12, 300]] = 50.0
    tokens, logprobs = greedy(logits)
    assert tokens.tolist() == [12] * 50
    exact = logits.double().log_softmax(1)[:, 12]
    assert (logprobs - exact).abs().max() < 4e-6  # one fp32 step at 50
    assert greedy(torch.zeros(1, 1000))[0].item() == 0


# ------------------------------------------------------------------- truncation


def truncate_slowly(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Which tokens are kept: most likely first, ties by lower id, until the mass is reached."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp(row[i] - row[order[0]]) for i in order]
    kept, mass = set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        if top_p < 1.0 and mass >= top_p * sum(weights):
            break
        kept.add(i)
        mass += weight
    return kept


def kept_tokens(row: Tensor) -> set[int]:
    return set((row > -torch.inf).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("vocab", [1, 5, 130])
@pytest.mark.parametrize("top_k", [0, 1, 3, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-9])
def test_truncation_equals_the_slow_one(vocab: int, top_k: int, top_p: float) -> None:
    logits = random_logits(20, vocab, seed=vocab + top_k)
    logits[10:] = logits[10:].round()  # many ties
    cut = truncate_(logits.clone(), top_k, top_p)
    for before, after in zip(logits, cut, strict=True):
        kept = kept_tokens(after)
        assert kept == truncate_slowly(before.tolist(), top_k, top_p)
        assert all(after[i] == before[i] for i in kept)


def test_ties_at_the_edge_fall_to_the_lower_id() -> None:
    rows = torch.zeros(3, 8)
    rows[1, 5] = rows[2, 0] = 1.0
    assert [kept_tokens(r) for r in truncate_(rows.clone(), 3, 1.0)] == [
        {0, 1, 2},
        {0, 1, 5},
        {0, 1, 2},
    ]
    # Quarters are exact: a mass of 0.5 takes two of four, anything above it three.
    assert kept_tokens(truncate_(torch.zeros(1, 4), 0, 0.5)[0]) == {0, 1}
    assert kept_tokens(truncate_(torch.zeros(1, 4), 0, 0.51)[0]) == {0, 1, 2}


def test_kept_tokens_stay_wherever_they_rank() -> None:
    logits = random_logits(30, 64)
    keep = torch.randint(64, (30,), generator=torch.Generator().manual_seed(1))
    cut = truncate_(logits.clone(), 4, 0.7, keep)
    for i in range(30):
        expected = truncate_slowly(logits[i].tolist(), 4, 0.7) | {keep[i].item()}
        assert kept_tokens(cut[i]) == expected
        assert cut[i, keep[i]] == logits[i, keep[i]]


def test_top_k_alone_cuts_by_rank_only() -> None:
    """A peak whose probability rounds to 1 must not push the others out of the top k."""
    row = torch.tensor([[30.0, 3.0, 2.0, 1.0, 0.0]])
    assert kept_tokens(truncate_(row, 3, 1.0)[0]) == {0, 1, 2}


def test_temperature_comes_before_truncation() -> None:
    hidden = random_logits(6, 10, seed=3, scale=1.0)
    weight = random_logits(50, 10, seed=4, scale=1.0)
    head = VocabHead(weight)
    got = whole_logits(hidden, head, Distribution(2.0, 5, 0.8))
    for row, exact in zip(got, (hidden.double() @ weight.double().T / 2.0).tolist(), strict=True):
        assert kept_tokens(row) == truncate_slowly(exact, 5, 0.8)
    assert torch.allclose(
        whole_logits(hidden, head, Distribution(0.5)), hidden @ weight.T * 2, atol=1e-5
    )


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
    params = SamplingParams(1, temperature)
    sampler = Sampler(VocabHead(weight_VD), params, max_rows=50)
    for n in (50, 7, 1):
        assert vocab == 61 or sampler._chunks(n)[1] > 1 or n == 1
        hidden_ND = torch.randn(n, 8, generator=g)
        u_N = torch.rand(n, generator=g, dtype=torch.float64)
        u_N[0] = 1e-9 if n == 50 else 1.0 - 2.0**-53
        tokens_N, logprobs_N = sampler(hidden_ND, u_N)
        logits_NV = hidden_ND @ weight_VD.t() / temperature
        expected = sample(logits_NV, u_N)
        assert torch.equal(tokens_N, expected[0])
        torch.testing.assert_close(logprobs_N, expected[1], rtol=1e-5, atol=1e-5)
        exact = logits_NV.double().log_softmax(dim=1).gather(1, tokens_N[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs_N.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [61, 1000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_a_token_that_exists(vocab: int, bad: float) -> None:
    """And a log-prob that says it, instead of an index error in the next step."""
    sampler = Sampler(VocabHead(torch.ones(vocab, 2)), SamplingParams(1), max_rows=3)
    u_N = torch.tensor([0.1, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    for tokens_N, logprobs_N in (
        sampler(torch.full((3, 2), bad), u_N),
        sample(torch.full((3, vocab), bad), u_N),
    ):
        assert 0 <= tokens_N.min() and tokens_N.max() < vocab
        assert not logprobs_N.isfinite().any()


def test_every_number_of_rows_fits_the_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab in (1, 127, 128, 129, 1000, 3001):
        for chunk_bytes in (512, 5000, 1 << 20):
            monkeypatch.setitem(sampler_module.CHUNK_BYTES, "cpu", chunk_bytes)
            sampler = Sampler(VocabHead(torch.zeros(vocab, 2)), SamplingParams(1), max_rows=37)
            for n in range(1, 38):
                width, count = sampler._chunks(n)
                assert width * (count - 1) < vocab <= width * count
                assert n * width * count <= sampler.values.numel()
