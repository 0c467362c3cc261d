"""The fused kernels as PyTorch operators: schemas, and shapes for tensors without data.

This module does not need Triton, so that the planner can use the operators without it. The modules
with the kernels register the CUDA implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_titan.models.kernels.plain import LOGITS_BLOCK

_LIBRARY = torch.library.Library("opd_titan", "FRAGMENT")
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define the operator `opd_titan::<schema>`.

    Args:
        fake: called with the operator's arguments; returns empty tensors with the shapes and dtypes
            of the results.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"opd_titan::{name}", fake, lib=_LIBRARY)


def implement(name: str) -> Callable[[_Launcher], _Launcher]:
    """Register the decorated function as the CUDA implementation of an operator.

    `torch.library.custom_op` is not used because its overhead per call is several times higher.
    """

    def register(launcher: _Launcher) -> _Launcher:
        _LIBRARY.impl(name, launcher, "CUDA")
        return launcher

    return register


def empty(x: Tensor, *_: Any) -> Tensor:
    """Return a contiguous tensor of x's shape; `empty_like` would keep its strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def two_empty(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(x), empty(y)


def check_logits(*logits: Tensor) -> torch.Size:
    """Check that logits are fp32, with contiguous columns and one shape; return the shape."""
    for x in logits:
        assert x.dtype == torch.float32 and x.stride(1) == 1 and x.shape == logits[0].shape
    return logits[0].shape


def empty_block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    shape = (logits_NV.shape[0], -(-logits_NV.shape[1] // LOGITS_BLOCK))
    return logits_NV.new_empty(shape), logits_NV.new_empty(shape)


def two_of_rows(x: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two vectors with an element for each row of x."""
    first, second = (x.new_empty(x.shape[0], dtype=dtype) for dtype in dtypes)
    return first, second


define("silu_mul(Tensor gate, Tensor up) -> Tensor", empty)
define(
    "silu_mul_backward(Tensor gate, Tensor up, Tensor g) -> (Tensor, Tensor)",
    two_empty,
)
define("norm(Tensor x, Tensor weight, float eps) -> Tensor", empty)
define(
    "norm_backward(Tensor x, Tensor weight, float eps, Tensor g, Tensor? g_x) -> (Tensor, Tensor)",
    two_empty,
)
define("add_norm(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)", two_empty)
define(
    "norm_rope(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, float eps,"
    " Tensor cos, Tensor sin, Tensor(a!)? keys, Tensor(b!)? values, Tensor? page, Tensor? offset)"
    " -> (Tensor, Tensor)",
    two_empty,
)
define(
    "norm_rope_backward(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps,"
    " Tensor cos, Tensor sin, Tensor q_g, Tensor k_g) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda q, k, q_weight, k_weight, *_: tuple(map(empty, (q, k, q_weight, k_weight))),
)
define(
    "paged_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor used) -> Tensor", empty
)
define(
    "paged_prefill(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor used, Tensor starts,"
    " int max_queries) -> Tensor",
    empty,
)
define("block_stats(Tensor logits, float temperature) -> (Tensor, Tensor)", empty_block_stats)
define(
    "block_totals(Tensor sums, Tensor maxima) -> (Tensor, Tensor)",
    lambda sums, maxima: two_of_rows(sums, torch.float32, torch.float64),
)
define(
    "invert_blocks(Tensor logits, Tensor sums, Tensor maxima, Tensor highest, Tensor target,"
    " float temperature) -> (Tensor, Tensor)",
    lambda logits, *_: two_of_rows(logits, torch.int64, torch.float64),
)
define(
    "uniforms(Tensor keys, Tensor positions) -> Tensor",
    lambda keys, positions: keys.new_empty(keys.shape, dtype=torch.float64),
)
define(
    "truncation_threshold(Tensor logits, int top_k, float top_p) -> (Tensor, Tensor)",
    lambda logits, *_: two_of_rows(logits, torch.float32, torch.int64),
)
define(
    "logit_stats(Tensor logits, Tensor rows, bool mean) -> Tensor",
    lambda logits, rows, mean: logits.new_empty(2 + mean, logits.shape[0]),
)
define(
    "kl_stats(Tensor student, Tensor other, Tensor rows) -> Tensor",
    lambda student, other, rows: student.new_empty(6, student.shape[0]),
)
define(
    "softmax_grad(Tensor logits, Tensor lse, Tensor g, Tensor rows, ScalarType dtype) -> Tensor",
    lambda logits, lse, g, rows, dtype: logits.new_empty(logits.shape, dtype=dtype),
)
define(
    "kl_grad(Tensor student, Tensor other, Tensor lse, Tensor mean, ScalarType dtype) -> Tensor",
    lambda student, other, lse, mean, dtype: student.new_empty(student.shape, dtype=dtype),
)
define(
    "add_product_(Tensor(a!) total, Tensor left, Tensor right) -> ()",
    lambda total, left, right: None,
)


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `addmm` can add a half-precision product to an fp32 matrix in place.

    This is tested by a call because older versions have the same schema but reject an fp32 matrix
    (PyTorch issue 154086, pull request 167931).
    """
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17.0).all())


@implement("add_product_")
def add_product_(total_MN: Tensor, left_MC: Tensor, right_CN: Tensor) -> None:
    if _adds_in_place(total_MN.device, left_MC.dtype):
        torch.addmm(total_MN, left_MC, right_CN, out_dtype=torch.float32, out=total_MN)
    else:
        total_MN.add_(torch.mm(left_MC, right_CN, out_dtype=torch.float32))
