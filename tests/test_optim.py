"""The optimizer and the learning rate."""

from __future__ import annotations

import pytest
import torch
from tiny_student import tiny_qwen3
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from opd_titan.config import JobConfig
from opd_titan.distill.optim import build_optimizer, learning_rate, set_learning_rate


def job(lr: float = 1.0, warmup: int = 0, decay: str = "constant", floor: float = 0.0) -> JobConfig:
    config = JobConfig()
    config.optimizer.lr = lr
    config.lr_scheduler.warmup_steps = warmup
    config.lr_scheduler.decay = decay
    config.lr_scheduler.min_lr_factor = floor
    return config


def table(config: JobConfig, steps: int) -> list[float]:
    return [
        learning_rate(step, steps, config.optimizer.lr, config.lr_scheduler)
        for step in range(1, steps + 1)
    ]


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (job(4.0, 2, "linear"), 6, [2.0, 4.0, 4.0, 3.0, 2.0, 1.0]),
        (job(2.0, 1, "cosine", 0.2), 4, [2.0, 2.0, 1.6, 0.8]),
        (job(1.0, 0, "cosine"), 1, [1.0]),
        (job(1.0, 5, "constant"), 3, [0.2, 0.4, 0.6]),
    ],
)
def test_warmup_and_decay_together(config: JobConfig, steps: int, expected: list[float]) -> None:
    assert table(config, steps) == pytest.approx(expected, rel=1e-12)


def rates_of(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_learning_rates_equal_torchs_schedulers(floor: float) -> None:
    lr, steps = 0.5, 20
    cosine = CosineAnnealingLR(sgd(lr), T_max=steps, eta_min=floor * lr)
    assert table(job(lr, 0, "cosine", floor), steps) == pytest.approx(rates_of(cosine, steps))
    linear = LinearLR(sgd(lr), 1.0, floor, total_iters=steps)
    assert table(job(lr, 0, "linear", floor), steps) == pytest.approx(rates_of(linear, steps))
    warm = LinearLR(sgd(lr), 1 / 8, 1.0, total_iters=7)
    assert table(job(lr, 8), steps) == pytest.approx(rates_of(warm, steps))


# -------------------------------------------------------------------- optimizer


def test_weight_decay_spares_the_norms_and_nothing_else() -> None:
    model = tiny_qwen3(tied=True)
    config = job(lr=0.1)
    config.optimizer.weight_decay = 0.5
    optimizer = build_optimizer(model, config.optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    norms = 0
    for name, p in model.named_parameters():
        norms += "norm" in name
        factor = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        assert torch.allclose(p, before[name] * factor, rtol=1e-6), name
    assert norms == 2 * 4 + 1
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(before) == len(set(map(id, held)))


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_follows_the_config(fused: bool) -> None:
    config = job()
    o = config.optimizer
    o.beta1, o.beta2, o.eps, o.weight_decay, o.fused = 0.7, 0.9, 1e-3, 0.2, fused
    model = nn.Linear(3, 4, bias=False)
    twin = nn.Parameter(model.weight.detach().double())
    optimizer = build_optimizer(model, config.optimizer)
    torchs = torch.optim.AdamW([twin], betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2)
    for rate in (0.1, 0.05, 0.2):
        model.weight.grad = torch.randn(4, 3)
        twin.grad = model.weight.grad.double()
        for each in (optimizer, torchs):
            set_learning_rate(each, rate)
            each.step()
        assert torch.allclose(model.weight.double(), twin, atol=1e-6)
