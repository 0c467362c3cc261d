"""The fused kernels as PyTorch operators: schemas, and shapes for tensors without data.

Nothing here needs Triton, so that a plan for GPUs knows the operators where it is absent. The
modules that hold the kernels add the implementation for CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_titan.models.kernels.plain import LOGITS_BLOCK

_LIBRARY = torch.library.Library("opd_titan", "FRAGMENT")
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def define(schema: str, empty: Callable[..., Any]) -> None:
    """Define the operator `opd_titan::<schema>`.

    Args:
        empty: returns tensors of the results' shapes and types.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"opd_titan::{name}", empty, lib=_LIBRARY)


def implement(name: str) -> Callable[[_Launcher], _Launcher]:
    """Register the decorated function as what an operator does to CUDA tensors.

    `torch.library.custom_op` would do the same at several times the overhead of a call.
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


def empty_block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    shape = (logits_NV.shape[0], -(-logits_NV.shape[1] // LOGITS_BLOCK))
    return logits_NV.new_empty(shape), logits_NV.new_empty(shape)


def empty_threshold(logits_NV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n = logits_NV.shape[0]
    return logits_NV.new_empty(n), logits_NV.new_empty(n, dtype=torch.int64)


define("silu_mul(Tensor gate, Tensor up) -> Tensor", empty)
define("add_norm(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)", two_empty)
define(
    "norm_rope(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, float eps,"
    " Tensor cos, Tensor sin, Tensor(a!)? keys, Tensor(b!)? values, Tensor? page, Tensor? offset)"
    " -> (Tensor, Tensor)",
    two_empty,
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
    "truncation_threshold(Tensor logits, int top_k, float top_p) -> (Tensor, Tensor)",
    empty_threshold,
)
