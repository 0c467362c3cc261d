"""What lies between the products of a layer, in Triton.

Each kernel rounds where its plain twin does. Shapes: T tokens, F MLP width, D model width, H query
heads, G key/value heads, R query heads of one of them, K head size, P pages of a KV cache, S tokens
of a page. In kernels, B elements of a program, h half a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_titan.models.kernels.ops import implement, two_empty

_MLP_BLOCK = 1024


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
def _add_norm(
    x, y, weight, total, normed, eps, x_stride, y_stride, D: tl.constexpr, B: tl.constexpr
):
    t, d_B = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    x_B = tl.load(x + t * x_stride + d_B, mask=d_B < D, other=0.0)
    y_B = tl.load(y + t * y_stride + d_B, mask=d_B < D, other=0.0)
    rounded_B = (x_B.to(tl.float32) + y_B.to(tl.float32)).to(x_B.dtype)
    tl.store(total + t * D + d_B, rounded_B, mask=d_B < D)
    total_B = rounded_B.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total_B * total_B, 0) / D + eps)
    weight_B = tl.load(weight + d_B, mask=d_B < D, other=0.0).to(tl.float32)
    tl.store(normed + t * D + d_B, (total_B * scale * weight_B).to(x_B.dtype), mask=d_B < D)


@implement("add_norm")
def add_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMSNorm. Rows may be strided."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == y_TD.stride(1) == weight_D.stride(0) == 1
    total_TD, normed_TD = two_empty(x_TD, y_TD)
    B = triton.next_power_of_2(D)
    _add_norm[(T,)](
        x_TD,
        y_TD,
        weight_D,
        total_TD,
        normed_TD,
        eps,
        x_TD.stride(0),
        y_TD.stride(0),
        D=D,
        B=B,
        # 16 elements of a thread at most, 2 loads of 16 bytes.
        num_warps=min(max(B // 512, 1), 16),
    )
    return total_TD, normed_TD


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
    """One key/value head of one token, and its query heads."""
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

    Keys and values are written into a layer's cache as well, if it is given. Tokens may be strided,
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
