"""Triton kernels for a layer's norms, rotary embedding and activation, and their gradients.

A forward rounds at the same places as its plain twin. A backward rounds only its results.

Shapes: T tokens, F MLP width, D model width, H query heads, G key/value heads, R query heads of one
of them, K head size, P pages of a KV cache, S tokens of a page. In kernels, B elements of a
program, h half a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels.ops import empty, implement, two_empty

_MLP_BLOCK = 1024
# Upper bound on the fp32 elements of a weight's partial gradients, [programs, ...]: each program
# sums over several tokens. The bound gives about as many programs as a GPU runs at once.
_SUMS = 1 << 20


@triton.jit
def _silu_mul(gate, up, out, F, gate_stride, up_stride, B: tl.constexpr):
    t, f_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    gate_B = tl.load(gate + t * gate_stride + f_B, mask=f_B < F, other=0.0)
    up_B = tl.load(up + t * up_stride + f_B, mask=f_B < F, other=0.0).to(tl.float32)
    x_B = gate_B.to(tl.float32)
    silu_B = (x_B / (1.0 + tl.exp(-x_B))).to(gate_B.dtype).to(tl.float32)
    tl.store(out + t * F + f_B, (silu_B * up_B).to(gate_B.dtype), mask=f_B < F)


@implement("silu_mul")
def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up. Rows may be strided."""
    T, F = gate_TF.shape
    assert gate_TF.stride(1) == up_TF.stride(1) == 1
    out_TF = torch.empty((T, F), dtype=gate_TF.dtype, device=gate_TF.device)
    _silu_mul[(T, triton.cdiv(F, _MLP_BLOCK))](
        gate_TF, up_TF, out_TF, F, gate_TF.stride(0), up_TF.stride(0), B=_MLP_BLOCK, num_warps=4
    )
    return out_TF


@triton.jit
def _silu_mul_backward(gate, up, g, d_gate, d_up, F, gate_stride, up_stride, B: tl.constexpr):
    t, f_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    x_B = tl.load(gate + t * gate_stride + f_B, mask=f_B < F, other=0.0).to(tl.float32)
    up_B = tl.load(up + t * up_stride + f_B, mask=f_B < F, other=0.0).to(tl.float32)
    g_B = tl.load(g + t * F + f_B, mask=f_B < F, other=0.0).to(tl.float32)
    sigmoid_B = 1.0 / (1.0 + tl.exp(-x_B))
    slope_B = sigmoid_B * (1.0 + x_B * (1.0 - sigmoid_B))
    dtype = d_gate.dtype.element_ty
    tl.store(d_gate + t * F + f_B, (g_B * up_B * slope_B).to(dtype), mask=f_B < F)
    tl.store(d_up + t * F + f_B, (g_B * x_B * sigmoid_B).to(dtype), mask=f_B < F)


@implement("silu_mul_backward")
def silu_mul_backward(gate_TF: Tensor, up_TF: Tensor, g_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up from the gradient of silu(gate) * up.

    Rows of gate and up may be strided.
    """
    T, F = gate_TF.shape
    assert gate_TF.stride(1) == up_TF.stride(1) == 1 and g_TF.is_contiguous()
    d_gate_TF, d_up_TF = two_empty(gate_TF, up_TF)
    _silu_mul_backward[(T, triton.cdiv(F, _MLP_BLOCK))](
        gate_TF,
        up_TF,
        g_TF,
        d_gate_TF,
        d_up_TF,
        F,
        gate_TF.stride(0),
        up_TF.stride(0),
        B=_MLP_BLOCK,
        num_warps=4,
    )
    return d_gate_TF, d_up_TF


@triton.jit
def _add_norm(
    x, y, weight, total, normed, eps, x_stride, y_stride, D: tl.constexpr, B: tl.constexpr
):
    t, d_B = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    x_B = tl.load(x + t * x_stride + d_B, mask=d_B < D, other=0.0)
    total_B = x_B.to(tl.float32)
    if y is not None:
        total_B += tl.load(y + t * y_stride + d_B, mask=d_B < D, other=0.0).to(tl.float32)
        rounded_B = total_B.to(x_B.dtype)
        tl.store(total + t * D + d_B, rounded_B, mask=d_B < D)
        total_B = rounded_B.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total_B * total_B, 0) / D + eps)
    weight_B = tl.load(weight + d_B, mask=d_B < D, other=0.0).to(tl.float32)
    tl.store(normed + t * D + d_B, (total_B * scale * weight_B).to(x_B.dtype), mask=d_B < D)


def _warps(block: int) -> int:
    """Return the number of warps of a program that holds a row: at most 16 elements per thread."""
    return min(max(block // 512, 1), 16)


@implement("norm")
def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x. Rows may be strided."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == weight_D.stride(0) == 1
    normed_TD, B = empty(x_TD), triton.next_power_of_2(D)
    strides = x_TD.stride(0), 0
    _add_norm[(T,)](
        x_TD, None, weight_D, None, normed_TD, eps, *strides, D=D, B=B, num_warps=_warps(B)
    )
    return normed_TD


@implement("add_norm")
def add_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMSNorm. Rows may be strided."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == y_TD.stride(1) == weight_D.stride(0) == 1
    total_TD, normed_TD = two_empty(x_TD, y_TD)
    B, strides = triton.next_power_of_2(D), (x_TD.stride(0), y_TD.stride(0))
    _add_norm[(T,)](
        x_TD, y_TD, weight_D, total_TD, normed_TD, eps, *strides, D=D, B=B, num_warps=_warps(B)
    )
    return total_TD, normed_TD


@triton.jit
def _norm_backward(
    x,
    weight,
    g,
    g_x,
    d_x,
    d_weight,
    T,
    eps,
    x_stride,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """Process tokens first, first + step, ..., and store the sum of their weight gradients."""
    first, step, d_B = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, B)
    weight_B = tl.load(weight + d_B, mask=d_B < D, other=0.0).to(tl.float32)
    d_weight_B = tl.zeros([B], tl.float32)
    for i in range(tl.cdiv(T - first, step)):
        t = first + i * step
        x_B = tl.load(x + t * x_stride + d_B, mask=d_B < D, other=0.0).to(tl.float32)
        g_B = tl.load(g + t * D + d_B, mask=d_B < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x_B * x_B, 0) / D + eps)
        x_B *= scale
        d_weight_B += g_B * x_B
        g_B *= weight_B
        d_x_B = (g_B - x_B * (tl.sum(g_B * x_B, 0) / D)) * scale
        if g_x is not None:
            d_x_B += tl.load(g_x + t * D + d_B, mask=d_B < D, other=0.0).to(tl.float32)
        tl.store(d_x + t * D + d_B, d_x_B.to(d_x.dtype.element_ty), mask=d_B < D)
    tl.store(d_weight + first * D + d_B, d_weight_B, mask=d_B < D)


@implement("norm_backward")
def norm_backward(
    x_TD: Tensor, weight_D: Tensor, eps: float, g_TD: Tensor, g_x_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight from the gradient of the RMSNorm.

    Args:
        x_TD: rows may be strided.
        g_x_TD: a gradient to add to the gradient of x, or None.
    """
    T, D = x_TD.shape
    assert x_TD.stride(1) == weight_D.stride(0) == 1 and g_TD.is_contiguous()
    assert g_x_TD is None or g_x_TD.is_contiguous()
    d_x_TD, B = empty(x_TD), triton.next_power_of_2(D)
    programs = max(1, min(T, _SUMS // B))
    d_weight_PD = torch.empty((programs, D), dtype=torch.float32, device=x_TD.device)
    _norm_backward[(programs,)](
        x_TD,
        weight_D,
        g_TD,
        g_x_TD,
        d_x_TD,
        d_weight_PD,
        T,
        eps,
        x_TD.stride(0),
        D=D,
        B=B,
        num_warps=min(2 * _warps(B), 32),  # three rows at once, and the sum
    )
    return d_x_TD, d_weight_PD.sum(dim=0).to(weight_D.dtype)


@triton.jit
def _norm_rotate(first_Qh, second_Qh, weight, cos_h, sin_h, eps, K: tl.constexpr):
    """Return both halves of each row's head, after norm and rotation."""
    h = tl.arange(0, K // 2)
    dtype = first_Qh.dtype
    first_Qh, second_Qh = first_Qh.to(tl.float32), second_Qh.to(tl.float32)
    squares_Q = tl.sum(first_Qh * first_Qh, 1) + tl.sum(second_Qh * second_Qh, 1)
    scale_Q1 = tl.rsqrt(squares_Q / K + eps)[:, None]
    first_weight_h = tl.load(weight + h).to(tl.float32)
    second_weight_h = tl.load(weight + K // 2 + h).to(tl.float32)
    first_Qh = (first_Qh * scale_Q1 * first_weight_h[None, :]).to(dtype).to(tl.float32)
    second_Qh = (second_Qh * scale_Q1 * second_weight_h[None, :]).to(dtype).to(tl.float32)
    cos_1h, sin_1h = cos_h[None, :], sin_h[None, :]
    return (
        (first_Qh * cos_1h - second_Qh * sin_1h).to(dtype),
        (second_Qh * cos_1h + first_Qh * sin_1h).to(dtype),
    )


@triton.jit
def _norm_rope(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    keys,
    values,
    page,
    offset,
    eps,
    q_stride,
    k_stride,
    v_stride,
    page_stride,
    token_stride,
    head_stride,
    R: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """Process one key/value head of one token, and its query heads."""
    t, g, G = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = tl.arange(0, K // 2)
    cos_h, sin_h = tl.load(cos + t * K + h), tl.load(sin + t * K + h)

    row_Q = tl.arange(0, Q)
    place_Qh = ((g * R + row_Q) * K)[:, None] + h[None, :]
    is_row_Q1 = (row_Q < R)[:, None]
    first_Qh = tl.load(q + t * q_stride + place_Qh, mask=is_row_Q1, other=0.0)
    second_Qh = tl.load(q + t * q_stride + place_Qh + K // 2, mask=is_row_Q1, other=0.0)
    first_Qh, second_Qh = _norm_rotate(first_Qh, second_Qh, q_weight, cos_h, sin_h, eps, K)
    q_out += t * (G * R * K)
    tl.store(q_out + place_Qh, first_Qh, mask=is_row_Q1)
    tl.store(q_out + place_Qh + K // 2, second_Qh, mask=is_row_Q1)

    place_1h = (g * K + h)[None, :]
    first_1h = tl.load(k + t * k_stride + place_1h)
    second_1h = tl.load(k + t * k_stride + place_1h + K // 2)
    first_1h, second_1h = _norm_rotate(first_1h, second_1h, k_weight, cos_h, sin_h, eps, K)
    k_out += t * (G * K)
    tl.store(k_out + place_1h, first_1h)
    tl.store(k_out + place_1h + K // 2, second_1h)

    if keys is not None:
        slot = tl.load(page + t) * page_stride + tl.load(offset + t) * token_stride
        slot += g * head_stride
        tl.store(keys + slot + h[None, :], first_1h)
        tl.store(keys + slot + K // 2 + h[None, :], second_1h)
        head = tl.arange(0, K)
        tl.store(values + slot + head, tl.load(v + t * v_stride + g * K + head))


@implement("norm_rope")
def norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    eps: float,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    keys_PSGK: Tensor | None,
    values_PSGK: Tensor | None,
    page_T: Tensor | None,
    offset_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys after the RMSNorm of each head and the rotary embedding.

    Keys and values are also written into a layer's cache, if it is given. Tokens may be strided,
    heads may not.
    """
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    for x in (q_THK, k_TGK, v_TGK):
        assert x.stride()[1:] == (K, 1)
    assert cos_T1K.is_contiguous() and sin_T1K.is_contiguous()
    cache_strides: tuple[int, ...] = (0, 0, 0)
    if keys_PSGK is not None and values_PSGK is not None:
        assert keys_PSGK.stride() == values_PSGK.stride() and keys_PSGK.stride(3) == 1
        cache_strides = keys_PSGK.stride()[:3]
    q_out_THK, k_out_TGK = two_empty(q_THK, k_TGK)
    _norm_rope[(T, G)](
        q_THK,
        k_TGK,
        v_TGK,
        q_weight_K,
        k_weight_K,
        cos_T1K,
        sin_T1K,
        q_out_THK,
        k_out_TGK,
        keys_PSGK,
        values_PSGK,
        page_T,
        offset_T,
        eps,
        q_THK.stride(0),
        k_TGK.stride(0),
        v_TGK.stride(0),
        *cache_strides,
        R=H // G,
        K=K,
        Q=triton.next_power_of_2(H // G),
        num_warps=1,
    )
    return q_out_THK, k_out_TGK


@triton.jit
def _norm_rotate_backward(
    x_Qh, g_Qh, d_x_Qh, is_row_Q1, weight, cos_h, sin_h, eps, K: tl.constexpr
):
    """Store the gradients of rows' heads, and return the gradients of the weight's halves.

    Args:
        x_Qh, g_Qh, d_x_Qh: pointers to the first halves.
    """
    h = tl.arange(0, K // 2)
    first_Qh = tl.load(x_Qh, mask=is_row_Q1, other=0.0).to(tl.float32)
    second_Qh = tl.load(x_Qh + K // 2, mask=is_row_Q1, other=0.0).to(tl.float32)
    first_g_Qh = tl.load(g_Qh, mask=is_row_Q1, other=0.0).to(tl.float32)
    second_g_Qh = tl.load(g_Qh + K // 2, mask=is_row_Q1, other=0.0).to(tl.float32)
    cos_1h, sin_1h = cos_h[None, :], sin_h[None, :]
    rotated_Qh = first_g_Qh * cos_1h + second_g_Qh * sin_1h
    second_g_Qh = second_g_Qh * cos_1h - first_g_Qh * sin_1h

    squares_Q = tl.sum(first_Qh * first_Qh, 1) + tl.sum(second_Qh * second_Qh, 1)
    scale_Q1 = tl.rsqrt(squares_Q / K + eps)[:, None]
    first_Qh *= scale_Q1
    second_Qh *= scale_Q1
    first_d_weight_h = tl.sum(rotated_Qh * first_Qh, 0)
    second_d_weight_h = tl.sum(second_g_Qh * second_Qh, 0)
    rotated_Qh *= tl.load(weight + h).to(tl.float32)[None, :]
    second_g_Qh *= tl.load(weight + K // 2 + h).to(tl.float32)[None, :]
    dots_Q = tl.sum(rotated_Qh * first_Qh, 1) + tl.sum(second_g_Qh * second_Qh, 1)
    mean_Q1 = (dots_Q / K)[:, None]
    dtype = d_x_Qh.dtype.element_ty
    d_first_Qh = ((rotated_Qh - first_Qh * mean_Q1) * scale_Q1).to(dtype)
    d_second_Qh = ((second_g_Qh - second_Qh * mean_Q1) * scale_Q1).to(dtype)
    tl.store(d_x_Qh, d_first_Qh, mask=is_row_Q1)
    tl.store(d_x_Qh + K // 2, d_second_Qh, mask=is_row_Q1)
    return first_d_weight_h, second_d_weight_h


@triton.jit
def _norm_rope_backward(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_g,
    k_g,
    d_q,
    d_k,
    d_weights,
    T,
    eps,
    q_stride,
    k_stride,
    R: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """Process one key/value head, and its query heads, of tokens first, first + step, ..."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    g, G = tl.program_id(1), tl.num_programs(1)
    h, row_Q = tl.arange(0, K // 2), tl.arange(0, Q)
    place_Qh = ((g * R + row_Q) * K)[:, None] + h[None, :]
    place_1h, is_row_Q1 = (g * K + h)[None, :], (row_Q < R)[:, None]
    is_row_11 = tl.full([1, 1], True, tl.int1)
    q_first_h, q_second_h = tl.zeros([K // 2], tl.float32), tl.zeros([K // 2], tl.float32)
    k_first_h, k_second_h = tl.zeros([K // 2], tl.float32), tl.zeros([K // 2], tl.float32)
    for i in range(tl.cdiv(T - first, step)):
        t = first + i * step
        cos_h, sin_h = tl.load(cos + t * K + h), tl.load(sin + t * K + h)
        q_at, at = q + t * q_stride + place_Qh, t * (G * R * K) + place_Qh
        first_h, second_h = _norm_rotate_backward(
            q_at, q_g + at, d_q + at, is_row_Q1, q_weight, cos_h, sin_h, eps, K
        )
        q_first_h += first_h
        q_second_h += second_h
        k_at, at = k + t * k_stride + place_1h, t * (G * K) + place_1h
        first_h, second_h = _norm_rotate_backward(
            k_at, k_g + at, d_k + at, is_row_11, k_weight, cos_h, sin_h, eps, K
        )
        k_first_h += first_h
        k_second_h += second_h
    out = d_weights + (first * G + g) * (2 * K) + h
    tl.store(out, q_first_h)
    tl.store(out + K // 2, q_second_h)
    tl.store(out + K, k_first_h)
    tl.store(out + K + K // 2, k_second_h)


@implement("norm_rope_backward")
def norm_rope_backward(
    q_THK: Tensor,
    k_TGK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    eps: float,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    q_g_THK: Tensor,
    k_g_TGK: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and weights from `norm_rope`'s output gradients.

    Tokens of queries and keys may be strided, heads may not.
    """
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    assert q_THK.stride()[1:] == k_TGK.stride()[1:] == (K, 1)
    assert q_g_THK.is_contiguous() and k_g_TGK.is_contiguous()
    assert cos_T1K.is_contiguous() and sin_T1K.is_contiguous()
    programs = max(1, min(T, _SUMS // (2 * G * K)))
    d_q_THK, d_k_TGK = two_empty(q_THK, k_TGK)
    d_weights_P2K = torch.empty((programs * G, 2, K), dtype=torch.float32, device=q_THK.device)
    _norm_rope_backward[(programs, G)](
        q_THK,
        k_TGK,
        q_weight_K,
        k_weight_K,
        cos_T1K,
        sin_T1K,
        q_g_THK,
        k_g_TGK,
        d_q_THK,
        d_k_TGK,
        d_weights_P2K,
        T,
        eps,
        q_THK.stride(0),
        k_TGK.stride(0),
        R=H // G,
        K=K,
        Q=triton.next_power_of_2(H // G),
        num_warps=1,
    )
    d_q_weight_K, d_k_weight_K = d_weights_P2K.sum(dim=0).to(q_weight_K.dtype).unbind()
    return d_q_THK, d_k_TGK, d_q_weight_K, d_k_weight_K
