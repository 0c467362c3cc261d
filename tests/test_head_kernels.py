"""The head's passes over logits in plain PyTorch against formulas in fp64.

`interpreted_layers.py` compares the Triton kernels with the same formulas.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_titan.models.kernels import head_plain, ops

C = 5
# Not a multiple of a kernel's block; more than one block; few.
WIDTHS = [13, 2048, 5000]


class Chunk:
    """Logits of two models.

    Args:
        cut: some of the student's logits are -inf, and in one row all.
    """

    def __init__(self, v: int, cut: bool) -> None:
        g = torch.Generator().manual_seed(v)
        # A view of a wider tensor, like one rank's columns.
        self.student_Cv, self.other_Cv = (4.0 * torch.randn(2, C, v + 3, generator=g) + 7.0)[
            ..., 3:
        ]
        self.row_C = torch.tensor([0, v - 1, -1, v // 2, -1])
        self.g_C = torch.randn(C, generator=g)
        if cut:
            self.student_Cv.masked_fill_(torch.rand(C, v, generator=g) < 0.7, -torch.inf)
            self.student_Cv[torch.arange(C), self.row_C.clamp(min=0)] = 3.0
            self.student_Cv[4] = -torch.inf

    def copies(self) -> tuple[Tensor, Tensor]:
        return self.student_Cv.clone(), self.other_Cv.clone()


def formulas(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return `kl_stats` in fp64, and p over this part of the vocabulary."""
    x_Cv, y_Cv = chunk.student_Cv.double(), chunk.other_Cv.double()
    p_Cv = (x_Cv - x_Cv.logsumexp(1, keepdim=True)).exp().nan_to_num(0.0)
    held = chunk.row_C >= 0
    at = chunk.row_C.clamp(min=0)[:, None]
    target_C, other_C = (
        z_Cv.gather(1, at).squeeze(1).masked_fill(~held, -torch.inf) for z_Cv in (x_Cv, y_Cv)
    )
    mean_C = (p_Cv * x_Cv.nan_to_num(neginf=0.0)).sum(1)
    difference_C = (p_Cv * (x_Cv - y_Cv).nan_to_num(neginf=0.0)).sum(1)
    lse_C, other_lse_C = x_Cv.logsumexp(1), y_Cv.logsumexp(1)
    return torch.stack((target_C, lse_C, mean_C, other_C, other_lse_C, difference_C)), p_Cv


def close(found: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), truth.double(), rtol=tolerance, atol=tolerance)


def check(kernels, chunk: Chunk, dtype: torch.dtype = torch.float32) -> None:
    """Compare an implementation with the formulas."""
    truth_6C, p_Cv = formulas(chunk)
    v = p_Cv.shape[1]
    close(kernels.logit_stats(chunk.student_Cv, chunk.row_C, False), truth_6C[:2])
    close(kernels.logit_stats(chunk.student_Cv, chunk.row_C, True), truth_6C[:3])
    close(kernels.kl_stats(*chunk.copies(), chunk.row_C), truth_6C)
    # This rank has a part of the vocabulary, and the logsumexp is over all of it.
    lse_C = truth_6C[1].logaddexp(torch.tensor(9.0))
    share_C1 = (truth_6C[1] - lse_C).exp()[:, None]
    onehot_Cv = torch.nn.functional.one_hot(chunk.row_C.clamp(min=0), v)
    onehot_Cv = onehot_Cv * (chunk.row_C >= 0)[:, None]
    g_C1 = chunk.g_C[:, None].double()
    found_Cv = kernels.softmax_grad(
        chunk.student_Cv.clone(), lse_C.float(), chunk.g_C, chunk.row_C, dtype
    )
    close(found_Cv, g_C1 * (onehot_Cv - share_C1 * p_Cv), dtype)
    x_Cv = (chunk.student_Cv - chunk.other_Cv).double().nan_to_num(neginf=0.0)
    found_Cv = kernels.kl_grad(*chunk.copies(), lse_C.float(), chunk.g_C, dtype)
    close(found_Cv, share_C1 * p_Cv * (x_Cv - g_C1), dtype)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("v", WIDTHS)
def test_plain_passes_are_the_formulas(monkeypatch: pytest.MonkeyPatch, v: int, cut: bool) -> None:
    for rows in (1, 2, 100):
        monkeypatch.setattr(head_plain, "_BLOCK_BYTES", {"cpu": rows * v * 4})
        check(head_plain, Chunk(v, cut))


def test_half_precision_derivatives_are_the_rounded_ones() -> None:
    check(head_plain, Chunk(50, False), torch.float16)


def test_a_cpu_adds_a_half_precision_product_in_two_steps() -> None:
    assert not ops._adds_in_place(torch.device("cpu"), torch.bfloat16)
