"""Reductions over the logits of a vocabulary, in Triton.

Shapes: N rows, V vocabulary, B blocks of 128 columns. In kernels, b blocks of a program, c columns
of a block or of a step, d values that a digit may have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels import plain
from opd_titan.models.kernels.ops import (
    check_logits,
    empty_block_stats,
    implement,
    two_of_rows,
)
from opd_titan.models.kernels.plain import LOGITS_BLOCK

_BLOCKS = 32
# Columns that a search reads in one step, and values of a digit, which make 8 passes over the row.
_STEP, _DIGITS = 2048, 16


@triton.jit
def _block_stats(
    logits, sums, maxima, temperature, V, N_BLOCKS, stride, b: tl.constexpr, c: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    block_b = tl.program_id(1) * b + tl.arange(0, b)
    column_bc = (block_b * c)[:, None] + tl.arange(0, c)[None, :]
    logits_bc = tl.load(logits + n * stride + column_bc, mask=column_bc < V, other=float("-inf"))
    scaled_bc = logits_bc / temperature
    max_b = tl.max(scaled_bc, 1)
    # -inf - (-inf) is NaN, so a block with only -inf is shifted by 0.
    shift_b = tl.where(max_b == float("-inf"), 0.0, max_b)
    sum_b = tl.sum(tl.exp(scaled_bc - shift_b[:, None]), 1)
    place_b = n * N_BLOCKS + block_b
    tl.store(sums + place_b, sum_b, mask=block_b < N_BLOCKS)
    tl.store(maxima + place_b, max_b, mask=block_b < N_BLOCKS)


@implement("block_stats")
def block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(x - maximum) of blocks of x = logits / temperature, and the maxima.

    Rows may be strided.
    """
    N, V = check_logits(logits_NV)
    sums_NB, maxima_NB = empty_block_stats(logits_NV, temperature)
    B = sums_NB.shape[1]
    _block_stats[(N, triton.cdiv(B, _BLOCKS))](
        logits_NV,
        sums_NB,
        maxima_NB,
        float(temperature),
        V,
        B,
        logits_NV.stride(0),
        b=_BLOCKS,
        c=LOGITS_BLOCK,
        num_warps=4,
    )
    return sums_NB, maxima_NB


@triton.jit
def _load_weights(sums, maxima, highest, N_BLOCKS, B: tl.constexpr):
    """Return the weights of a row's blocks in units of exp(highest), fp64, and their maxima."""
    b = tl.arange(0, B)
    sum_b = tl.load(sums + b, mask=b < N_BLOCKS, other=0.0).to(tl.float64)
    max_b = tl.load(maxima + b, mask=b < N_BLOCKS, other=float("-inf"))
    return sum_b * tl.exp((max_b - highest).to(tl.float64)), max_b


@triton.jit
def _block_totals(sums, maxima, highest, total, N_BLOCKS, B: tl.constexpr):
    n, b = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    max_b = tl.load(maxima + n * N_BLOCKS + b, mask=b < N_BLOCKS, other=float("-inf"))
    most = tl.max(max_b, 0)
    first = n * N_BLOCKS
    weight_b, _ = _load_weights(sums + first, maxima + first, most, N_BLOCKS, B)
    tl.store(highest + n, most)
    tl.store(total + n, tl.sum(weight_b, 0))


@implement("block_totals")
def block_totals(sums_NB: Tensor, maxima_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest maximum of each row, and the sum of its weights in that unit."""
    assert sums_NB.is_contiguous() and maxima_NB.is_contiguous()
    highest_N, total_N = two_of_rows(sums_NB, torch.float32, torch.float64)
    N, B = sums_NB.shape
    _block_totals[(N,)](
        sums_NB, maxima_NB, highest_N, total_N, B, B=triton.next_power_of_2(B), num_warps=8
    )
    return highest_N, total_N


@triton.jit
def _below(x):
    """Return the largest fp64 number below x, which must be positive."""
    return (x.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)


@triton.jit
def _invert(weight_b, target, last, B: tl.constexpr):
    """Return the first index at which the running sum exceeds the target, and the remainder."""
    b = tl.arange(0, B)
    sum_b = tl.cumsum(weight_b, 0)
    total = tl.sum(tl.where(b == B - 1, sum_b, 0.0), 0)
    target = tl.minimum(target, _below(total))
    # A parallel scan may be not monotone, so indices without weight are excluded.
    first = tl.min(tl.where((sum_b > target) & (weight_b > 0.0), b, B), 0)
    final = tl.max(tl.where(weight_b > 0.0, b, 0), 0)
    index = tl.minimum(tl.minimum(first, final), last)
    before = tl.sum(tl.where(b == index, sum_b - weight_b, 0.0), 0)
    return index, tl.maximum(target - before, 0.0)


@triton.jit
def _invert_blocks(
    logits,
    sums,
    maxima,
    highest,
    target,
    tokens,
    logs,
    temperature,
    V,
    N_BLOCKS,
    stride,
    B: tl.constexpr,
    c: tl.constexpr,
):
    n, b = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    first, most = n * N_BLOCKS, tl.load(highest + n)
    weight_b, max_b = _load_weights(sums + first, maxima + first, most, N_BLOCKS, B)
    block, rest = _invert(weight_b, tl.load(target + n), N_BLOCKS - 1, B)
    unit = tl.max(tl.where(b == block, max_b, float("-inf")), 0)
    shift = (unit - most).to(tl.float64)

    column_c = block * c + tl.arange(0, c)
    logits_c = tl.load(logits + n * stride + column_c, mask=column_c < V, other=float("-inf"))
    within_c = tl.exp(logits_c / temperature - unit).to(tl.float64)
    offset, _ = _invert(within_c, rest / tl.exp(shift), c - 1, c)
    weight = tl.sum(tl.where(tl.arange(0, c) == offset, within_c, 0.0), 0)
    tl.store(tokens + n, tl.minimum(block * c + offset, V - 1).to(tl.int64))
    tl.store(logs + n, tl.log(weight) + shift)


@implement("invert_blocks")
def invert_blocks(
    logits_NV: Tensor,
    sums_NB: Tensor,
    maxima_NB: Tensor,
    highest_N: Tensor,
    target_N: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the tokens at which running sums exceed the targets, and the logs of their weights.

    Rows of logits may be strided.
    """
    (N, V), B = check_logits(logits_NV), sums_NB.shape[1]
    assert sums_NB.is_contiguous() and maxima_NB.is_contiguous()
    tokens_N, logs_N = two_of_rows(logits_NV, torch.int64, torch.float64)
    _invert_blocks[(N,)](
        logits_NV,
        sums_NB,
        maxima_NB,
        highest_N,
        target_N,
        tokens_N,
        logs_N,
        float(temperature),
        V,
        B,
        logits_NV.stride(0),
        B=triton.next_power_of_2(B),
        c=LOGITS_BLOCK,
        num_warps=8,
    )
    return tokens_N, logs_N


@triton.jit
def _uniforms(
    keys,
    positions,
    out,
    N,
    b: tl.constexpr,
    GOLDEN: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
):
    """Compute SplitMix64 in counter mode."""
    n_b = tl.program_id(0) * b + tl.arange(0, b)
    key_b = tl.load(keys + n_b, mask=n_b < N, other=0).to(tl.uint64)
    counter_b = tl.load(positions + n_b, mask=n_b < N, other=0).to(tl.uint64) + 1
    x_b = key_b + counter_b * GOLDEN
    x_b = (x_b ^ (x_b >> 30)) * MIX_1
    x_b = (x_b ^ (x_b >> 27)) * MIX_2
    x_b = x_b ^ (x_b >> 31)
    uniform_b = (x_b >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    tl.store(out + n_b, uniform_b, mask=n_b < N)


@implement("uniforms")
def uniforms(keys_N: Tensor, positions_N: Tensor) -> Tensor:
    """Return the numbers of `plain.uniforms`, bit for bit."""
    assert keys_N.is_contiguous() and positions_N.is_contiguous()
    assert keys_N.dtype == positions_N.dtype == torch.int64
    out_N = torch.empty(keys_N.shape, dtype=torch.float64, device=keys_N.device)
    mixing = {"GOLDEN": plain.GOLDEN, "MIX_1": plain.MIX_1, "MIX_2": plain.MIX_2}
    _uniforms[(triton.cdiv(keys_N.numel(), 256),)](
        keys_N, positions_N, out_N, keys_N.numel(), b=256, num_warps=4, **mixing
    )
    return out_N


@triton.jit
def _key(x):
    """Map fp32 numbers to int32 keys of the same order; 0 and -0 get the same key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """Return the fp32 number of a key; keys below the key of -inf give -inf."""
    key = tl.maximum(key, -0x7F800001)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_weighted(row, first, V, highest, edge, share, MASS: tl.constexpr, c: tl.constexpr):
    """Return the keys and the weights of columns.

    Without MASS every weight is 1. With MASS it is exp(x - highest) above the key `edge`,
    share * exp(x - highest) at this key, and 0 below it.
    """
    column_c = first + tl.arange(0, c)
    x_c = tl.load(row + column_c, mask=column_c < V, other=float("-inf"))
    key_c = _key(x_c)
    weight_c = tl.where(column_c < V, 1.0, 0.0)
    if MASS:
        weight_c *= tl.where(key_c > edge, 1.0, tl.where(key_c == edge, share, 0.0))
        weight_c *= tl.exp(x_c - highest)
    return key_c, weight_c


@triton.jit
def _search(
    row, V, target, highest, edge, share, MASS: tl.constexpr, c: tl.constexpr, d: tl.constexpr
):
    """Return the largest key such that the columns at or above it weigh at least `target`.

    The digits of the key are found from the highest down, with one pass over the row for each.
    """
    low = tl.full([], -0x80000000, tl.int32)
    digit_d = tl.arange(0, d)
    for digit in range(8):
        shift = 28 - 4 * digit
        candidate_d1 = (low + (digit_d << shift))[:, None]
        sums_dc = tl.zeros([d, c], tl.float32)
        for first in tl.range(0, V, c, num_stages=4):
            key_c, weight_c = _load_weighted(row, first, V, highest, edge, share, MASS, c)
            sums_dc += tl.where(key_c[None, :] >= candidate_d1, weight_c[None, :], 0.0)
        reached = tl.sum((tl.sum(sums_dc, 1) >= target).to(tl.int32), 0)
        # The lowest candidate reaches the target, except for rounding.
        low += (tl.maximum(reached, 1) - 1) << shift
    return low


@triton.jit
def _split_at(row, V, key, highest, edge, share, MASS: tl.constexpr, c: tl.constexpr):
    """Return the weight of the columns above a key, and the number of columns at it."""
    above_c, at_c = tl.zeros([c], tl.float32), tl.zeros([c], tl.float32)
    for first in tl.range(0, V, c, num_stages=4):
        key_c, weight_c = _load_weighted(row, first, V, highest, edge, share, MASS, c)
        above_c += tl.where(key_c > key, weight_c, 0.0)
        at_c += tl.where((key_c == key) & (first + tl.arange(0, c) < V), 1.0, 0.0)
    return tl.sum(above_c, 0), tl.sum(at_c, 0)


@triton.jit
def _truncation_threshold(
    logits,
    threshold,
    ties,
    top_k,
    top_p,
    V,
    stride,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    c: tl.constexpr,
    d: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    # Without top-k, every key is above the edge.
    edge = tl.full([], -0x80000000, tl.int32)
    share, kept_at_edge = 0.0, tl.full([], 0.0, tl.float32)
    key, kept = edge, kept_at_edge
    if TOP_K:
        edge = _search(row, V, top_k, 0.0, edge, share, False, c, d)
        above, at = _split_at(row, V, edge, 0.0, edge, share, False, c)
        kept_at_edge = top_k - above
        share = kept_at_edge / at
        key, kept = edge, kept_at_edge
    if TOP_P:
        highest_c = tl.full([c], float("-inf"), tl.float32)
        for first in tl.range(0, V, c, num_stages=4):
            column_c = first + tl.arange(0, c)
            x_c = tl.load(row + column_c, mask=column_c < V, other=float("-inf"))
            highest_c = tl.maximum(highest_c, x_c)
        highest = tl.max(highest_c, 0)
        above, at = _split_at(row, V, edge, highest, edge, share, True, c)
        target = top_p * (above + kept_at_edge * tl.exp(_value(edge) - highest))
        key = _search(row, V, target, highest, edge, share, True, c, d)
        above, at = _split_at(row, V, key, highest, edge, share, True, c)
        kept = tl.ceil(tl.div_rn(target - above, tl.exp(_value(key) - highest)))
        kept = tl.minimum(tl.maximum(kept, 1.0), tl.where(key == edge, kept_at_edge, at))
    tl.store(threshold + n, _value(key))
    tl.store(ties + n, kept.to(tl.int64))


@implement("truncation_threshold")
def truncation_threshold(logits_NV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the lowest logit that truncation keeps, and how many of that value it keeps.

    Rows may be strided. One program searches one row, which it reads several times from the L2
    cache. A sort would write the row to memory and read it again.
    """
    N, V = check_logits(logits_NV)
    threshold_N, ties_N = two_of_rows(logits_NV, torch.float32, torch.int64)
    _truncation_threshold[(N,)](
        logits_NV,
        threshold_N,
        ties_N,
        float(min(top_k, V)),
        float(top_p),
        V,
        logits_NV.stride(0),
        TOP_K=0 < top_k < V,
        TOP_P=top_p < 1.0,
        c=_STEP,
        d=_DIGITS,
        num_warps=16,
    )
    return threshold_N, ties_N
