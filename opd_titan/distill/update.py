"""The student's update: a plan of micro-batches in, moved weights and their diagnostics out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size
from torch.distributed.tensor import DTensor

from opd_titan.data.types import Sample
from opd_titan.distill.head import HeadStats, loss_head
from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenScores
from opd_titan.distill.packing import (
    STAND_IN,
    Minibatch,
    PackedBatch,
    pack,
    pack_values,
    unpack_values,
)
from opd_titan.distributed.collectives import max_scalar, sum_scalars
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution


@dataclass(frozen=True)
class UpdateRule:
    """Which loss, under which distribution, clipped at which norm (0: not clipped)."""

    objective: Objective
    settings: ObjectiveSettings
    dist: Distribution
    max_grad_norm: float


class _Totals:
    """Sums over this rank's response tokens of a step, kept on the device until the end."""

    NAMES = ("tokens", "loss", "entropy", "ratio", "clipped")

    def __init__(self, world: World) -> None:
        self.world, device = world, world.device
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.gap_max = torch.zeros((), device=device)
        self.grad_norms: list[float] = []

    def add(self, stats: HeadStats, rollout_R: Tensor | None, first_update: bool) -> None:
        ones_R = torch.ones_like(stats.loss_R)
        values = (ones_R, stats.loss_R, stats.entropy_R, stats.ratio_R, stats.clipped_R)
        self.sums += torch.stack([v.double() for v in values]).sum(dim=1)
        if first_update and rollout_R is not None:
            gap = (stats.logprob_R - rollout_R).abs().max()
            self.gap_max = torch.maximum(self.gap_max, gap)

    def metrics(self) -> dict[str, float]:
        local = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        total = sum_scalars(local, self.world.device, self.world.dp)
        mean = {name: value / total["tokens"] for name, value in total.items()}
        return {
            "loss/policy": mean["loss"],
            "loss/total": mean["loss"],
            "policy/entropy": mean["entropy"],
            "policy/ratio_mean": mean["ratio"],
            "policy/clip_fraction": mean["clipped"],
            "policy/logprob_gap_max": max_scalar(self.gap_max.item(), self.world.device),
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
        }


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Sequence[Minibatch],
    rule: UpdateRule,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """One optimizer step per mini-batch; fills in each sample's advantages.

    Args:
        on_sequences: called with the number of sequences just done, for a progress bar.

    Returns:
        Scalars by their TensorBoard names, the same on every rank.

    Raises:
        FloatingPointError: the gradient norm is not finite; the weights were not touched by it.
    """
    totals = _Totals(world)
    advantages: list[tuple[Sequence[Sample], Tensor]] = []
    for i, minibatch in enumerate(plan):
        for samples in minibatch.microbatches:
            stats, rollout_R = forward_backward(
                model, samples, minibatch.response_tokens, rule, world
            )
            if samples:
                totals.add(stats, rollout_R, first_update=i == 0)
                advantages.append((samples, stats.advantage_R))
            on_sequences(len(samples))
        totals.grad_norms.append(_clip(model, rule.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Only now: a copy to the host waits for the device, which should be busy meanwhile.
    for samples, advantage_R in advantages:
        for sample, values in zip(samples, unpack_values(advantage_R, samples), strict=True):
            sample.advantages = values
    return totals.metrics()


def forward_backward(
    model: nn.Module, samples: Sequence[Sample], update_tokens: int, rule: UpdateRule, world: World
) -> tuple[HeadStats, Tensor | None]:
    """Forward and backward of one micro-batch, which may be empty: both are collective.

    Args:
        update_tokens: response tokens of the whole update, over micro-batches and ranks.

    Returns:
        Diagnostics of its tokens, and their log-probs [R] at rollout time, if known.
    """
    batch, scores = _packed(samples, world)
    head = partial(
        loss_head,
        predict_R=batch.predict_R,
        targets_R=batch.targets_R,
        scores=scores,
        scale=1.0 / update_tokens if samples else 0.0,
        objective=rule.objective,
        settings=rule.settings,
        dist=rule.dist,
    )
    loss, stats = model(batch.tokens_T, batch.attend, head)
    loss.backward()
    return stats, scores.rollout


def _packed(samples: Sequence[Sample], world: World) -> tuple[PackedBatch, TokenScores]:
    device = world.device
    if not samples:
        zero_R = torch.zeros(1, device=device)
        return pack(STAND_IN, world), TokenScores(zero_R, zero_R, zero_R)
    scores = TokenScores(
        pack_values([s.student_logprobs for s in samples], device),
        pack_values([s.teacher_logprobs for s in samples], device),
        pack_values([s.reference_logprobs for s in samples], device),
    )
    return pack(samples, world), scores


def _total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in one collective (DTensor's takes one per axis).

    A gradient that n ranks hold enters the world's sum n times, so its square is divided by n.
    """
    shares: dict[int, list[Tensor]] = {}
    for grad in grads:
        if isinstance(grad, DTensor):
            placed = zip(grad.placements, grad.device_mesh.shape, strict=True)
            copies = math.prod(ranks for placement, ranks in placed if placement.is_replicate())
            shares.setdefault(copies, []).append(grad.to_local())
        else:
            shares.setdefault(get_world_size(), []).append(grad)
    norms = {copies: torch.nn.utils.get_total_norm(parts) for copies, parts in shares.items()}
    square = sum(norm.square() / copies for copies, norm in norms.items())
    all_reduce(square)
    return square.sqrt()


def _clip(model: nn.Module, max_norm: float) -> float:
    """Scale gradients down to `max_norm` (0: leave them); the total norm before that."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = _total_norm([p.grad for p in parameters])
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm.item()}; the update was not made")
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
