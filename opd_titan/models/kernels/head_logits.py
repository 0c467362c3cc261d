"""The training head's passes over logits, in Triton. Each pass reads the logits once.

Shapes: C rows, V columns of this rank. In kernels, v the columns of a block. Each lane of a block
has its own maximum and sums, so that threads exchange nothing in the loop over a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels.ops import check_logits, implement

_STATS = {"BLOCK": 2048, "num_warps": 8}
_GRAD = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def _rescale(top_v, x_v):
    """Return the new running maximum, a finite shift for exp, and the factor for earlier sums."""
    new_v = tl.maximum(top_v, x_v)
    shift_v = tl.where(new_v == float("-inf"), 0.0, new_v)
    return new_v, shift_v, tl.exp(top_v - shift_v)


@triton.jit
def _lanes(top_v, sum_v):
    """Return a row's logsumexp, the factor of each lane's sums, and the total (1 if it is 0)."""
    top = tl.max(top_v, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    scale_v = tl.exp(top_v - shift)
    total = tl.sum(sum_v * scale_v, 0)
    return shift + tl.log(total), scale_v, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _logit_stats(logits, rows, out, stride, C, V, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    logits += c * stride
    lane_v = tl.arange(0, BLOCK)
    top_v = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    mean_v = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x_v = tl.load(logits + start + lane_v, mask=start + lane_v < V, other=float("-inf"))
        top_v, shift_v, scale_v = _rescale(top_v, x_v)
        weight_v = tl.exp(x_v - shift_v)
        sum_v = sum_v * scale_v + weight_v
        if MEAN:
            mean_v = mean_v * scale_v + tl.where(x_v == float("-inf"), 0.0, weight_v * x_v)
    lse, scale_v, total = _lanes(top_v, sum_v)
    row = tl.load(rows + c)
    tl.store(out + c, tl.load(logits + row, mask=row >= 0, other=float("-inf")))
    tl.store(out + C + c, lse)
    if MEAN:
        tl.store(out + 2 * C + c, tl.sum(mean_v * scale_v, 0) / total)


@triton.jit
def _kl_stats(student, other, rows, out, student_stride, other_stride, C, V, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    student += c * student_stride
    other += c * other_stride
    lane_v = tl.arange(0, BLOCK)
    top_v = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    mean_v = tl.zeros([BLOCK], tl.float32)
    difference_v = tl.zeros([BLOCK], tl.float32)
    other_top_v = tl.full([BLOCK], float("-inf"), tl.float32)
    other_sum_v = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside_v = start + lane_v < V
        x_v = tl.load(student + start + lane_v, mask=inside_v, other=float("-inf"))
        y_v = tl.load(other + start + lane_v, mask=inside_v, other=float("-inf"))
        top_v, shift_v, scale_v = _rescale(top_v, x_v)
        weight_v = tl.exp(x_v - shift_v)
        cut_v = x_v == float("-inf")
        sum_v = sum_v * scale_v + weight_v
        mean_v = mean_v * scale_v + tl.where(cut_v, 0.0, weight_v * x_v)
        difference_v = difference_v * scale_v + tl.where(cut_v, 0.0, weight_v * (x_v - y_v))
        other_top_v, shift_v, scale_v = _rescale(other_top_v, y_v)
        other_sum_v = other_sum_v * scale_v + tl.exp(y_v - shift_v)
    row = tl.load(rows + c)
    tl.store(out + c, tl.load(student + row, mask=row >= 0, other=float("-inf")))
    tl.store(out + 3 * C + c, tl.load(other + row, mask=row >= 0, other=float("-inf")))
    lse, scale_v, total = _lanes(top_v, sum_v)
    tl.store(out + C + c, lse)
    tl.store(out + 2 * C + c, tl.sum(mean_v * scale_v, 0) / total)
    tl.store(out + 5 * C + c, tl.sum(difference_v * scale_v, 0) / total)
    lse, scale_v, total = _lanes(other_top_v, other_sum_v)
    tl.store(out + 4 * C + c, lse)


@triton.jit
def _softmax_grad(logits, lses, gs, rows, out, stride, V, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    column_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_v = column_v < V
    x_v = tl.load(logits + c * stride + column_v, mask=inside_v, other=float("-inf"))
    g = tl.load(gs + c)
    hit_v = column_v == tl.load(rows + c)
    grad_v = g * (tl.where(hit_v, 1.0, 0.0) - tl.exp(x_v - tl.load(lses + c)))
    tl.store(out + c * V + column_v, grad_v.to(out.dtype.element_ty), mask=inside_v)


@triton.jit
def _kl_grad(
    student, other, lses, means, out, student_stride, other_stride, V, BLOCK: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64)
    column_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_v = column_v < V
    x_v = tl.load(student + c * student_stride + column_v, mask=inside_v, other=float("-inf"))
    y_v = tl.load(other + c * other_stride + column_v, mask=inside_v, other=0.0)
    prob_v = tl.exp(x_v - tl.load(lses + c))
    grad_v = prob_v * (x_v - y_v - tl.load(means + c))
    grad_v = tl.where(x_v == float("-inf"), 0.0, grad_v)
    tl.store(out + c * V + column_v, grad_v.to(out.dtype.element_ty), mask=inside_v)


@implement("logit_stats")
def logit_stats(logits_Cv: Tensor, column_C: Tensor, mean: bool) -> Tensor:
    C, V = check_logits(logits_Cv)
    out = logits_Cv.new_empty(2 + mean, C)
    _logit_stats[(C,)](logits_Cv, column_C, out, logits_Cv.stride(0), C, V, MEAN=mean, **_STATS)
    return out


@implement("kl_stats")
def kl_stats(student_Cv: Tensor, other_Cv: Tensor, column_C: Tensor) -> Tensor:
    C, V = check_logits(student_Cv, other_Cv)
    out_6C = student_Cv.new_empty(6, C)
    strides = student_Cv.stride(0), other_Cv.stride(0)
    _kl_stats[(C,)](student_Cv, other_Cv, column_C, out_6C, *strides, C, V, **_STATS)
    return out_6C


@implement("softmax_grad")
def softmax_grad(
    logits_Cv: Tensor, lse_C: Tensor, g_C: Tensor, column_C: Tensor, dtype: torch.dtype
) -> Tensor:
    C, V = check_logits(logits_Cv)
    out_Cv = torch.empty(C, V, dtype=dtype, device=logits_Cv.device)
    grid = (C, triton.cdiv(V, _GRAD["BLOCK"]))
    _softmax_grad[grid](
        logits_Cv, lse_C, g_C.contiguous(), column_C, out_Cv, logits_Cv.stride(0), V, **_GRAD
    )
    return out_Cv


@implement("kl_grad")
def kl_grad(
    student_Cv: Tensor, other_Cv: Tensor, lse_C: Tensor, mean_C: Tensor, dtype: torch.dtype
) -> Tensor:
    C, V = check_logits(student_Cv, other_Cv)
    out_Cv = torch.empty(C, V, dtype=dtype, device=student_Cv.device)
    grid = (C, triton.cdiv(V, _GRAD["BLOCK"]))
    strides = student_Cv.stride(0), other_Cv.stride(0)
    _kl_grad[grid](student_Cv, other_Cv, lse_C, mean_C, out_Cv, *strides, V, **_GRAD)
    return out_Cv
