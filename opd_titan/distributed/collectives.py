"""Small collectives over all ranks. Each is the identity in a world of one."""

from __future__ import annotations

import math
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """Every rank's list, concatenated in rank order, on every rank. The items are pickled."""
    if dist.get_world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return list(chain.from_iterable(parts))


def sum_scalars(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum of each value over ranks, in float64. Every rank must pass the same keys."""
    if not values or dist.get_world_size() == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[n] for n in names], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def max_scalar(value: float, device: torch.device) -> float:
    """The largest of the ranks' values; infinite if one is NaN, which a reduction may lose."""
    value = math.inf if math.isnan(value) else value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def gather_vector(values_N: Tensor) -> Tensor:
    """Every rank's 1-D tensor, of any length, concatenated in rank order, on every rank."""
    world = dist.get_world_size()
    if world == 1:
        return values_N
    size = torch.tensor([values_N.numel()], device=values_N.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    padded = values_N.new_zeros(max(lengths))
    padded[: values_N.numel()] = values_N
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])
