"""AdamW, and a learning rate that depends on the step alone: checkpoints need not store it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from opd_titan.config.job_config import LRScheduler, Optimizer
from opd_titan.distributed.heartbeat import track_memory
from opd_titan.distributed.sharding import device_bytes, gradient_bytes
from opd_titan.distributed.tensor_parallel import local


class AdamW(torch.optim.AdamW):
    """AdamW that updates each rank's local shards.

    The update is elementwise, so shards need no communication. The optimizer state stays keyed by
    parameter and consists of DTensors, so that checkpoints can be resharded. Dispatching the
    update's operators on DTensors took the host 51 ms per step of a 1.7B model, while the GPU
    worked for 20 ms (benchmarks/README.md).
    """

    # A private method of torch's: it collects the tensors that one step updates.
    def _init_group(self, group: Any, params: list[Tensor], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, params, *lists)
        for tensors in (params, *lists):
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex


def build_optimizer(model: nn.Module, c: Optimizer) -> torch.optim.Optimizer:
    """Return AdamW over all parameters, without weight decay for norm weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=c.fused)
    track_memory("gradients", model, gradient_bytes)
    track_memory("optimizer state", optimizer, _state_bytes)
    return optimizer


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return device_bytes(x for state in optimizer.state.values() for x in state.values())


def learning_rate(step: int, total_steps: int, peak: float, schedule: LRScheduler) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, then decay.

    The decay would reach its end one step after the last, so that no step has a rate of 0.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    span = max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - 1 - schedule.warmup_steps) / span)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule.decay]
    floor = schedule.min_lr_factor
    return peak * (floor + (1.0 - floor) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
