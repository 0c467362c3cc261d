"""The optimizer and its schedule; then what ranks share: mesh, time limits, collectives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from opd_titan.config import ConfigError, JobConfig
from opd_titan.distill.optim import build_optimizer, learning_rate, set_learning_rate
from opd_titan.distributed.collectives import gather_lists, gather_vector, max_scalar, sum_scalars
from opd_titan.distributed.world import ALONE, Axis, build_world, init_world, set_timeout
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model

CPU = torch.device("cpu")


def job(lr: float = 1.0, warmup: int = 0, decay: str = "constant", floor: float = 0.0) -> JobConfig:
    config = JobConfig()
    config.optimizer.lr = lr
    config.lr_scheduler.warmup_steps = warmup
    config.lr_scheduler.decay = decay
    config.lr_scheduler.min_lr_factor = floor
    return config


def table(config: JobConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (job(2.0), 3, [2.0, 2.0, 2.0]),
        (job(1.0, warmup=4), 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (job(1.0, floor=0.5), 3, [1.0, 1.0, 1.0]),
        (job(1.0, decay="linear"), 4, [1.0, 0.75, 0.5, 0.25]),
        (job(4.0, 2, "linear"), 6, [2.0, 4.0, 4.0, 3.0, 2.0, 1.0]),
        (job(1.0, 0, "linear", 0.5), 4, [1.0, 0.875, 0.75, 0.625]),
        (job(1.0, 0, "cosine"), 3, [1.0, 0.75, 0.25]),
        (job(2.0, 1, "cosine", 0.2), 4, [2.0, 2.0, 1.6, 0.8]),
        (job(1.0, 0, "cosine"), 1, [1.0]),
        (job(1.0, 5, "constant"), 3, [0.2, 0.4, 0.6]),
    ],
)
def test_learning_rates_by_the_table(config: JobConfig, steps: int, expected: list[float]) -> None:
    assert table(config, steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 49])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_learning_rate_is_continuous_and_never_zero(decay: str, warmup: int, floor: float) -> None:
    rates = table(job(3e-4, warmup, decay, floor), 50)
    assert all(0.0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(3e-4)
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)
    # No step jumps by more than the steepest slope: the warm-up's, or the cosine's middle.
    slope = max(1 / max(warmup, 1) if warmup else 0.0, math.pi / 2 / (50 - warmup))
    assert all(abs(b - a) <= 3e-4 * slope * (1 + 1e-9) for a, b in pairwise(rates))
    assert min(rates[warmup:]) >= 3e-4 * floor * (1 - 1e-12)


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


def tiny_model(tied: bool = False) -> Qwen3Model:
    torch.manual_seed(0)
    args = Qwen3Args(
        vocab_size=31,
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        ffn_dim=24,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=tied,
        max_seq_len=64,
        init_std=0.02,
    )
    return Qwen3Model(args)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_spares_the_norms_and_nothing_else(tied: bool) -> None:
    model = tiny_model(tied)
    config = job(lr=0.1)
    config.optimizer.weight_decay = 0.5
    optimizer = build_optimizer(model, config)
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
    """Three steps of one matrix against AdamW written out (arXiv 1711.05101, algorithm 2)."""
    config = job()
    o = config.optimizer
    o.beta1, o.beta2, o.eps, o.weight_decay, o.fused = 0.7, 0.9, 1e-3, 0.2, fused
    model = nn.Linear(3, 4, bias=False)
    weight = model.weight.detach().double()
    optimizer = build_optimizer(model, config)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, rate in enumerate([0.1, 0.05, 0.2], start=1):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        mean = 0.7 * mean + 0.3 * gradient.double()
        square = 0.9 * square + 0.1 * gradient.double() ** 2
        denominator = (square / (1 - 0.9**step)).sqrt() + 1e-3
        weight = weight * (1 - rate * 0.2) - rate * (mean / (1 - 0.7**step)) / denominator
        assert torch.allclose(model.weight.double(), weight, atol=1e-6)


# ------------------------------------------------------------ mesh, collectives


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    assert init_world(60) == CPU
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_collectives_are_the_identity_in_a_world_of_one() -> None:
    assert gather_lists([1, "a"], ALONE) == [1, "a"]
    assert sum_scalars({"b": 2.5, "a": 1.0}, CPU, ALONE) == {"b": 2.5, "a": 1.0}
    assert sum_scalars({}, CPU, ALONE) == {}
    assert max_scalar(-3.5, CPU) == -3.5
    assert gather_vector(torch.arange(3.0), ALONE).tolist() == [0.0, 1.0, 2.0]
    set_timeout(30, CPU)


@pytest.mark.usefixtures("world_of_one")
def test_a_world_of_one_has_a_mesh_of_one() -> None:
    mesh = build_world(CPU).mesh
    assert mesh.mesh_dim_names == ("dp_shard",) and mesh.shape == (1,)


def message_of(*degrees: int) -> str:
    with pytest.raises(ConfigError) as caught:
        build_world(CPU, *degrees)
    return str(caught.value)


def on_two_ranks() -> dict[str, Any]:
    """Everything that two ranks are needed for, in one spawn: processes start slowly."""
    dp = Axis(dist.get_rank(), 2, dist.group.WORLD)
    rank = dp.rank
    out: dict[str, Any] = {}
    lengths = [(3, 5), (0, 2), (2, 0), (0, 0), (1, 1)]
    out["vectors"] = [
        gather_vector(torch.arange(pair[rank], dtype=dtype) + 10 * rank, dp).tolist()
        for pair in lengths
        for dtype in (torch.float32, torch.int64)
    ]
    # The same keys in another order; a sum that fp32 would round.
    values = {"x": 2.0**24, "y": 1.5} if rank == 0 else {"y": -1.0, "x": 1.0}
    out["sums"] = sum_scalars(values, CPU, dp)
    out["max"] = max_scalar([-2.0, -7.0][rank], CPU)
    out["nan"] = [max_scalar(v[rank], CPU) for v in ([math.nan, 1.0], [1.0, math.nan])]
    out["lists"] = [
        gather_lists([f"r{rank}", rank] * (rank + 1), dp),
        gather_lists([None] if rank == 1 else [], dp),
        gather_lists([], dp),
    ]
    out["meshes"] = [
        (world.mesh.mesh_dim_names, tuple(world.mesh.shape))
        for world in map(partial(build_world, CPU), (1, 1, 2, 1), (-1, 2, -1, -1), (1, 1, 1, 2))
    ]
    out["refusals"] = [message_of(*d) for d in ((3,), (1, 1), (2, 2), (1, -1, 3))]
    out["waited"] = waited_for_the_other_rank()
    return out


def waited_for_the_other_rank() -> list[float]:
    """Rank 1 comes late to a collective of each group; how long did rank 0 wait for it?"""
    groups = [None, dist.new_group()]
    set_timeout(1, CPU)
    if dist.get_rank() == 1:
        time.sleep(5)
        return []
    waits = []
    for group in groups:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=group)
        waits.append(time.monotonic() - start)
    return waits


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_distributed(on_two_ranks, 2)


def test_vectors_of_any_length_come_together(two_ranks: list[dict[str, Any]]) -> None:
    expected = [[0, 1, 2, 10, 11, 12, 13, 14], [10, 11], [0, 1], [], [0, 10]]
    for result in two_ranks:
        assert result["vectors"] == [v for v in expected for _ in range(2)]


def test_sums_maxima_and_lists(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        assert result["sums"] == {"x": 2.0**24 + 1, "y": 0.5}
        assert result["max"] == -2.0
        assert result["nan"] == [math.inf] * 2
        assert result["lists"] == [["r0", 0, "r1", 1, "r1", 1], [None], []]


def test_meshes_of_two_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        assert result["meshes"] == [
            (("dp_shard",), (2,)),
            (("dp_shard",), (2,)),
            (("dp_replicate", "dp_shard"), (2, 1)),
            (("dp_shard", "tp"), (1, 2)),
        ]


def test_a_mesh_that_does_not_fit_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    fitting = [  # what keeps a wish comes first
        "1 x 2 x 1, 2 x 1 x 1, 1 x 1 x 2",
        "1 x 2 x 1, 2 x 1 x 1, 1 x 1 x 2",
        "2 x 1 x 1, 1 x 2 x 1, 1 x 1 x 2",
        "1 x 2 x 1, 1 x 1 x 2, 2 x 1 x 1",
    ]
    for message, what_fits in zip(two_ranks[0]["refusals"], fitting, strict=True):
        for key in ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel"):
            assert f"{key}_degree" in message
        assert "world size 2" in message and message.endswith(f"what fits: {what_fits}")
        assert "\n" not in message


def test_the_time_limit_holds_for_every_group(two_ranks: list[dict[str, Any]]) -> None:
    waits = two_ranks[0]["waited"]
    assert len(waits) == 2 and all(0.9 < wait < 4.0 for wait in waits)
