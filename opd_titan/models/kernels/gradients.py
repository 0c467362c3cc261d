"""Autograd functions for the fused operators between a layer's matrix products.

The backward recomputes the forward's intermediate values, so that only the inputs are saved (for
`AddNorm`, the sum). Shapes: see the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.opd_titan


class SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return _OPS.silu_mul(gate_TF, up_TF)

    @staticmethod
    def backward(ctx: Any, g_TF: Tensor) -> tuple[Tensor, Tensor]:
        return _OPS.silu_mul_backward(*ctx.saved_tensors, g_TF.contiguous())


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return _OPS.norm(x_TD, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_OPS.norm_backward(*ctx.saved_tensors, ctx.eps, g_TD.contiguous(), None), None


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total_TD, normed_TD = _OPS.add_norm(x_TD, y_TD, weight_D, eps)
        ctx.save_for_backward(total_TD, weight_D)
        ctx.eps = eps
        return total_TD, normed_TD

    @staticmethod
    def backward(ctx: Any, g_total_TD: Tensor, g_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        d_TD, d_weight_D = _OPS.norm_backward(
            *ctx.saved_tensors, ctx.eps, g_TD.contiguous(), g_total_TD.contiguous()
        )
        return d_TD, d_TD, d_weight_D, None


class NormRope(torch.autograd.Function):
    """`norm_rope` without a KV cache, which training does not use."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        q_weight_K: Tensor,
        k_weight_K: Tensor,
        eps: float,
        cos_T1K: Tensor,
        sin_T1K: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_THK, k_TGK, q_weight_K, k_weight_K, cos_T1K, sin_T1K)
        ctx.eps = eps
        weights, tables = (q_weight_K, k_weight_K), (cos_T1K, sin_T1K)
        return _OPS.norm_rope(q_THK, k_TGK, v_TGK, *weights, eps, *tables, *[None] * 4)

    @staticmethod
    def backward(ctx: Any, q_g_THK: Tensor, k_g_TGK: Tensor) -> tuple[Tensor | None, ...]:
        *operands, cos_T1K, sin_T1K = ctx.saved_tensors
        d_q_THK, d_k_TGK, *d_weights = _OPS.norm_rope_backward(
            *operands, ctx.eps, cos_T1K, sin_T1K, q_g_THK.contiguous(), k_g_TGK.contiguous()
        )
        return d_q_THK, d_k_TGK, None, *d_weights, None, None, None
