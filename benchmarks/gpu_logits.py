"""Our operators over the logits of a vocabulary beside their plain twins.

Their operands are fp32, so an error is against the twin in fp64.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from gpu_kernels import Check, Make, launcher, sizes_of
from gpu_setting import Setting
from torch import Tensor

from opd_titan.models.kernels import plain
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
            f"{logits_NV.shape[0]} x {logits_NV.shape[1]}",
            lambda: finite(run(logits_NV, 0.7)),
            lambda: finite(plain.block_stats(logits_NV, 0.7)),
            lambda: finite(plain.block_stats(logits_NV.double(), 0.7)),
            logits_NV.nbytes,
            lambda: run(logits_NV, 0.7),
        )
    ]


@torch.no_grad()  # as where fused operators are taken
def check_truncation(s: Setting) -> None:
    """Which tokens top-k and top-p keep, on the device and on a CPU."""
    logits_NV = _logits(s, torch.float32)
    ties_NV = logits_NV.mul(8).round().div(8)  # ties fall to the lower token id
    for top_k, top_p in ((50, 1.0), (0, 0.9), (50, 0.9)):
        wanted_NV = truncate_(ties_NV[:32].cpu().clone(), top_k, top_p)
        found_NV = truncate_(ties_NV.clone(), top_k, top_p)[:32].cpu()
        same = (found_NV == wanted_NV).all(dim=1).double().mean().item()
        seconds = s.seconds(lambda k=top_k, p=top_p: truncate_(ties_NV.clone(), k, p))
        figures = {"top_k": top_k, "top_p": top_p, "rows_equal": same}
        figures["ms"] = 1e3 * seconds["median_s"]
        # At the nucleus' edge sums of probabilities in another order may decide otherwise.
        s.emit({"figure": "truncation", **figures, "ok": same >= 0.95})


LOGITS: dict[str, Make] = {"block_stats": _block_stats}
