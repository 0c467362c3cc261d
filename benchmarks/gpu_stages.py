"""What `gpu.py` measures, stage by stage, and in which order.

Each stage is a process. Its limit, in seconds on an H100, is about twice what it is expected to
take: a stage that hangs is cut off, and those that matter most come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from apart import Work
from gpu_ceiling import measure_ceiling, measure_head
from gpu_engine import check_engine, measure_gap
from gpu_kernels import (
    ATTENTION,
    LAYERS,
    check_independence,
    measure_ceilings,
    measure_operators,
    measure_splits,
)
from gpu_logits import LOGITS, check_draw, check_truncation
from gpu_numerics import check_compiled, measure_numerics
from gpu_phases import measure_score, measure_step, measure_update
from gpu_products import measure_grouped_heads, measure_products
from gpu_setting import Setting
from gpu_trainer import train_debug_recipe
from rollout_cases import BATCHES, RolloutSetting, measure_curve, measure_ours, measure_sampler


class Stage(NamedTuple):
    name: str
    limit: float
    works: tuple[Work, ...]


def _rollout(s: Setting, measure: Callable[..., None], repeats: int = 3, **options: Any) -> None:
    """Measure rollouts: in bf16, on one device by name."""
    kind = "cuda" if s.on_cuda else "cpu"
    measure(RolloutSetting(s.miniature, 1, repeats, device_name=kind, emit=s.emit), **options)


def _curve(size: str, batches: Sequence[int] = (1, 64, 256), **options: bool) -> Work:
    return partial(_rollout, measure=measure_curve, size=size, batches=batches, **options)


def _ours(size: str, workload: str) -> Work:
    return partial(_rollout, measure=measure_ours, repeats=1, size=size, workload=workload)


def _sampler(size: str) -> Work:
    return partial(_rollout, measure=measure_sampler, size=size)


def _step(objective: str, compile: bool = False) -> Work:
    return partial(measure_step, compile=compile, objective=objective)


def _update(size: str, compile: bool = False) -> Work:
    return partial(measure_update, size=size, compile=compile)


def _score(size: str, compile: bool = False) -> Work:
    return partial(measure_score, size=size, compile=compile)


ENVIRONMENT = Stage("env", 45, (measure_ceilings,))

FIRST = (
    Stage("attention", 45, (
        partial(measure_operators, makes=ATTENTION),
        check_independence,
        measure_splits,
        measure_grouped_heads,
    )),
    Stage("layers", 30, (partial(measure_operators, makes=LAYERS),)),
    Stage("logits", 30, (
        partial(measure_operators, makes=LOGITS, half=False),
        check_truncation,
        check_draw,
    )),
    Stage("engine", 50, (partial(check_engine, size="0.6B"),)),
    Stage("trainer", 90, (train_debug_recipe,)),
    Stage("decode", 90, (_curve("0.6B"), _curve("1.7B"), _curve("8B"))),
    Stage("products", 45, (measure_products,)),
    Stage("update", 60, (_update("1.7B"), partial(measure_ceiling, size="1.7B"))),
)  # fmt: skip

SECOND = (
    Stage("update-compiled", 110, (check_compiled, _update("1.7B", compile=True))),
    Stage("step", 70, (_step("policy_gradient"),)),
    Stage("step-exact", 70, (_step("reverse_kl"),)),
    Stage("score", 50, (_score("4B"),)),
    Stage("nano", 60, (_ours("0.6B", "nano"),)),
    Stage("burst", 90, (_ours("8B", "burst"),)),
    Stage("gap", 40, (measure_gap,)),
    Stage("numerics", 90, (measure_numerics,)),
)

# For whoever has a card for longer.
MORE = (
    Stage("decode-eager", 60, (_curve("0.6B", graphs=False), _curve("8B", (64,), graphs=False))),
    Stage("decode-all", 300, tuple(_curve(n, BATCHES, stop_tokens=False)
                                   for n in ("0.6B", "1.7B", "8B"))),
    Stage("sampler", 60, (_sampler("0.6B"), _sampler("8B"))),
    Stage("nano-8B", 120, (_ours("8B", "nano"),)),
    Stage("step-compiled", 180, (_step("policy_gradient", compile=True),)),
    *(Stage(f"update-{n}", 180, (_update(n),)) for n in ("4B", "8B")),
    *(Stage(f"update-{n}-compiled", 240, (_update(n, compile=True),)) for n in ("4B", "8B")),
    *(Stage(f"score-{n}", 90, (_score(n),)) for n in ("1.7B", "8B")),
    *(Stage(f"score-{n}-compiled", 180, (_score(n, compile=True),)) for n in ("1.7B", "4B", "8B")),
    *(Stage(f"head-{n}", 60, (partial(measure_head, size=n),)) for n in ("1.7B", "8B")),
    *(Stage(f"ceiling-{n}", 60, (partial(measure_ceiling, size=n),)) for n in ("4B", "8B")),
)  # fmt: skip

# In miniature these take longer than all others together.
COMPILED = "-compiled"
PLANS = {"first": FIRST, "second": SECOND, "all": (*FIRST, *SECOND, *MORE)}
