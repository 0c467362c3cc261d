"""What tensor parallelism sends between ranks, with gradients (Megatron-LM, arXiv 1909.08053).

Each rank multiplies by its share of a layer's weights. Between layers the hidden states are either
split over the ranks by token (sequence parallelism, arXiv 2205.05198: training and scoring) or
whole on every rank (rollouts, where a step has few tokens).

Shapes: T packed tokens, of which each rank holds T / size in turn; D model width.
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
    """The plain tensor that this rank computes with: its share of a parameter, or all of it.

    A parameter that every rank holds whole (a norm's weight) is applied to other tokens or heads
    on each, so that its gradient is the sum over ranks; of a share, each rank has the gradient.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    placed = [Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    return parameter.to_local(grad_placements=placed)


def all_gather(x_TD: Tensor, axis: Axis) -> Tensor:
    """Every rank's tensor, concatenated along the first dimension. Without gradients."""
    out_TD = x_TD.new_empty(x_TD.shape[0] * axis.size, *x_TD.shape[1:])
    _all_gather_single(out_TD, x_TD.contiguous(), group=axis.group)
    return out_TD


def _reduce_scatter(x_TD: Tensor, axis: Axis) -> Tensor:
    out_TD = x_TD.new_empty(x_TD.shape[0] // axis.size, *x_TD.shape[1:])
    _reduce_scatter_single(out_TD, x_TD.contiguous(), group=axis.group)
    return out_TD


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x_TD, axis)

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
        return all_gather(grad_TD, ctx.axis), None


def gather_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """All tokens [T, D] from each rank's share; every rank's gradient of them is added up."""
    return _GatherTokens.apply(x_TD, axis)


def scatter_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens of the sum of all ranks' [T, D]; T must be a multiple of the ranks."""
    return _ScatterTokens.apply(x_TD, axis)


def sum_ranks(x_TD: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' [T, D] on every rank, in place. Without gradients, for rollouts."""
    dist.all_reduce(x_TD, group=axis.group)
    return x_TD
