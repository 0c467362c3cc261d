"""A step's scalars, computed from its samples: rollout statistics, KL estimates, work by phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from opd_titan.config.resolve import is_teacher
from opd_titan.data.types import Sample, ScoredBy
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
    """Return `rollout/*`. All ranks call.

    Args:
        samples: the samples of all ranks.
        mine: the samples that this rank decodes.
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
    """Return `data/<set>/*` if there are several sets. Arguments as for `rollout_scalars`."""
    scalars: dict[str, float] = {}
    for name in sorted({s.prompt.data_set for s in samples} - {""}):
        own = [s for s in samples if s.prompt.data_set == name]
        lengths = sum(len(s.response_ids) for s in own)
        truncated = sum(s.finish_reason == "length" for s in own)
        scalars[f"data/{name}/share"] = len(own) / len(samples)
        scalars[f"data/{name}/response_tokens_mean"] = lengths / len(own)
        scalars[f"data/{name}/truncated_fraction"] = truncated / len(own)
        ratios = _log_ratios([s for s in mine if s.prompt.data_set == name], "teacher")
        scalars |= _means({f"data/{name}/kl_student_teacher": ratios}, world)
    return scalars


def balance_scalars(seconds: float, preempted: int, world: World) -> dict[str, float]:
    """Return `rollout/{idle_share,preempted}` from this rank's sampling seconds and preemptions."""
    total = sum_scalars({"s": seconds, "n": preempted}, world.device, world.dp)
    longest = max_scalar(seconds, world.device)
    idle = 1.0 - total["s"] / world.dp.size / longest if longest > 0.0 else 0.0
    return {"rollout/idle_share": idle, "rollout/preempted": total["n"]}


def kl_scalars(mine: Sequence[Sample], world: World) -> dict[str, float]:
    """Return `kl/*`: sampled estimates per response token, at the weights that sampled."""
    scalars = {}
    others: tuple[ScoredBy, ScoredBy] = ("teacher", "reference")
    for other in others:
        ratios = _log_ratios(mine, other)
        difference_R = _of_all_ranks(ratios, world)
        if difference_R.numel() == 0:
            continue
        scalars[f"kl/student_{other}"] = difference_R.double().mean().item()
        if other == "teacher":
            sorted_R = difference_R.sort().values
            for percent in (1, 99):
                rank = round(percent / 100 * (sorted_R.numel() - 1))
                scalars[f"kl/p{percent}"] = sorted_R[rank].item()
            parts = {position_name(a, b): [r[a - 1 : b] for r in ratios] for a, b in POSITIONS}
            scalars |= _means(parts, world)
    return scalars


def log_ratios(mine: Sequence[Sample], world: World) -> Tensor:
    """Return log S - log T of all ranks' response tokens, fp32 [tokens]. All ranks call."""
    return _of_all_ranks(_log_ratios(mine, "teacher"), world)


def _of_all_ranks(ratios: Sequence[Tensor], world: World) -> Tensor:
    return gather_vector(torch.cat([torch.empty(0), *ratios]).to(world.device), world.dp)


def _log_ratios(samples: Sequence[Sample], other: ScoredBy) -> list[Tensor]:
    """Return log S - log other of each response that has both, a tensor per response."""
    pairs = [(s.student_logprobs, s.logprobs_of(other)) for s in samples]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def _means(parts: Mapping[str, Sequence[Tensor]], world: World) -> dict[str, float]:
    """Return the mean of each part over all ranks, without parts that have no token."""
    local = {}
    for name, values in parts.items():
        part_R = torch.cat([torch.empty(0), *values]).double()
        local[f"sum {name}"], local[f"count {name}"] = part_R.sum().item(), part_R.numel()
    total = sum_scalars(local, world.device, world.dp)
    counts = {name: total[f"count {name}"] for name in parts}
    return {name: total[f"sum {name}"] / count for name, count in counts.items() if count}


def work(
    samples: Sequence[Sample], forward_flops: Mapping[str, ForwardFlops], whole: bool = False
) -> tuple[dict[str, int], dict[str, float]]:
    """Return tokens and FLOPs by phase, over all ranks, of one step that runs each phase once.

    Tokens count every sequence in full; FLOPs count a prompt once for its group.

    Args:
        forward_flops: by role, (lengths of the sequences, projected tokens) -> FLOPs.
        whole: whether the frozen models' heads run in the update, not in scoring.
    """
    responses = sum(len(s.response_ids) for s in samples)
    lengths = [_fed_in(s) for s in samples]
    tokens = {"rollout": responses, "update": sum(lengths), "step": responses}
    student = forward_flops["student"]
    # Decoding with a cache costs as much as one forward over the finished sequences, except that
    # the samples of a group share one prefill of all prompt tokens but the last.
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
    """Return the FLOPs of one forward over these samples packed together, each prompt once."""
    lengths = [_fed_in(s) for s in samples]
    return forward(lengths, projected) - forward(_repeated_prompts(samples), 0)


def cached_tokens_read(samples: Sequence[Sample]) -> int:
    """Return the cached tokens that decoding attends to, summed over sequences and forwards.

    A forward feeds in the token before the one that it samples, at first the prompt's last one. At
    position p it attends to p + 1 tokens, itself included.
    """
    return sum(_pairs(_fed_in(s)) - _pairs(len(s.prompt.token_ids) - 1) for s in samples)


def _fed_in(sample: Sample) -> int:
    """Return the number of input tokens of a model: all but the last, which predicts nothing."""
    return sample.num_tokens - 1


def _pairs(length: int) -> int:
    """Return the number of (query, key) pairs of a causal sequence."""
    return length * (length + 1) // 2


def _repeated_prompts(samples: Sequence[Sample]) -> list[int]:
    """Return the prompt lengths of all samples but the first of each prompt."""
    seen: set[int] = set()
    repeated = []
    for s in samples:
        if s.prompt.index in seen:
            repeated.append(len(s.prompt.token_ids))
        seen.add(s.prompt.index)
    return repeated
