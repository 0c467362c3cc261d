"""Operations with a fused kernel on some devices, and a plain PyTorch implementation on all.

The caller calls the operation; its tensors decide which implementation runs (`fused`, `device`).
The implementations in `plain` run on all devices and have gradients; the kernels are tested against
them. The Triton kernels are PyTorch operators (`ops`), so that they also work on fake tensors.
Triton comes with CUDA builds of PyTorch; it is imported only if it is installed.

Shapes: T tokens, D model width, F MLP width, H query heads, G key/value heads, K head size, P pages
of a KV cache, S tokens of a page, N sequences, M pages of the longest sequence, V vocabulary, B
blocks of 128 of its tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_titan.models.kernels import head_plain, ops, plain  # noqa: F401 - ops defines the operators
from opd_titan.models.kernels.device import HALF, device_of
from opd_titan.models.kernels.gradients import AddNorm, Norm, NormRope, SiluMul
from opd_titan.models.kernels.plain import CacheSlots as CacheSlots

HEAD_SIZES = (32, 64, 128)


def fused(x: Tensor, dtypes: tuple[torch.dtype, ...] = HALF) -> bool:
    """Return whether operations on `x` run in fused kernels.

    Return False inside torch.compile, which fuses the plain implementation itself.

    Args:
        dtypes: the dtypes that the kernel supports.
    """
    return not torch.compiler.is_compiling() and x.dtype in dtypes and not device_of(x).why_plain


def can_pack(dtype: torch.dtype, x: Tensor | torch.device) -> bool:
    """Return whether the device of `x` has products with packed weights of this dtype."""
    return dtype == torch.bfloat16 and device_of(x).packs


def pack_weight(weight_OI: Tensor) -> Tensor:
    """Return a copy of a linear layer's weight in the CPU's own layout, for `packed_linear`.

    A product with few rows is limited by reading the weight. It reads plain rows and columns at
    half of the memory's bandwidth, and this layout at nearly the full bandwidth.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI)


def packed_linear(x_TI: Tensor, packed_OI: Tensor) -> Tensor:
    """Return the product of x and a packed weight, [T, O], without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, packed_OI, None, "none", [], "")


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, F]. Rows may be strided."""
    if not fused(gate_TF):
        return plain.silu_mul(gate_TF, up_TF)
    if torch.is_grad_enabled():
        return SiluMul.apply(gate_TF, up_TF)
    return torch.ops.opd_titan.silu_mul(gate_TF, up_TF)


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x, [T, D]."""
    if not fused(x_TD):
        return plain.norm(x_TD, weight_D, eps)
    if torch.is_grad_enabled():
        return Norm.apply(x_TD, weight_D, eps)
    return torch.ops.opd_titan.norm(x_TD, weight_D, eps)


def add_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMSNorm, [T, D] each."""
    if not fused(x_TD):
        return plain.add_norm(x_TD, y_TD, weight_D, eps)
    if torch.is_grad_enabled():
        return AddNorm.apply(x_TD, y_TD, weight_D, eps)
    return torch.ops.opd_titan.add_norm(x_TD, y_TD, weight_D, eps)


def norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    eps: float,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    slots: CacheSlots | None = None,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys after the RMSNorm of each head and the rotary embedding.

    Args:
        cos_T1K, sin_T1K: fp32 tables of the rotate-half convention; both halves of K are equal.
        slots: where the keys and `v_TGK` are written as well, without gradients.
    """
    rest = q_weight_K, k_weight_K, eps, cos_T1K, sin_T1K
    if fused(q_THK) and q_THK.shape[-1] in HEAD_SIZES:
        if slots is None and torch.is_grad_enabled():
            return NormRope.apply(q_THK, k_TGK, v_TGK, *rest)
        return torch.ops.opd_titan.norm_rope(q_THK, k_TGK, v_TGK, *rest, *(slots or [None] * 4))
    q_THK, k_TGK = plain.norm_rope(q_THK, k_TGK, *rest)
    if slots is not None:
        plain.write(slots, k_TGK, v_TGK)
    return q_THK, k_TGK


def block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(x - maximum) over blocks of 128 columns, and the maxima.

    Args:
        logits_NV: fp32; x is logits / temperature. Rows may be strided.

    Returns:
        fp32 [N, B] each; 0 and -inf for a block in which all logits are -inf.
    """
    if fused(logits_NV, (torch.float32,)):
        return torch.ops.opd_titan.block_stats(logits_NV, temperature)
    return plain.block_stats(logits_NV, temperature)


def block_totals(sums_NB: Tensor, maxima_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's highest logit / temperature, and its sum of exponentials relative to it.

    Args:
        sums_NB, maxima_NB: the results of `block_stats`.

    Returns:
        The highest x = logits / temperature, fp32 [N], and the sum of exp(x - highest), fp64 [N].
    """
    if fused(sums_NB, (torch.float32,)):
        return torch.ops.opd_titan.block_totals(sums_NB, maxima_NB)
    return plain.block_totals(sums_NB, maxima_NB)


def invert_blocks(
    logits_NV: Tensor,
    sums_NB: Tensor,
    maxima_NB: Tensor,
    highest_N: Tensor,
    target_N: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the first token of each row at which the running sum exceeds the target.

    The running sum adds exp(x - highest) in the order of token ids, x = logits / temperature.

    Args:
        logits_NV: fp32. Rows may be strided.
        sums_NB, maxima_NB: the `block_stats` of the logits.
        highest_N: from `block_totals`.
        target_N: fp64, in [0, total).

    Returns:
        The tokens, int64 [N], always in [0, V), even if logits are NaN; and x - highest of those
        tokens, fp64 [N].
    """
    if fused(logits_NV, (torch.float32,)):
        return torch.ops.opd_titan.invert_blocks(
            logits_NV, sums_NB, maxima_NB, highest_N, target_N, temperature
        )
    return plain.invert_blocks(logits_NV, sums_NB, maxima_NB, highest_N, target_N, temperature)


def uniforms(keys_N: Tensor, positions_N: Tensor) -> Tensor:
    """Return a number in [0, 1) for each (key, position), fp64 [N], with 53 random bits.

    SplitMix64 in counter mode. All devices return the same bits.

    Args:
        keys_N, positions_N: int64, contiguous.
    """
    if fused(keys_N, (torch.int64,)):
        return torch.ops.opd_titan.uniforms(keys_N, positions_N)
    return plain.uniforms(keys_N, positions_N)


def truncation_threshold(logits_NV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the lowest logit that top-k followed by top-p keeps: the threshold, and a count.

    Every logit above the threshold is kept. The count is the number of logits equal to the
    threshold that are kept; they have the lowest token ids.

    Args:
        logits_NV: fp32. Rows may be strided.
        top_k: 0 keeps all.
        top_p: the smallest set of most likely tokens with this mass is kept; 1.0 keeps all.

    Returns:
        fp32 [N] and int64 [N].
    """
    if fused(logits_NV, (torch.float32,)):
        return torch.ops.opd_titan.truncation_threshold(logits_NV, top_k, top_p)
    return plain.truncation_threshold(logits_NV, top_k, top_p)


# Operations of the training head, on fp32 logits [C, v] of C tokens and this rank's v columns.
# `column_C` is the column of each target token, or -1 if another rank holds it. A logit of -inf
# marks a truncated token, which contributes 0. Rows may be strided.


def logit_stats(logits_Cv: Tensor, column_C: Tensor, mean: bool) -> Tensor:
    """Return statistics of each row, fp32 [2, C], or [3, C] with `mean`.

    They are the logit at `column_C` (-inf if `column_C` is -1), the logsumexp (-inf if all logits
    are -inf), and the mean of the logits under their own softmax (0 if all logits are -inf).
    """
    if fused(logits_Cv, (torch.float32,)):
        return torch.ops.opd_titan.logit_stats(logits_Cv, column_C, mean)
    return head_plain.logit_stats(logits_Cv, column_C, mean)


def kl_stats(student_Cv: Tensor, other_Cv: Tensor, column_C: Tensor) -> Tensor:
    """Return fp32 [6, C]: three statistics of the student, two of the other model, and a mean.

    The first three are the student's `logit_stats` with `mean`, the next two the other model's
    without it. The last is the mean of student - other under the student's softmax. The other
    model's logits must be finite.
    """
    if fused(student_Cv, (torch.float32,)):
        return torch.ops.opd_titan.kl_stats(student_Cv, other_Cv, column_C)
    return head_plain.kl_stats(student_Cv, other_Cv, column_C)


def softmax_grad(
    logits_Cv: Tensor, lse_C: Tensor, g_C: Tensor, column_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return g (onehot - exp(x - lse)) in `dtype`: g times the derivative of a row's log-prob.

    `logits_Cv` may be overwritten.
    """
    if fused(logits_Cv, (torch.float32,)):
        return torch.ops.opd_titan.softmax_grad(logits_Cv, lse_C, g_C, column_C, dtype)
    return head_plain.softmax_grad(logits_Cv, lse_C, g_C, column_C, dtype)


def kl_grad(
    student_Cv: Tensor, other_Cv: Tensor, lse_C: Tensor, mean_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return p (x - mean) in `dtype`, p = exp(student - lse), x = student - other.

    With the mean of x under p this is the derivative of KL(student||other) by the student's logits.
    `other_Cv` may be overwritten.
    """
    if fused(student_Cv, (torch.float32,)):
        return torch.ops.opd_titan.kl_grad(student_Cv, other_Cv, lse_C, mean_C, dtype)
    return head_plain.kl_grad(student_Cv, other_Cv, lse_C, mean_C, dtype)


def add_product_(total_MN: Tensor, left_MC: Tensor, right_CN: Tensor) -> None:
    """Add a product to an fp32 matrix. It is accumulated in fp32 for all types of operands."""
    if left_MC.dtype == torch.float32:
        total_MN.addmm_(left_MC, right_CN)
    elif device_of(left_MC).type == "cuda":
        torch.ops.opd_titan.add_product_(total_MN, left_MC, right_CN)
    else:
        total_MN.add_(torch.mm(left_MC, right_CN))
