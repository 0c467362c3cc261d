"""The paged attention kernels in Triton's interpreter against plain attention.

`test_kernels.py` runs this file in a process of its own: the interpreter is chosen before Triton is
imported. Shapes: see `opd_titan.models.kernels`.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from opd_titan.models.kernels import plain
from opd_titan.models.kernels.attention import paged_decode, paged_prefill
from opd_titan.models.kernels.plain import PageTable

TYPES = [torch.float16, torch.float32]
# A step of fp16 at 1 is 1e-3; probabilities are rounded to the values' type before their product.
TOLERANCE = {torch.float16: 3e-3, torch.float32: 3e-6}


class Cache:
    """Sequences in random pages of a cache with random contents, and NaN in unused places.

    Args:
        lengths: tokens of each sequence.
        heads_first: whether a head's tokens are adjacent in memory.
    """

    def __init__(
        self, G: int, K: int, S: int, lengths: list[int], dtype: torch.dtype, heads_first: bool
    ) -> None:
        counts = [-(-length // S) for length in lengths]
        P = sum(counts) + 1
        both = torch.randn(2, P, *((G, S, K) if heads_first else (S, G, K))).to(dtype)
        if heads_first:
            both = both.transpose(2, 3)
        *pages, idle = torch.randperm(P).split([*counts, 1])
        both[:, idle] = torch.nan
        self.table = idle.int().repeat(len(lengths), max(counts))
        for row_M, length, mine in zip(self.table, lengths, pages, strict=True):
            row_M[: len(mine)] = mine
            both[:, mine[-1], (length - 1) % S + 1 :] = torch.nan
        self.keys, self.values = both
        self.used = torch.tensor(lengths, dtype=torch.int32)

    def decode(self, q_NHK: Tensor) -> Tensor:
        return paged_decode(q_NHK, self.keys, self.values, self.table, self.used)

    def prefill(self, q_THK: Tensor, counts: list[int]) -> Tensor:
        return paged_prefill(q_THK, self.keys, self.values, *self.pages(counts))

    def plain(self, q_THK: Tensor, counts: list[int]) -> Tensor:
        return plain.paged_attention(q_THK, self.keys, self.values, self.pages(counts))

    def pages(self, counts: list[int]) -> PageTable:
        starts_N1 = torch.tensor([0, *counts]).cumsum(0).int()
        return PageTable(self.table, self.used, starts_N1, max(counts))


def queries(n: int, H: int, K: int, dtype: torch.dtype) -> Tensor:
    """Return queries that are a view of a wider product."""
    return torch.randn(n, H * K + 16).to(dtype)[:, : H * K].unflatten(1, (H, K))


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.is_contiguous()
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


DECODE = [  # H, G, K, S, lengths
    (1, 1, 32, 64, [1]),
    (2, 2, 128, 64, [63, 1, 64, 65]),  # about a page's boundary, an idle row
    (8, 1, 64, 256, [255, 257]),  # about a split's
    (14, 2, 64, 128, [129]),  # seven heads of one: no power of 2
    (16, 1, 32, 64, [513]),
    (4, 2, 32, 192, [700, 30]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_is_plain_attention(case: tuple, dtype: torch.dtype) -> None:
    H, G, K, S, lengths = case
    cache = Cache(G, K, S, lengths, dtype, heads_first=dtype == torch.float16)
    q_NHK = queries(len(lengths), H, K, dtype)
    assert_close(cache.decode(q_NHK), cache.plain(q_NHK, [1] * len(lengths)))


@pytest.mark.parametrize("seed", range(6))
def test_random_decode(seed: int) -> None:
    draw = random.Random(seed)
    G, K, S = draw.choice([1, 2, 4]), draw.choice([32, 64, 128]), draw.choice([64, 128, 256])
    lengths = [draw.randint(1, 400) for _ in range(draw.randint(1, 3))]
    dtype = draw.choice(TYPES)
    cache = Cache(G, K, S, lengths, dtype, draw.random() < 0.5)
    q_NHK = queries(len(lengths), G * draw.randint(1, 16 // G), K, dtype)
    assert_close(cache.decode(q_NHK), cache.plain(q_NHK, [1] * len(lengths)))


def test_a_long_sequence_has_longer_splits() -> None:
    """From 32 x 256 tokens on, one more multiple of 256 each."""
    cache = Cache(1, 32, 256, [8193], torch.float32, False)
    q_NHK = queries(1, 1, 32, torch.float32)
    assert_close(cache.decode(q_NHK), cache.plain(q_NHK, [1]))


def test_sequences_may_share_pages() -> None:
    cache = Cache(2, 32, 64, [128, 100], torch.float32, False)
    cache.table[1, 0] = cache.table[0, 0]
    q_NHK = queries(2, 4, 32, torch.float32)
    assert_close(cache.decode(q_NHK), cache.plain(q_NHK, [1, 1]))
    q_THK = queries(10, 4, 32, torch.float32)
    assert_close(cache.prefill(q_THK, [7, 3]), cache.plain(q_THK, [7, 3]))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_decode_row_knows_neither_neighbours_nor_the_tables_width(dtype: torch.dtype) -> None:
    """Bit for bit: alone with a table of its own pages, and among longer ones."""
    lengths = [200, 1300, 300, 1]
    cache = Cache(1, 32, 64, lengths, dtype, False)
    q_NHK = queries(len(lengths), 2, 32, dtype)
    together = cache.decode(q_NHK)
    for n, length in enumerate(lengths):
        row_1M = cache.table[n : n + 1, : -(-length // 64)].contiguous()
        args = (cache.keys, cache.values, row_1M, cache.used[n : n + 1])
        assert torch.equal(paged_decode(q_NHK[n : n + 1], *args)[0], together[n])


PREFILL = [  # H, G, K, S, (tokens, queries) of each sequence
    (1, 1, 32, 64, [(1, 1)]),
    (4, 2, 64, 64, [(64, 64), (65, 1), (150, 70)]),
    (7, 1, 32, 128, [(129, 40), (40, 40)]),
    (2, 2, 128, 256, [(257, 129)]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_is_plain_causal_attention(case: tuple, dtype: torch.dtype) -> None:
    H, G, K, S, sizes = case
    lengths, counts = ([size[i] for size in sizes] for i in range(2))
    cache = Cache(G, K, S, lengths, dtype, heads_first=dtype == torch.float16)
    q_THK = queries(sum(counts), H, K, dtype)
    assert_close(cache.prefill(q_THK, counts), cache.plain(q_THK, counts))


def test_a_prefill_in_chunks_is_the_whole_one() -> None:
    """Bit for bit: a query's result does not depend on where its chunk begins."""
    cache = Cache(1, 32, 64, [180], torch.float16, False)
    q_THK = queries(180, 4, 32, torch.float16)
    whole_THK, at = cache.prefill(q_THK, [180]), 0
    for count in (1, 99, 80):
        cache.used.fill_(at + count)
        part_THK = cache.prefill(q_THK[at : at + count], [count])
        assert torch.equal(part_THK, whole_THK[at : at + count])
        at += count
