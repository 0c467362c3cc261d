"""Update the student on the micro-batches of a plan, and return diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size
from torch.distributed.tensor import DTensor

from opd_titan.config.job_config import Distill, Reference, Training
from opd_titan.data.types import Sample, ScoredBy
from opd_titan.distill.head import NONE_FROZEN, FrozenHeads, HeadStats, LossHead, LossRule
from opd_titan.distill.inspection import record_ranks, watch_samples
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distill.packing import (
    STAND_IN,
    Minibatch,
    PackedBatch,
    pack,
    pack_values,
    prefetched,
    unpack_values,
)
from opd_titan.distill.scoring import gathered_heads
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.collectives import max_scalar, sum_scalars
from opd_titan.distributed.sharding import drop_gradients, exchange_gradients, resharding
from opd_titan.distributed.stopping import Stopped
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution

# The log-prob at rollout time of a token that the student did not write.
UNKNOWN = math.inf


@dataclass(frozen=True)
class UpdateRule(LossRule):
    """The loss, and the norm at which gradients are clipped (0 disables clipping)."""

    max_grad_norm: float

    @classmethod
    def of(
        cls, distill: Distill, reference: Reference, training: Training, dist: Distribution
    ) -> UpdateRule:
        """Return the rule of a configuration; `dist` is the student's sampling distribution."""
        settings = ObjectiveSettings.of(distill, reference)
        return cls(OBJECTIVES[distill.objective], settings, dist, training.max_grad_norm)

    @property
    def needs_vocabulary(self) -> bool:
        return self.objective.needs_vocabulary(self.settings)


@dataclass
class UpdateResult:
    """The outcome of a step's updates.

    Attributes:
        scalars: by their TensorBoard names, the same on every rank.
        made: for each update, whether it was made; False if its loss or gradient was not finite on
            some rank. The same on every rank.
        suspects: of updates that were skipped, this rank's samples with a token of non-finite loss;
            if no rank has such a token, all samples of the update.
    """

    scalars: dict[str, float]
    made: list[bool]
    suspects: list[Sample]


class _Totals:
    """Sums over this rank's response tokens of a step, kept on the device until the end."""

    NAMES = {
        "loss_R": "loss/policy",
        "entropy_R": "policy/entropy",
        "ratio_R": "policy/ratio_mean",
        "clipped_R": "policy/clip_fraction",
    }

    def __init__(self, world: World) -> None:
        self.world, device = world, world.device
        self.sums: dict[str, Tensor] = {}
        self.gap_max = torch.full((), -1.0, device=device)  # below any gap: unknown
        self.loss = torch.zeros((), device=device)  # of this rank's tokens in the current update
        self.grad_norms: list[float] = []

    def begin_update(self) -> None:
        self.loss = torch.zeros_like(self.loss)

    def add(self, stats: HeadStats, rollout_R: Tensor | None, weight: int) -> None:
        """Add a micro-batch's diagnostics.

        An empty micro-batch has weight 0, but all names, because ranks must sum the same ones.

        Args:
            rollout_R: log-probs at rollout time; None if the weights have changed since.
        """
        self.loss += stats.loss_R.sum() * weight
        values = {name: getattr(stats, column) for column, name in self.NAMES.items()}
        for name, value_R in (*values.items(), *stats.probe.items()):
            if value_R is not None:
                count = torch.ones_like(value_R, dtype=torch.float64)
                total = torch.stack((value_R.double(), count)).sum(dim=1) * weight
                self.sums[name] = self.sums.get(name, 0.0) + total
        if rollout_R is not None and weight:
            gap_R = (stats.logprob_R - rollout_R).abs()
            gap_R = gap_R.masked_fill(rollout_R == UNKNOWN, -1.0)
            self.gap_max = torch.maximum(self.gap_max, gap_R.max())

    def metrics(self) -> dict[str, float]:
        local: dict[str, float] = {}
        for name, sums in self.sums.items():
            local[name], local[f"number of {name}"] = sums.tolist()
        total = sum_scalars(local, self.world.device, self.world.dp)
        counts = {name: total[f"number of {name}"] for name in self.sums}
        mean = {name: total[name] / count for name, count in counts.items() if count}
        gap_max = max_scalar(self.gap_max.item(), self.world.device)
        known = {"policy/logprob_gap_max": gap_max} if gap_max >= 0.0 else {}
        return {
            **mean,
            **known,
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
        }


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Sequence[Minibatch],
    rule: UpdateRule,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
    frozen: Mapping[str, nn.Module] = MappingProxyType({}),
    exchange_once: bool = False,
) -> UpdateResult:
    """Do one optimizer step per mini-batch, and set the advantages of each sample.

    An update with a non-finite loss or gradient is skipped, on all ranks.

    Args:
        on_sequences: called by all ranks with the number of sequences just done. It may raise
            before the first optimizer step, while nothing has changed.
        frozen: by role, the models that computed the hidden states of the samples. Log-probs
            replace the hidden states.
        exchange_once: see `exchange_gradients`.
    """
    totals, made = _Totals(world), []
    done: list[list[tuple[Sequence[Sample], HeadStats]]] = []
    for i, minibatch in enumerate(plan):
        done.append([])
        totals.begin_update()
        with _accumulating(model):
            left = len(minibatch.microbatches)
            for teacher, microbatches in minibatch.by_teacher():
                with gathered_heads(models_of(teacher, frozen)) as heads:
                    make = partial(pack_scored, world=world, heads=heads)
                    for samples, packed in prefetched(microbatches, make):
                        left -= 1
                        exchange_gradients(model, last=left == 0, once=exchange_once)
                        tokens = minibatch.response_tokens
                        stats, rollout_R = forward_backward(
                            model, samples, tokens, rule, world, heads, packed
                        )
                        totals.add(stats, rollout_R if i == 0 else None, int(bool(samples)))
                        if samples:
                            done[-1].append((samples, stats))
                        on_sequences(len(samples))
        norm = _clip(model, rule.max_grad_norm, totals.loss)
        totals.grad_norms.append(norm)
        made.append(math.isfinite(norm))
        if made[-1]:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Copied only now: a copy to the host waits for the device, which should stay busy.
    for part in done:
        for those, stats in part:
            _fill_in(those, stats)
    suspects: list[Sample] = []
    for part, ok in zip(done, made, strict=True):
        if not ok:
            suspects += _suspects(part, world)
    scalars = {**totals.metrics(), "skipped_updates": made.count(False)}
    return UpdateResult(scalars, made, suspects)


@contextmanager
def _accumulating(model: nn.Module) -> Iterator[None]:
    """Accumulate the gradients of one update on the shards, and reshard at the end.

    If the update is stopped, its gradients are dropped.
    """
    with resharding(model):
        try:
            yield
        except Stopped:
            drop_gradients(model)
            raise


def models_of(teacher: str, frozen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the "teacher" and the "reference" of one teacher's micro-batches."""
    names = {"teacher": teacher, "reference": "reference"}
    return {role: frozen[name] for role, name in names.items() if name in frozen}


def _suspects(done: Sequence[tuple[Sequence[Sample], HeadStats]], world: World) -> list[Sample]:
    """Return the samples with a token of non-finite loss; all samples if no rank has one."""
    found = [
        sample
        for samples, stats in done
        for sample, loss in zip(samples, unpack_values(stats.loss_R, samples), strict=True)
        if not loss.isfinite().all()
    ]
    if max_scalar(float(bool(found)), world.device) > 0.0:
        return found
    return [sample for samples, _ in done for sample in samples]


def _fill_in(samples: Sequence[Sample], stats: HeadStats) -> None:
    found: dict[ScoredBy, Tensor | None]
    found = {"teacher": stats.teacher_R, "reference": stats.reference_R}
    for role, logprob_R in found.items():
        if logprob_R is not None:
            for sample, values in zip(samples, unpack_values(logprob_R, samples), strict=True):
                sample.set_logprobs(role, values)
    for sample, values in zip(samples, unpack_values(stats.advantage_R, samples), strict=True):
        sample.advantages = values
    for inspected, seen in stats.seen.items():
        record_ranks(samples, inspected, seen)
    for sample in samples:
        sample.teacher_hidden = sample.reference_hidden = None


def forward_backward(
    model: nn.Module,
    samples: Sequence[Sample],
    update_tokens: int,
    rule: UpdateRule,
    world: World,
    heads: FrozenHeads = NONE_FROZEN,
    packed: tuple[PackedBatch, TokenScores] | None = None,
) -> tuple[HeadStats, Tensor | None]:
    """Run forward and backward, which are collective, of one micro-batch, which may be empty.

    Args:
        update_tokens: response tokens of the whole update, over micro-batches and ranks.
        heads: heads of the models that computed the samples' hidden states.
        packed: the result of `pack_scored`, if it was called ahead.

    Returns:
        Diagnostics of its tokens, and their log-probs [R] at rollout time, if known.
    """
    batch, scores = packed or pack_scored(samples, world, heads)
    watches = {role: watch_samples(samples, role) for role in ("student", *heads.by_role)}
    head = LossHead(
        rule,
        batch.predict_R,
        batch.targets_R,
        scores,
        scale=1.0 / update_tokens if samples else 0.0,
        frozen=heads,
        probe_from=samples[0].prompt.index + samples[0].sample_index if samples else 0,
        watches={role: watch for role, watch in watches.items() if watch is not None},
    )
    loss, stats = model(batch.tokens_T, batch.attend, head)
    loss.backward()
    return stats, scores.rollout


def pack_scored(
    samples: Sequence[Sample], world: World, heads: FrozenHeads
) -> tuple[PackedBatch, TokenScores]:
    """Pack a micro-batch, which may be empty, and the scores of its tokens."""
    device = world.device
    if not samples:
        zero_R = torch.zeros(1, device=device)
        hidden = [
            None if head is None else head.weight_vD.new_zeros(1, head.weight_vD.shape[1])
            for head in (heads.teacher, heads.reference)
        ]
        return pack(STAND_IN, world), TokenScores(zero_R, zero_R, zero_R, *hidden)
    rollout = [s.student_logprobs for s in samples]
    if any(values is not None for values in rollout):
        rollout = [
            torch.full((len(s.response_ids),), UNKNOWN) if values is None else values
            for s, values in zip(samples, rollout, strict=True)
        ]
    scores = TokenScores(
        pack_values(rollout, device),
        pack_values([s.teacher_logprobs for s in samples], device),
        pack_values([s.reference_logprobs for s in samples], device),
        pack_values([s.teacher_hidden for s in samples], device),
        pack_values([s.reference_hidden for s in samples], device),
    )
    return pack(samples, world), scores


@torch.no_grad()
def _clip(model: nn.Module, max_norm: float, loss: Tensor) -> float:
    """Clip the gradients to the total norm `max_norm`, and return the norm before clipping.

    Args:
        max_norm: 0 disables clipping.
        loss: this rank's loss. If it is not finite on any rank, the norm is NaN on all ranks.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_copies.setdefault(_copies(parameter.grad), []).append(local(parameter.grad))
    norm = _total_norm(by_copies, loss).item()
    if 0 < max_norm < norm < math.inf:
        for grads in by_copies.values():
            torch._foreach_mul_(grads, max_norm / norm)
    return norm


def _copies(grad: Tensor) -> int:
    """Return the number of ranks that hold each element of a gradient."""
    if not isinstance(grad, DTensor):
        return get_world_size()
    placed = zip(grad.placements, grad.device_mesh.shape, strict=True)
    return math.prod(ranks for placement, ranks in placed if placement.is_replicate())


def _total_norm(by_copies: Mapping[int, list[Tensor]], loss: Tensor) -> Tensor:
    """Return the 2-norm of all gradients, in one collective (DTensor's takes one per mesh axis).

    A gradient with n copies is counted n times in the sum over all ranks, so its square is divided
    by n.
    """
    norms = {copies: torch.nn.utils.get_total_norm(grads) for copies, grads in by_copies.items()}
    square = sum(norm.square() / copies for copies, norm in norms.items())
    square = square + 0.0 * loss  # NaN unless it is finite
    all_reduce(square)
    return square.sqrt()
