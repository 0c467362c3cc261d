"""Small collectives along an axis of the mesh; `max_scalar` is over all ranks.

With one rank, each returns its argument.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opd_titan.distributed.world import Axis

T = TypeVar("T")


def gather_lists(items: list[T], axis: Axis) -> list[T]:
    """Return every rank's list, concatenated in rank order. The items are pickled."""
    if axis.size == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(axis.size)]
    dist.all_gather_object(parts, items, group=axis.group)
    return list(chain.from_iterable(parts))


def sum_scalars(values: dict[str, float], device: torch.device, axis: Axis) -> dict[str, float]:
    """Return the sum of each value over ranks, in float64. All ranks must pass the same keys."""
    if not values or axis.size == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[n] for n in names], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=axis.group)
    return dict(zip(names, total.tolist(), strict=True))


def max_scalar(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks; infinity if one is NaN, which a reduction may lose."""
    value = math.inf if math.isnan(value) else value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def min_integer(value: int, device: torch.device, axis: Axis) -> int:
    """Return the smallest value of the ranks."""
    if axis.size == 1:
        return value
    smallest = torch.tensor(value, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=axis.group)
    return int(smallest)


def broadcast_tokens(tokens_N: Tensor, logprobs_N: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the first rank's tokens (int64) and their log-probs (fp32), in one collective."""
    if axis.size == 1:
        return tokens_N, logprobs_N
    both_2N = torch.stack((tokens_N, logprobs_N.double().view(torch.int64)))
    dist.broadcast(both_2N, group=axis.group, group_src=0)
    return both_2N[0], both_2N[1].view(torch.float64).float()


def gather_vector(values_N: Tensor, axis: Axis) -> Tensor:
    """Return every rank's 1-D tensor, of any length, concatenated in rank order."""
    if axis.size == 1:
        return values_N
    size = torch.tensor([values_N.numel()], device=values_N.device)
    sizes = [torch.empty_like(size) for _ in range(axis.size)]
    dist.all_gather(sizes, size, group=axis.group)
    lengths = [int(s) for s in sizes]
    padded = values_N.new_zeros(max(lengths))
    padded[: values_N.numel()] = values_N
    parts = [torch.empty_like(padded) for _ in range(axis.size)]
    dist.all_gather(parts, padded, group=axis.group)
    return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])
