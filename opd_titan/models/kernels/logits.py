"""Reductions over the logits of a vocabulary, in Triton.

Shapes: N rows, V vocabulary, B blocks of 128 columns. In kernels, b blocks of a program, c columns
of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels.operators import operator
from opd_titan.models.kernels.plain import LOGITS_BLOCK

_BLOCKS = 32


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
    # -inf - -inf is NaN: a block of nothing else keeps its exponentials of 0.
    shift_b = tl.where(max_b == float("-inf"), 0.0, max_b)
    sum_b = tl.sum(tl.exp(scaled_bc - shift_b[:, None]), 1)
    place_b = n * N_BLOCKS + block_b
    tl.store(sums + place_b, sum_b, mask=block_b < N_BLOCKS)
    tl.store(maxima + place_b, max_b, mask=block_b < N_BLOCKS)


def _fake_block_stats(logits, temperature):
    shape = (logits.shape[0], -(-logits.shape[1] // LOGITS_BLOCK))
    return logits.new_empty(shape), logits.new_empty(shape)


@operator("block_stats(Tensor logits, float temperature) -> (Tensor, Tensor)", _fake_block_stats)
def block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(x - maximum) of blocks of x = logits / temperature, and the maxima.

    Rows may be strided.
    """
    N, V = logits_NV.shape
    assert logits_NV.dtype == torch.float32 and logits_NV.stride(1) == 1
    sums_NB, maxima_NB = _fake_block_stats(logits_NV, temperature)
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
