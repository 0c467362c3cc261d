"""AdamW, and the learning rate as a pure function of the step: a resume has nothing to restore."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from opd_titan.config import JobConfig
from opd_titan.distributed.lifeline import hold
from opd_titan.distributed.sharding import device_bytes, gradient_bytes
from opd_titan.distributed.tensor_parallel import local


class AdamW(torch.optim.AdamW):
    """Step on this rank's shards. The step is elementwise, and its state stays with the parameters.

    On DTensors each operator over all of them took the host longer than the device: 51 ms a step of
    a 1.7B (benchmarks/README.md), during which a GPU has nothing to do.
    """

    def _init_group(self, group: Any, params: list[Tensor], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, params, *lists)
        for tensors in (params, *lists):
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex


def build_optimizer(model: nn.Module, config: JobConfig) -> torch.optim.Optimizer:
    """AdamW over every parameter. Norm weights are not decayed."""
    c = config.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=c.fused)
    hold("gradients", model, gradient_bytes)
    hold("optimizer state", optimizer, _state_bytes)
    return optimizer


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return device_bytes(x for state in optimizer.state.values() for x in state.values())


def learning_rate(step: int, total_steps: int, config: JobConfig) -> float:
    """The rate of a step, counted from 1: linear warm-up, then decay to the last step.

    The decay counts the last step as its end plus one, so that no step runs at a rate of 0.
    """
    schedule = config.lr_scheduler
    if step <= schedule.warmup_steps:
        return config.optimizer.lr * step / schedule.warmup_steps
    span = max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - 1 - schedule.warmup_steps) / span)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule.decay]
    floor = schedule.min_lr_factor
    return config.optimizer.lr * (floor + (1.0 - floor) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
