"""A step's scalars from its samples: rollout statistics, distances, work done by phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from opd_titan.config.resolve import is_teacher
from opd_titan.data.types import Sample
from opd_titan.distributed.collectives import gather_vector, max_scalar, sum_scalars
from opd_titan.distributed.world import World
from opd_titan.observability.metrics import POSITIONS, position_name
from opd_titan.observability.rollout_writer import repetition

ForwardFlops = Callable[[Sequence[int], int], float]


def rollout_scalars(
    samples: Sequence[Sample],
    mine: Sequence[Sample],
    decode: Callable[[list[int]], str],
    world: World,
) -> dict[str, float]:
    """`rollout/*`.

    Args:
        samples: of all ranks.
        mine: this rank's share; texts are decoded by the rank that has them.
    """
    lengths = [len(s.response_ids) for s in samples]
    truncated = sum(s.finish_reason == "length" for s in samples) / len(samples)
    local = sum(repetition(decode(s.response_ids)) for s in mine)
    total = sum_scalars({"repetition": local}, world.device, world.dp)["repetition"]
    return {
        "rollout/response_tokens_mean": sum(lengths) / len(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/truncated_fraction": truncated,
        "rollout/eos_fraction": 1.0 - truncated,
        "rollout/repetition": total / len(samples),
    }


def data_set_scalars(
    samples: Sequence[Sample], mine: Sequence[Sample], world: World
) -> dict[str, float]:
    """`data/<set>/*`, where there are several sets. Arguments as for `rollout_scalars`."""
    scalars: dict[str, float] = {}
    local: dict[str, float] = {}
    for name in sorted({s.prompt.data_set for s in samples} - {""}):
        own = [s for s in samples if s.prompt.data_set == name]
        scalars[f"data/{name}/share"] = len(own) / len(samples)
        lengths = sum(len(s.response_ids) for s in own)
        scalars[f"data/{name}/response_tokens_mean"] = lengths / len(own)
        truncated = sum(s.finish_reason == "length" for s in own)
        scalars[f"data/{name}/truncated_fraction"] = truncated / len(own)
        ratios = _log_ratios([s for s in mine if s.prompt.data_set == name], "teacher_logprobs")
        local[f"sum {name}"] = sum(r.double().sum().item() for r in ratios)
        local[f"count {name}"] = sum(r.numel() for r in ratios)
    total = sum_scalars(local, world.device, world.dp) if local else {}
    for key in [key for key in total if key.startswith("count ") and total[key]]:
        name = key.removeprefix("count ")
        scalars[f"data/{name}/kl_student_teacher"] = total[f"sum {name}"] / total[key]
    return scalars


def balance_scalars(seconds: float, preempted: int, world: World) -> dict[str, float]:
    """`rollout/{idle_share,preempted}`, given this rank's seconds of sampling and preemptions."""
    total = sum_scalars({"s": seconds, "n": preempted}, world.device, world.dp)
    longest = max_scalar(seconds, world.device)
    idle = 1.0 - total["s"] / world.dp.size / longest if longest > 0.0 else 0.0
    return {"rollout/idle_share": idle, "rollout/preempted": total["n"]}


def kl_scalars(mine: Sequence[Sample], world: World) -> dict[str, float]:
    """`kl/*`: sampled estimates, per response token, at the weights that sampled them."""
    scalars = {}
    for other in ("teacher", "reference"):
        ratios = _log_ratios(mine, f"{other}_logprobs")
        difference_R = _of_all_ranks(ratios, world)
        if difference_R.numel() == 0:
            continue
        scalars[f"kl/student_{other}"] = difference_R.double().mean().item()
        if other == "teacher":
            sorted_R = difference_R.sort().values
            for percent in (1, 99):
                rank = round(percent / 100 * (sorted_R.numel() - 1))
                scalars[f"kl/p{percent}"] = sorted_R[rank].item()
            scalars |= _by_position(ratios, world)
    return scalars


def log_ratios(mine: Sequence[Sample], world: World) -> Tensor:
    """log student - log teacher of all ranks' response tokens, [tokens]; all ranks call."""
    return _of_all_ranks(_log_ratios(mine, "teacher_logprobs"), world)


def _of_all_ranks(ratios: Sequence[Tensor], world: World) -> Tensor:
    return gather_vector(torch.cat([torch.empty(0), *ratios]).to(world.device), world.dp)


def _log_ratios(samples: Sequence[Sample], other: str) -> list[Tensor]:
    """log S - log other of the tokens of each response where both are known."""
    return [
        s.student_logprobs - getattr(s, other)
        for s in samples
        if getattr(s, other) is not None and s.student_logprobs is not None
    ]


def _by_position(ratios: Sequence[Tensor], world: World) -> dict[str, float]:
    """The student-teacher term by where in the response a token is, in `POSITIONS`."""
    local = {}
    for first, last in POSITIONS:
        part_R = torch.cat([torch.empty(0), *(r[first - 1 : last] for r in ratios)]).double()
        local[f"sum {first}"], local[f"count {first}"] = part_R.sum().item(), part_R.numel()
    total = sum_scalars(local, world.device, world.dp)
    return {
        position_name(first, last): total[f"sum {first}"] / total[f"count {first}"]
        for first, last in POSITIONS
        if total[f"count {first}"]
    }


def work(
    samples: Sequence[Sample], forward_flops: Mapping[str, ForwardFlops], whole: bool = False
) -> tuple[dict[str, int], dict[str, float]]:
    """Tokens and FLOPs by phase, over all ranks, of one step in which every phase ran once.

    Tokens are those of the sequences; FLOPs know that a prompt is computed once for its group.

    Args:
        forward_flops: by role, (lengths of the sequences, projected tokens) -> FLOPs.
        whole: the frozen models' heads are at work in the update, not when they score.
    """
    responses = sum(len(s.response_ids) for s in samples)
    lengths = [_fed_in(s) for s in samples]
    tokens = {"rollout": responses, "update": sum(lengths), "step": responses}
    student = forward_flops["student"]
    # Decoding with a cache costs what one forward over the finished sequences does, but for the
    # prompts: the samples of a group share one prefill of all but the last token.
    prefilled_once = [n - 1 for n in _repeated_prompts(samples)]
    flops = {
        "update": 3.0 * packed_flops(samples, student, responses),
        "rollout": student(lengths, responses) - student(prefilled_once, 0),
    }
    for role, forward in forward_flops.items():
        scored = [s for s in samples if not is_teacher(role) or s.prompt.teacher == role]
        projected = sum(len(s.response_ids) for s in scored)
        if is_teacher(role):
            tokens["teacher"] = sum(lengths)
            scoring = packed_flops(scored, forward, 0 if whole else projected)
            flops["teacher"] = flops.get("teacher", 0.0) + scoring
        if whole and role != "student":
            flops["update"] += forward([], projected)
    return tokens, flops


def packed_flops(samples: Sequence[Sample], forward: ForwardFlops, projected: int) -> float:
    """Of one forward over these samples, packed together: each prompt once."""
    lengths = [_fed_in(s) for s in samples]
    return forward(lengths, projected) - forward(_repeated_prompts(samples), 0)


def cached_tokens_read(samples: Sequence[Sample]) -> int:
    """Cached tokens that decoding attended to, summed over sequences and forwards.

    Each token comes out of a forward that feeds in the one before it (the prompt's last one at
    first), at position p, and attends to p + 1 tokens, itself included.
    """
    return sum(_pairs(_fed_in(s)) - _pairs(len(s.prompt.token_ids) - 1) for s in samples)


def _fed_in(sample: Sample) -> int:
    """Tokens that go through a model: all but the last, which predicts nothing."""
    return sample.num_tokens - 1


def _pairs(length: int) -> int:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) // 2


def _repeated_prompts(samples: Sequence[Sample]) -> list[int]:
    """Lengths of the prompts of all samples but the first of each."""
    seen: set[int] = set()
    repeated = []
    for s in samples:
        if s.prompt.index in seen:
            repeated.append(len(s.prompt.token_ids))
        seen.add(s.prompt.index)
    return repeated
