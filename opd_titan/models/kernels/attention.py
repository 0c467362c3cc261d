"""Attention over keys and values in pages, in Triton.

Shapes: N sequences, T queries of all sequences, H query heads, G key/value heads, R query heads of
one of them, K head size, P pages of a KV cache, S tokens of a page, M pages of the longest
sequence. In kernels, Q rows of a tile and B tokens of a block.

A program computes one key/value head of one sequence, over blocks of tokens, with a running softmax
(Milakov and Gimelshein 2018, arXiv 1805.02867) in powers of 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels.ops import empty, implement

_DECODE_BLOCK = 64
# 128 rows read keys and values half as often as 64 do; blocks of 64 would spill on Ampere.
_PREFILL_ROWS, _PREFILL_BLOCK = 128, 32
# A sequence is split into parts of _SPLIT tokens, or of the smallest multiple of it that gives at
# most _MAX_SPLITS parts.
_SPLIT, _MAX_SPLITS = 256, 32


@triton.jit
def _attend(
    q_QK,
    last_Q,
    keys,
    values,
    pages,
    start,
    end,
    scale,
    page_stride,
    token_stride,
    K: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
):
    """Compute attention to the tokens in [start, end); row i attends to tokens up to `last_Q[i]`.

    Returns the maxima of the scaled scores, the sums of their powers of 2, and the values' sums.
    """
    token_B = tl.arange(0, B)
    place_BK = (token_B * token_stride)[:, None] + tl.arange(0, K)[None, :]
    max_Q = tl.full([q_QK.shape[0]], float("-inf"), tl.float32)
    sum_Q = tl.zeros([q_QK.shape[0]], tl.float32)
    out_QK = tl.zeros([q_QK.shape[0], K], tl.float32)
    # The page of the next block is loaded one block ahead. Otherwise the load of each block's keys
    # waits for it, and Triton's software pipeline spends half of its stages on that wait.
    page = tl.load(pages + start // S)
    for first in range(start, end, B):
        next_page = tl.load(pages + (first + B) // S, mask=first + B < end, other=0)
        block = page.to(tl.int64) * page_stride + first % S * token_stride
        # Tokens beyond the end are masked, because a NaN there would survive a weight of 0.
        used_B1 = (first + token_B < end)[:, None]
        keys_BK = tl.load(keys + block + place_BK, mask=used_B1, other=0.0)
        scores_QB = tl.dot(q_QK, tl.trans(keys_BK)) * scale
        seen_QB = (first + token_B)[None, :] <= last_Q[:, None]
        scores_QB = tl.where(seen_QB, scores_QB, float("-inf"))
        new_max_Q = tl.maximum(max_Q, tl.max(scores_QB, 1))
        powers_QB = tl.exp2(scores_QB - new_max_Q[:, None])
        decay_Q = tl.exp2(max_Q - new_max_Q)
        sum_Q = sum_Q * decay_Q + tl.sum(powers_QB, 1)
        values_BK = tl.load(values + block + place_BK, mask=used_B1, other=0.0)
        out_QK = out_QK * decay_Q[:, None]
        out_QK = tl.dot(powers_QB.to(values_BK.dtype), values_BK, out_QK)
        max_Q = new_max_Q
        page = next_page
    return max_Q, sum_Q, out_QK


@triton.jit(do_not_specialize=["splits", "table_stride"])
def _decode(
    q,
    keys,
    values,
    table,
    used,
    out,
    partial,
    normalisers,
    scale,
    splits,
    q_stride,
    q_head_stride,
    page_stride,
    token_stride,
    head_stride,
    table_stride,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    split, g, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(used + n)
    size = tl.cdiv(length, SPLIT * MAX_SPLITS) * SPLIT
    start = split * size
    if start >= length:
        return
    row_Q, k = tl.arange(0, Q), tl.arange(0, K)
    head_Q, is_row_Q1 = g * R + row_Q, (row_Q < R)[:, None]
    place_QK = n * q_stride + (head_Q * q_head_stride)[:, None] + k[None, :]
    q_QK = tl.load(q + place_QK, mask=is_row_Q1, other=0.0)
    max_Q, sum_Q, out_QK = _attend(
        q_QK,
        tl.zeros([Q], tl.int32) + (length - 1),
        keys + g * head_stride,
        values + g * head_stride,
        table + n * table_stride,
        start,
        tl.minimum(start + size, length),
        scale,
        page_stride,
        token_stride,
        K,
        S,
        B,
    )
    out_QK /= sum_Q[:, None]
    place_Q = n * (tl.num_programs(1) * R) + head_Q
    if size >= length:
        place_QK = (place_Q * K)[:, None] + k[None, :]
        tl.store(out + place_QK, out_QK.to(out.dtype.element_ty), mask=is_row_Q1)
    else:
        place_Q = place_Q * splits + split
        place_QK = (place_Q * K)[:, None] + k[None, :]
        tl.store(partial + place_QK, out_QK, mask=is_row_Q1)
        tl.store(normalisers + place_Q, max_Q + tl.log2(sum_Q), mask=row_Q < R)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial,
    normalisers,
    used,
    out,
    splits,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Average the parts of a sequence, weighted by powers of 2 of their normalisers."""
    h, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(used + n)
    count = tl.cdiv(length, tl.cdiv(length, SPLIT * MAX_SPLITS) * SPLIT)
    if count == 1:
        return
    # The loop covers MAX_SPLITS parts for any table width, so that sums have a fixed order.
    split, k = tl.arange(0, MAX_SPLITS), tl.arange(0, K)
    row = n * tl.num_programs(0) + h
    place = row * splits + split
    normaliser = tl.load(normalisers + place, mask=split < count, other=float("-inf"))
    weight = tl.exp2(normaliser - tl.max(normaliser, 0))
    part = tl.load(
        partial + (place * K)[:, None] + k[None, :], mask=(split < count)[:, None], other=0.0
    )
    out_K = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * K + k, out_K.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q,
    keys,
    values,
    table,
    used,
    starts,
    out,
    scale,
    q_stride,
    q_head_stride,
    page_stride,
    token_stride,
    head_stride,
    table_stride,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
):
    """Rows of a tile are (query, head) pairs of one key/value head."""
    tile, g, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.load(starts + n)
    count = tl.load(starts + n + 1) - begin
    if tile * Q >= count * R:
        return
    row_Q, k = tile * Q + tl.arange(0, Q), tl.arange(0, K)
    query_Q, head_Q = row_Q // R, g * R + row_Q % R
    token_Q, is_row_Q1 = (begin + query_Q).to(tl.int64), (query_Q < count)[:, None]
    place_QK = (token_Q * q_stride + head_Q * q_head_stride)[:, None] + k[None, :]
    q_QK = tl.load(q + place_QK, mask=is_row_Q1, other=0.0)
    length = tl.load(used + n)
    before = length - count  # tokens that all queries see
    _, sum_Q, out_QK = _attend(
        q_QK,
        before + query_Q,
        keys + g * head_stride,
        values + g * head_stride,
        table + n * table_stride,
        0,
        tl.minimum(before + (tile * Q + Q - 1) // R + 1, length),
        scale,
        page_stride,
        token_stride,
        K,
        S,
        B,
    )
    out_QK /= sum_Q[:, None]
    place_QK = ((token_Q * (tl.num_programs(1) * R) + head_Q) * K)[:, None] + k[None, :]
    tl.store(out + place_QK, out_QK.to(out.dtype.element_ty), mask=is_row_Q1)


@implement("paged_decode")
def paged_decode(
    q_NHK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, table_NM: Tensor, used_N: Tensor
) -> Tensor:
    """Return the attention of one query of each sequence to the first tokens of its pages.

    The result of a sequence depends only on its own query, keys, values and length, bit for bit:
    not on other rows, and not on the width of the table. Nothing is read on the host.

    Args:
        table_NM, used_N: see `PageTable`; each sequence has at least one token.
    """
    N, H, K = q_NHK.shape
    strides, sizes = _layout(q_NHK, keys_PSGK, values_PSGK, table_NM)
    splits = min(triton.cdiv(table_NM.shape[1] * sizes["S"], _SPLIT), _MAX_SPLITS)
    out_NHK = empty(q_NHK)
    partial = q_NHK.new_empty((N, H, splits, K), dtype=torch.float32)
    normalisers = q_NHK.new_empty((N, H, splits), dtype=torch.float32)
    _decode[(splits, keys_PSGK.shape[2], N)](
        q_NHK,
        keys_PSGK,
        values_PSGK,
        table_NM,
        used_N,
        out_NHK,
        partial,
        normalisers,
        _scale(K),
        splits,
        *strides,
        **sizes,
        Q=max(16, triton.next_power_of_2(sizes["R"])),
        B=_DECODE_BLOCK,
        SPLIT=_SPLIT,
        MAX_SPLITS=_MAX_SPLITS,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _combine[(H, N)](
            partial,
            normalisers,
            used_N,
            out_NHK,
            splits,
            K=K,
            SPLIT=_SPLIT,
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=4,
        )
    return out_NHK


@implement("paged_prefill")
def paged_prefill(
    q_THK: Tensor,
    keys_PSGK: Tensor,
    values_PSGK: Tensor,
    table_NM: Tensor,
    used_N: Tensor,
    starts_N1: Tensor,
    max_queries: int,
) -> Tensor:
    """Return the causal attention of each sequence's last queries to the tokens of its pages.

    Args:
        table_NM, used_N, starts_N1, max_queries: see `PageTable`.
    """
    strides, sizes = _layout(q_THK, keys_PSGK, values_PSGK, table_NM)
    out_THK = empty(q_THK)
    tiles = triton.cdiv(max_queries * sizes["R"], _PREFILL_ROWS)
    _prefill[(tiles, keys_PSGK.shape[2], used_N.numel())](
        q_THK,
        keys_PSGK,
        values_PSGK,
        table_NM,
        used_N,
        starts_N1,
        out_THK,
        _scale(q_THK.shape[2]),
        *strides,
        **sizes,
        Q=_PREFILL_ROWS,
        B=_PREFILL_BLOCK,
        num_warps=8,
        num_stages=3,
    )
    return out_THK


def _scale(head_size: int) -> float:
    """Return the factor for scores, including log2(e), with which exp2 computes exp."""
    return head_size**-0.5 * math.log2(math.e)


def _layout(
    q_THK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, table_NM: Tensor
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Check the layout of the operands; return the strides and the sizes that kernels take."""
    (H, K), (S, G) = q_THK.shape[1:], keys_PSGK.shape[1:3]
    assert q_THK.stride(2) == keys_PSGK.stride(3) == 1
    assert keys_PSGK.stride() == values_PSGK.stride()
    assert S % _DECODE_BLOCK == 0, "a page must consist of whole blocks"
    strides = *q_THK.stride()[:2], *keys_PSGK.stride()[:3], table_NM.stride(0)
    return strides, {"R": H // G, "K": K, "S": S}
