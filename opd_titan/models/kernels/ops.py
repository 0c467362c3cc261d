"""The fused kernels as PyTorch operators: schemas, and shapes for tensors without data.

Nothing here needs Triton, so that a plan for GPUs knows the operators where it is absent. The
modules that hold the kernels add the implementation for CUDA tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("opd_titan", "FRAGMENT")
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define the operator `opd_titan::<schema>`.

    Args:
        fake: returns tensors of the right shapes and types from tensors without data.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"opd_titan::{name}", fake, lib=_LIBRARY)


def implement(name: str) -> Callable[[_Launcher], _Launcher]:
    """Register the decorated function as what an operator does to CUDA tensors.

    `torch.library.custom_op` would do the same at several times the overhead of a call.
    """

    def register(launcher: _Launcher) -> _Launcher:
        _LIBRARY.impl(name, launcher, "CUDA")
        return launcher

    return register


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
    """Return whether `addmm` adds a half-precision product to an fp32 matrix where that lies.

    It is tried, for versions with the same schema differ: earlier ones refuse an fp32 matrix
    (pytorch issue 154086, pull request 167931).
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
