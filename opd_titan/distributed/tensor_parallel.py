"""The collectives of tensor parallelism, with gradients (Megatron-LM, arXiv 1909.08053).

Each rank multiplies by its share of a layer's weights. Between layers the hidden states are either
split over the ranks by token (sequence parallelism, arXiv 2205.05198, in training and scoring) or
whole on every rank (in rollouts, where a step has few tokens).

Shapes: T packed tokens, of which each rank has T / size consecutive ones if they are split; D model
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from opd_titan.distributed.world import Axis

# Renamed in torch 2.13; the old names warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local(parameter: Tensor) -> Tensor:
    """Return the plain tensor that this rank computes with: its part of a parameter, or all of it.

    Inside FSDP's forward a parameter is plain, or a DTensor over `tp` alone. If it is not split (as
    in a norm), each rank applies it to its own tokens or heads only, so its gradient is summed over
    `tp`. The gradient of a split parameter is already complete.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    placed = [Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    return parameter.to_local(grad_placements=placed)


def locate_rows(tokens_T: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return each token's row, and whether it has one, among the `rows` rows from `first` on.

    The row of other tokens is 0.
    """
    row_T = tokens_T - first
    held_T = (row_T >= 0) & (row_T < rows)
    return row_T * held_T, held_T


def concat_ranks(x_TD: Tensor, axis: Axis) -> Tensor:
    """Concatenate every rank's tensor along the first dimension. Without gradients."""
    if axis.size == 1:
        return x_TD
    out_TD = x_TD.new_empty(x_TD.shape[0] * axis.size, *x_TD.shape[1:])
    _all_gather_single(out_TD, x_TD.contiguous(), group=axis.group)
    return out_TD


def _reduce_scatter(x_TD: Tensor, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x_TD
    out_TD = x_TD.new_empty(x_TD.shape[0] // axis.size, *x_TD.shape[1:])
    _reduce_scatter_single(out_TD, x_TD.contiguous(), group=axis.group)
    return out_TD


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return concat_ranks(x_TD, axis)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad_TD, ctx.axis), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x_TD, axis)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return concat_ranks(grad_TD, ctx.axis), None


def gather_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """Gather all tokens [T, D] from the ranks' shares. The backward sums the ranks' gradients."""
    return _GatherTokens.apply(x_TD, axis)


def scatter_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """Sum all ranks' [T, D] and return this rank's share of the tokens. T must be divisible."""
    return _ScatterTokens.apply(x_TD, axis)


def sum_ranks(x_TD: Tensor, axis: Axis) -> Tensor:
    """Sum all ranks' [T, D], in place, on every rank. Without gradients."""
    if axis.size == 1:
        return x_TD
    dist.all_reduce(x_TD, group=axis.group)
    return x_TD
