"""Our operators over the logits of a vocabulary beside their plain twins.

Their operands are fp32, so an error is against the twin in fp64.

Shapes: N rows of a decoding step, C rows of a chunk of the training head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_kernels import HALF, Check, Make, launcher, sizes_of
from gpu_setting import Setting
from torch import Tensor

from opd_titan.models.kernels import head_plain, plain
from opd_titan.models.logits import truncate_


def _logits(s: Setting, dtype: torch.dtype) -> Tensor:
    """As many as a decoding step of 256 sequences has, some of them -inf."""
    rows = 5 if s.miniature else 256
    logits_NV = 4.0 * torch.randn(rows, sizes_of(s).vocab, device=s.device, dtype=dtype)
    logits_NV[1, : logits_NV.shape[1] // 2] = -torch.inf
    return logits_NV


def _block_stats(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, logits_NV = launcher(s, "logits", "block_stats"), _logits(s, dtype)

    def finite(stats: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        sums_NB, maxima_NB = stats  # 0 and -inf for blocks of nothing but -inf
        return sums_NB, maxima_NB.clamp(min=-1e3)

    return [
        Check(
            _shape(logits_NV),
            lambda: finite(run(logits_NV, 0.7)),
            lambda: finite(plain.block_stats(logits_NV, 0.7)),
            lambda: finite(plain.block_stats(logits_NV.double(), 0.7)),
            logits_NV.nbytes,
            lambda: run(logits_NV, 0.7),
        )
    ]


@torch.no_grad()  # as where fused operators are taken
def check_truncation(s: Setting) -> None:
    """Compare the tokens that top-k and top-p keep on the device with fp64 on a CPU."""
    logits_NV = _logits(s, torch.float32)
    ties_NV = logits_NV.mul(8).round().div(8)  # ties fall to the lower token id
    for top_k, top_p in ((50, 1.0), (0, 0.9), (50, 0.9)):
        # fp64, because fp32 sums over 152k probabilities can drop a tied token at the threshold.
        wanted_NV = truncate_(ties_NV[:32].cpu().double(), top_k, top_p).float()
        found_NV = truncate_(ties_NV.clone(), top_k, top_p)[:32].cpu()
        same = (found_NV == wanted_NV).all(dim=1).double().mean().item()
        seconds = s.seconds(lambda k=top_k, p=top_p: truncate_(ties_NV.clone(), k, p))
        figures = {"top_k": top_k, "top_p": top_p, "rows_equal": same}
        figures["ms"] = 1e3 * seconds["median_s"]
        s.emit({"figure": "truncation", **figures, "ok": same >= 0.95})


def check_draw(s: Setting) -> None:
    """Compare tokens drawn by the kernels with those of the plain twin."""
    logits_NV = _logits(s, torch.float32)
    u_N = torch.rand(logits_NV.shape[0], dtype=torch.float64, device=s.device)
    ours = [launcher(s, "logits", name) for name in ("block_totals", "invert_blocks")]
    blocks = plain.block_stats(logits_NV, 0.7)

    def draw(totals: Callable[..., Any], invert: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        highest_N, total_N = totals(*blocks)
        tokens_N, logs_N = invert(logits_NV, *blocks, highest_N, u_N * total_N, 0.7)
        return tokens_N, logs_N - total_N.log()

    tokens_N, logs_N = draw(*ours)
    wanted_N, _ = draw(plain.block_totals, plain.invert_blocks)
    exact_NV = (logits_NV.double() / 0.7).log_softmax(1)
    error_N = (logs_N - exact_NV.gather(1, tokens_N[:, None]).squeeze(1)).abs()
    same, error = (tokens_N == wanted_N).double().mean().item(), error_N.max().item()
    figures = {"tokens_equal": same, "logprob_error_max": error}
    figures["ms"] = 1e3 * s.device_seconds(lambda: draw(*ours))
    # A target near a boundary may give the next token, because sums are ordered differently.
    s.emit({"figure": "draw", **figures, "ok": same >= 0.98 and error < 1e-4})


def _chunk(s: Setting, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the student and of a teacher, rows of the targets, and a gradient."""
    rows, vocab = (5, 1000) if s.miniature else (880, 151936)
    student_CV, teacher_CV = (
        4.0 * torch.randn(rows, vocab, device=s.device, dtype=dtype) for _ in range(2)
    )
    student_CV[1, : vocab // 2] = -torch.inf
    row_C = vocab - 1 - torch.arange(rows, device=s.device)
    return student_CV, teacher_CV, row_C, torch.randn(rows, device=s.device, dtype=dtype)


def _logit_stats(s: Setting, dtype: torch.dtype) -> list[Check]:
    run = launcher(s, "head_logits", "logit_stats")
    logits_CV, _, row_C, _ = _chunk(s, dtype)
    return [
        Check(
            _shape(logits_CV),
            lambda: run(logits_CV, row_C, True).unbind(),
            lambda: head_plain.logit_stats(logits_CV, row_C, True).unbind(),
            lambda: head_plain.logit_stats(logits_CV.double(), row_C, True).unbind(),
            logits_CV.nbytes,
        )
    ]


def _softmax_grad(s: Setting, dtype: torch.dtype) -> list[Check]:
    run = launcher(s, "head_logits", "softmax_grad")
    logits_CV, _, row_C, g_C = _chunk(s, dtype)
    lse_C, half = logits_CV.logsumexp(dim=1), HALF[not s.on_cuda]

    def twin(logits_CV: Tensor, to: torch.dtype) -> Tensor:  # it uses the logits up
        others = lse_C.to(logits_CV.dtype), g_C.to(logits_CV.dtype), row_C
        return head_plain.softmax_grad(logits_CV, *others, to)

    return [
        Check(
            _shape(logits_CV),
            lambda: run(logits_CV, lse_C, g_C, row_C, half),
            lambda: twin(logits_CV.clone(), half),
            lambda: twin(logits_CV.double(), torch.float64),
            logits_CV.nbytes * 3 // 2,
        )
    ]


def _kl_stats(s: Setting, dtype: torch.dtype) -> list[Check]:
    run = launcher(s, "head_logits", "kl_stats")
    student_CV, teacher_CV, row_C, _ = _chunk(s, dtype)
    return [
        Check(
            _shape(student_CV),
            lambda: run(student_CV, teacher_CV, row_C).unbind(),
            lambda: head_plain.kl_stats(student_CV, teacher_CV, row_C).unbind(),
            lambda: head_plain.kl_stats(student_CV.double(), teacher_CV.double(), row_C).unbind(),
            2 * student_CV.nbytes,
        )
    ]


def _kl_grad(s: Setting, dtype: torch.dtype) -> list[Check]:
    run = launcher(s, "head_logits", "kl_grad")
    student_CV, teacher_CV, row_C, _ = _chunk(s, dtype)
    found_6C, half = head_plain.kl_stats(student_CV, teacher_CV, row_C), HALF[not s.on_cuda]
    numbers = found_6C[1].contiguous(), found_6C[5].contiguous()

    def twin(student_CV: Tensor, teacher_CV: Tensor, to: torch.dtype) -> Tensor:
        others = (x_C.to(student_CV.dtype) for x_C in numbers)
        return head_plain.kl_grad(student_CV, teacher_CV, *others, to)

    return [
        Check(
            _shape(student_CV),
            lambda: run(student_CV, teacher_CV, *numbers, half),
            lambda: twin(student_CV.clone(), teacher_CV.clone(), half),
            lambda: twin(student_CV.double(), teacher_CV.double(), torch.float64),
            student_CV.nbytes * 5 // 2,
        )
    ]


def _shape(logits: Tensor) -> str:
    return f"{logits.shape[0]} x {logits.shape[1]}"


LOGITS: dict[str, Make] = {
    "block_stats": _block_stats,
    "logit_stats": _logit_stats,
    "softmax_grad": _softmax_grad,
    "kl_stats": _kl_stats,
    "kl_grad": _kl_grad,
}
