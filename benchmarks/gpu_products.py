"""Products, passes over logits and packed attention: what the update is made of, piece by piece.

Shapes: T packed tokens, C rows of a chunk of logits, D model width, V vocabulary, H query heads, G
key/value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_setting import Setting, relative_error
from torch import Tensor

from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import project

HALF = torch.bfloat16


def measure_products(s: Setting) -> None:
    """The head's products in fp32 from half-precision operands, with a place for the result."""
    rows, width, vocab = (16, 64, 512) if s.miniature else (880, 2048, 151936)
    hidden_CD = torch.randn(rows, width, device=s.device).to(HALF)
    weight_VD = (torch.randn(vocab, width, device=s.device) * 0.02).to(HALF)
    if s.on_cuda:
        _projection(s, hidden_CD, weight_VD)
        _weight_gradient(s, hidden_CD, vocab)
    seconds = s.device_seconds(lambda: project(hidden_CD, weight_VD))
    s.emit(
        {"figure": "projection", "rows": rows, **s.rates(seconds, 2.0 * hidden_CD.numel() * vocab)}
    )
    _passes(s, torch.randn(rows, vocab, device=s.device))


def _projection(s: Setting, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    def fp32(out: Tensor | None = None) -> Tensor:
        return torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32, out=out)

    buffer = torch.empty(hidden_CD.shape[0], weight_VD.shape[0], device=s.device)
    exact = hidden_CD[:64].double() @ weight_VD.double().t()
    plain = fp32()
    figures = {
        "relative_error": relative_error(plain[:64], exact),
        "out_equal": torch.equal(plain, fp32(buffer)),
        "ms": 1e3 * s.device_seconds(fp32),
        "ms_out": 1e3 * s.device_seconds(lambda: fp32(buffer)),
        "ms_bf16": 1e3 * s.device_seconds(lambda: hidden_CD @ weight_VD.t()),
    }
    good = figures["out_equal"] and figures["relative_error"] < 3e-5
    s.emit({"figure": "fp32 product, out=", **figures, "ok": good})


def _weight_gradient(s: Setting, hidden_CD: Tensor, vocab: int) -> None:
    """fp32 sums over chunks: by a product and an addition, and by one product in place."""
    grad_CV = (torch.randn(hidden_CD.shape[0], vocab, device=s.device) * 0.01).to(HALF)
    sum_VD = torch.randn(vocab, hidden_CD.shape[1], device=s.device)

    def two(acc: Tensor) -> None:
        acc.add_(torch.mm(grad_CV.t(), hidden_CD, out_dtype=torch.float32))

    def one(acc: Tensor) -> None:
        torch.addmm(acc, grad_CV.t(), hidden_CD, out_dtype=torch.float32, out=acc)

    first, second = sum_VD.clone(), sum_VD.clone()
    two(first)
    figures = {
        "figure": "weight gradient in place",
        "ms_two": 1e3 * s.device_seconds(lambda: two(sum_VD)),
    }
    try:
        one(second)
    except Exception as error:
        s.emit({**figures, "available": False, "why": str(error)[:300]})
        return
    wrong = relative_error(second, first)
    figures |= {"ms_one": 1e3 * s.device_seconds(lambda: one(sum_VD)), "relative_error": wrong}
    s.emit({**figures, "available": True, "ok": wrong < 1e-6})


def _passes(s: Setting, logits_CV: Tensor) -> None:
    """Plain passes over a chunk of fp32 logits."""
    probs_CV, gb = torch.empty_like(logits_CV), logits_CV.nbytes / 1e9
    passes: dict[str, Callable[[], Any]] = {
        "logsumexp": lambda: logits_CV.logsumexp(dim=1),
        "sub_": lambda: logits_CV.sub_(0.1),
        "exp": lambda: torch.exp(logits_CV, out=probs_CV),
        "entropy_bmm": lambda: torch.bmm(probs_CV[:, None], logits_CV[:, :, None]),
        "mul_": lambda: probs_CV.mul_(0.999),
        "to_bf16": lambda: probs_CV.to(HALF),
    }
    found = {name: 1e3 * s.device_seconds(work) for name, work in passes.items()}
    s.emit({"figure": "passes over logits, ms", "gb": gb, **found})


def measure_grouped_heads(s: Setting) -> None:
    """Packed attention with as many key/value heads as there are, against repeated ones."""
    for heads, groups in ((4, 2),) if s.miniature else ((16, 8), (32, 8)):
        _grouped_heads(s, heads, groups)


def _grouped_heads(s: Setting, heads: int, groups: int) -> None:
    length, count, size = (20, 2, 32) if s.miniature else (1024, 8, 128)
    repeats = heads // groups
    leaves = [
        torch.randn(count * length, n, size, device=s.device, dtype=HALF).requires_grad_()
        for n in (heads, groups, groups)
    ]
    grad_THK = torch.randn_like(leaves[0])
    attend = PackedAttention([length] * count, s.device)

    def grouped() -> Tensor:
        return attend(*leaves, 0)

    def repeated() -> Tensor:
        q_THK, *kv = leaves
        return attend(q_THK, *(x.repeat_interleave(repeats, dim=1) for x in kv), 0)

    def both(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, leaves, grad_THK)

    figures: dict[str, Any] = {"heads": f"{heads} of {groups}"}
    for forward in (grouped, repeated):
        name = forward.__name__
        figures[f"ms_forward_{name}"] = 1e3 * s.seconds(forward)["median_s"]
        figures[f"ms_both_{name}"] = 1e3 * s.seconds(partial(both, forward))["median_s"]
    wrong = max(map(relative_error, both(grouped), both(repeated)))
    # Gradients of repeated heads are added up in bf16.
    s.emit({"figure": "grouped heads", **figures, "relative_error": wrong, "ok": wrong < 0.02})
