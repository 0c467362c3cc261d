"""The plain PyTorch twins of the training head's kernels; see the package for what they return.

Each function processes a few rows at a time, which stay in a CPU's cache during its passes.

Shapes: C rows, v columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one tensor of a block. On a GPU this only limits the memory of intermediate results.
_BLOCK_BYTES = {"cpu": 1024**2, "cuda": 64 * 1024**2}


def row_blocks(logits_Cv: Tensor) -> Iterator[slice]:
    """Return slices of rows. Several tensors of one slice fit into a CPU's cache."""
    C, v = logits_Cv.shape
    rows = max(1, _BLOCK_BYTES[logits_Cv.device.type] // (4 * v))
    return (slice(i, i + rows) for i in range(0, C, rows))


def _logit_at(logits_Cv: Tensor, column_C: Tensor) -> Tensor:
    logit_C1 = logits_Cv.gather(1, column_C.clamp(min=0)[:, None])
    return logit_C1.squeeze(1).masked_fill(column_C < 0, -torch.inf)


def logit_stats(logits_Cv: Tensor, column_C: Tensor, mean: bool) -> Tensor:
    target_C = _logit_at(logits_Cv, column_C)
    if mean:
        parts = [_softmax_stats(logits_Cv[block]) for block in row_blocks(logits_Cv)]
        return torch.cat((target_C[None], torch.cat(parts, dim=1)))
    lses = [logits_Cv[block].logsumexp(dim=1) for block in row_blocks(logits_Cv)]
    return torch.stack((target_C, torch.cat(lses)))


def kl_stats(student_Cv: Tensor, other_Cv: Tensor, column_C: Tensor) -> Tensor:
    parts = []
    for block in row_blocks(student_Cv):
        other_Bv = other_Cv[block]
        lse_B, mean_B, difference_B = _softmax_stats(student_Cv[block], other_Bv)
        parts.append(torch.stack((lse_B, mean_B, other_Bv.logsumexp(dim=1), difference_B)))
    found_4C = torch.cat(parts, dim=1)
    student_C, other_C = (_logit_at(x_Cv, column_C) for x_Cv in (student_Cv, other_Cv))
    return torch.stack((student_C, *found_4C[:2], other_C, *found_4C[2:]))


def _softmax_stats(x_Bv: Tensor, other_Bv: Tensor | None = None) -> Tensor:
    """Return [2 or 3, B]: logsumexp, mean of x under its softmax, and mean of x - other."""
    top_B1 = x_Bv.amax(dim=1, keepdim=True)
    top_B1.masked_fill_(top_B1 == -torch.inf, 0.0)
    # 0 * -inf would be NaN below. The exp of -1e4 is 0 in fp32, too.
    x_Bv = (x_Bv - top_B1).clamp_(min=-1e4)
    weight_Bv = x_Bv.exp()
    total_B1 = weight_Bv.sum(dim=1, keepdim=True)
    lse_B1 = top_B1 + total_B1.log()
    total_B1.clamp_(min=1.0)  # it is below 1 only if all logits are -inf
    means = [(weight_Bv * x_Bv).sum(dim=1, keepdim=True)]
    if other_Bv is not None:
        means.append(x_Bv.sub_(other_Bv).mul_(weight_Bv).sum(dim=1, keepdim=True))
    return torch.cat((lse_B1, *(mean_B1 / total_B1 + top_B1 for mean_B1 in means)), dim=1).t()


def softmax_grad(
    logits_Cv: Tensor, lse_C: Tensor, g_C: Tensor, column_C: Tensor, dtype: torch.dtype
) -> Tensor:
    lse_C1, g_C1 = lse_C[:, None], g_C[:, None]
    for block in row_blocks(logits_Cv):
        logits_Cv[block].sub_(lse_C1[block]).exp_().mul_(-g_C1[block])
    target_g_C1 = g_C1.masked_fill((column_C < 0)[:, None], 0.0)
    return logits_Cv.scatter_add_(1, column_C.clamp(min=0)[:, None], target_g_C1).to(dtype)


def kl_grad(
    student_Cv: Tensor, other_Cv: Tensor, lse_C: Tensor, mean_C: Tensor, dtype: torch.dtype
) -> Tensor:
    lse_C1, mean_C1 = lse_C[:, None], mean_C[:, None]
    for block in row_blocks(student_Cv):
        student_Bv, other_Bv = student_Cv[block], other_Cv[block]
        # Clamp to a finite value where the student's logit is -inf, because 0 * -inf is NaN.
        torch.sub(student_Bv, other_Bv, out=other_Bv).sub_(mean_C1[block]).clamp_(min=-1e30)
        other_Bv.mul_((student_Bv - lse_C1[block]).exp_())
    return other_Cv.to(dtype)
