"""The vocabulary head in chunks: log-probs, and a loss with its gradients in one pass.

No tensor [tokens, vocabulary] exists beyond one chunk, and only positions that predict a response
token are projected. The whole distributions of frozen models are kept as hidden states and
projected together with the student's.

Under tensor parallelism each rank projects onto its part of the vocabulary. The ranks exchange a
few numbers per token, never logits, unless top-k or top-p have to see all of them.

Shapes: T packed tokens, R response tokens, C response tokens of a chunk, D the student's width, E a
frozen model's width, v the part of the vocabulary that this rank holds (all of it without tensor
parallelism), M models, N probed tokens of a chunk, K likeliest tokens, P tensor-parallel ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_titan.distill.inspection import Columns, Inspector
from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenLoss
from opd_titan.distill.vocabulary import Buffer, ModelLogits, Rows, TokenScores
from opd_titan.models import kernels
from opd_titan.models.kernels.device import device_of
from opd_titan.models.logits import (
    Distribution,
    VocabHead,
    projects_in_place,
    scaled_logits,
    truncated_logits,
)

# Bytes of the fp32 logits of one chunk. A CPU gains no speed from larger chunks. A GPU rereads the
# head's fp32 gradient for each chunk, so it needs many rows (by arithmetic, at 64 MiB that traffic
# would take three times as long as the products).
CHUNK_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}
# Diagnostics that need extra passes over the vocabulary use one in PROBE_EVERY tokens.
PROBE_EVERY = 8
_GOLDEN = 2654435769  # 2**32 over the golden ratio
PROBE_TOP_K = 16


def _chunks(n: int, head: VocabHead, dist: Distribution, tensors: int = 2) -> list[slice]:
    """Return slices of `n` tokens; the first slice is the longest.

    One tensor [C, v] takes at most CHUNK_BYTES, and `tensors` of them at most three times that
    (without the probe's copies of some rows).
    """
    # Truncation sorts the whole vocabulary, with seven such tensors at its peak.
    width = 8 * head.vocab_size if dist.truncates else head.rows
    chunk_bytes = CHUNK_BYTES[device_of(head.weight_vD).type] * 3 // max(3, tensors)
    rows = max(1, chunk_bytes // (4 * width))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _buffer(head: VocabHead, chunks: Sequence[slice]) -> Buffer:
    """Return memory for a tensor [C, v] of any of the chunks."""
    return Buffer(chunks[0].stop, head.rows, head.weight_vD.device)


class _Projection:
    """Project one model's hidden states, chunk by chunk.

    Args:
        watch: inspects the logits of some rows before they are truncated.
    """

    def __init__(
        self,
        head: VocabHead,
        dist: Distribution,
        chunks: Sequence[slice],
        watch: Inspector | None,
    ) -> None:
        self.head, self.dist, self.watch = head, dist, watch
        self.buffer = _buffer(head, chunks) if projects_in_place(head.weight_vD) else None

    def __call__(self, hidden_CE: Tensor, targets_C: Tensor, chunk: slice) -> Tensor:
        """Return a chunk's logits [C, v], which the next call may overwrite."""
        out_Cv = None if self.buffer is None else self.buffer.rows(hidden_CE.shape[0])
        logits_Cv = scaled_logits(hidden_CE, self.head, self.dist, out_Cv)
        if self.watch is not None:
            self.watch.look(chunk, logits_Cv, targets_C, self.head)
        return truncated_logits(logits_Cv, self.head, self.dist, targets_C)


# ------------------------------------------------------------------------------ scoring


@torch.no_grad()
def score_head(
    hidden_TD: Tensor,
    weight: Tensor,
    predict_R: Tensor,
    targets_R: Tensor,
    dist: Distribution,
    watch: Inspector | None = None,
) -> Tensor:
    """Return log-probs [R] fp32 of the targets, without gradients. Pass it to the model's forward.

    Args:
        weight: the head's weight [V, D], as the model's forward passes it.
        predict_R: for each target, the packed position of the hidden state that predicts it.
        targets_R: token ids.
        watch: records the ranks of some of the targets.
    """
    head = VocabHead.of(weight).first(dist.vocab_size)
    out_R = torch.empty(targets_R.numel(), device=hidden_TD.device)
    chunks = _chunks(targets_R.numel(), head, dist)
    project = _Projection(head, dist, chunks, watch)
    for chunk in chunks:
        targets_C = targets_R[chunk]
        logits_Cv = project(hidden_TD[predict_R[chunk]], targets_C, chunk)
        own_2C = kernels.logit_stats(logits_Cv, _columns(targets_C, head), mean=False)
        target_PC, lse_PC = head.stack(own_2C).unbind(dim=1)
        out_R[chunk] = target_PC.amax(dim=0) - lse_PC.logsumexp(dim=0)
    if watch is not None:
        watch.finish(out_R)
    return out_R


def hidden_head(hidden_TD: Tensor, weight: Tensor, predict_R: Tensor) -> Tensor:
    """Return the hidden states [R, D] that predict the targets, for the update to project."""
    return hidden_TD.index_select(0, predict_R)


def _columns(targets_C: Tensor, head: VocabHead) -> Tensor:
    """Return each target's column of this rank's logits, -1 if another rank holds it."""
    row_C, held_C = head.locate(targets_C)
    return row_C.masked_fill(~held_C, -1)


# ------------------------------------------------------------------------------ the loss


@dataclass(frozen=True)
class LossRule:
    """The loss, its settings, and the student's distribution."""

    objective: Objective
    settings: ObjectiveSettings
    dist: Distribution


@dataclass(frozen=True)
class FrozenHeads:
    """The heads of the frozen models whose hidden states are kept; None for other models."""

    teacher: VocabHead | None = None
    reference: VocabHead | None = None

    @property
    def by_role(self) -> dict[str, VocabHead]:
        """The heads that are not None."""
        heads = {"teacher": self.teacher, "reference": self.reference}
        return {role: head for role, head in heads.items() if head is not None}


NONE_FROZEN = FrozenHeads()


@dataclass
class HeadStats:
    """Diagnostics of an update, detached.

    Attributes:
        logprob_R, entropy_R, loss_R, advantage_R: values of every response token.
        ratio_R, clipped_R: None if the objective has none.
        teacher_R, reference_R: log-probs, if they were computed here.
        probe: by name, values of the tokens that `probed` chooses; empty without the teacher's
            whole distribution.
        seen: by role, the results of the inspectors.
    """

    logprob_R: Tensor
    entropy_R: Tensor
    loss_R: Tensor
    advantage_R: Tensor
    ratio_R: Tensor | None = None
    clipped_R: Tensor | None = None
    teacher_R: Tensor | None = None
    reference_R: Tensor | None = None
    probe: dict[str, Tensor] = field(default_factory=dict)
    seen: Mapping[str, Columns] = field(default_factory=dict)


@dataclass(frozen=True)
class LossHead:
    """Compute the objective's sum over response tokens, times `scale`. Pass it to the forward.

    The forward computes the gradients too, chunk by chunk, while a chunk's logits exist.

    Attributes:
        rule: the loss and the student's distribution.
        predict_R: for each target, the packed position of the hidden state that predicts it.
        targets_R: token ids.
        scores: the targets' scores by all models.
        scale: one over the *global* number of response tokens of the update, so that micro-batches
            and ranks add up to the mean over tokens, never to a mean of means.
        frozen: the heads that project the hidden states in `scores`.
        probe_from: differs between micro-batches, so that different positions of responses are
            probed.
        watches: by role, the inspector that records the ranks of some of the targets.
    """

    rule: LossRule
    predict_R: Tensor
    targets_R: Tensor
    scores: TokenScores
    scale: float
    frozen: FrozenHeads = NONE_FROZEN
    probe_from: int = 0
    watches: Mapping[str, Inspector] = field(default_factory=dict)

    def __call__(self, hidden_TD: Tensor, weight: Tensor) -> tuple[Tensor, HeadStats]:
        """Return the loss, which has gradients, and diagnostics.

        Args:
            weight: the head's weight [V, D], as the model's forward passes it.
        """
        dist = self.rule.dist
        head = VocabHead.of(weight).first(dist.vocab_size)
        hidden_RD = hidden_TD.index_select(0, self.predict_R)
        stats, *gradients = self._forward_backward(hidden_RD, head)
        factors = self.scale, self.scale / dist.temperature
        loss = _Sum.apply(hidden_RD, head.weight_vD, stats.loss_R, *gradients, *factors)
        return loss, stats

    @torch.no_grad()
    def _forward_backward(
        self, hidden_RD: Tensor, head: VocabHead
    ) -> tuple[HeadStats, Tensor, Tensor]:
        """Return diagnostics and the gradients of both arguments.

        They start from the gradient with respect to the logits after division by the temperature,
        so they lack the factors of scale and temperature. Under tensor parallelism each rank has
        one summand of the hidden states' gradient; the backward of `gather_tokens` sums them.
        """
        rule = self.rule
        # All models' logits, and the objective's own tensors.
        tensors = 1 + len(self.frozen.by_role) + rule.objective.temporaries(rule.settings)
        chunks = _chunks(self.targets_R.numel(), head, rule.dist, tensors)
        projections, buffer = self._projections(head, chunks), _buffer(head, chunks)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_vD = torch.zeros_like(head.weight_vD, dtype=torch.float32)
        columns: list[dict[str, Tensor | None]] = []
        probes: list[dict[str, Tensor]] = []
        for chunk, some_N in zip(chunks, self._probed(chunks, hidden_RD.device), strict=True):
            rows = self._rows(chunk, hidden_RD, projections, buffer)
            # Once also without a row: ranks sum the probe's figures by name, so all must have them.
            if self.frozen.teacher is not None and (some_N.numel() or not probes):
                probes.append(_compare(rows, some_N))
            result, dlogits_Cv = self._differentiate(rows)
            torch.mm(dlogits_Cv, head.weight_vD, out=grad_hidden_RD[chunk])
            kernels.add_product_(grad_weight_vD, dlogits_Cv.t(), hidden_RD[chunk])
            columns.append(_token_stats(rows, result))
            del rows, result, dlogits_Cv  # before the next chunk's tensors are made
        found = _concat(columns)
        for role, watch in self.watches.items():
            watch.finish(found["logprob_R" if role == "student" else f"{role}_R"])
        seen = {role: watch.columns for role, watch in self.watches.items()}
        stats = HeadStats(**found, probe=_concat(probes), seen=seen)
        return stats, grad_hidden_RD, grad_weight_vD.to(head.weight_vD.dtype)

    def _projections(self, head: VocabHead, chunks: Sequence[slice]) -> dict[str, _Projection]:
        """Return the projection of each model, the student's first."""
        dist, watch = self.rule.dist, self.watches.get
        found = {"student": _Projection(head, dist, chunks, watch("student"))}
        for role, frozen in self.frozen.by_role.items():
            frozen = frozen.first(dist.vocab_size)
            found[role] = _Projection(frozen, dist.untruncated, chunks, watch(role))
        return found

    def _probed(self, chunks: Sequence[slice], device: torch.device) -> Sequence[Tensor]:
        """Return the rows of each chunk that are probed, sent to the device in one copy."""
        first, has_teacher = self.probe_from, self.frozen.teacher is not None
        some = [probed(first + c.start, first + c.stop if has_teacher else 0) for c in chunks]
        return torch.cat(some).to(device).split([len(part) for part in some])

    def _rows(
        self,
        chunk: slice,
        hidden_RD: Tensor,
        projections: Mapping[str, _Projection],
        buffer: Buffer,
    ) -> Rows:
        """Project all models' hidden states of a chunk, and compute the statistics."""
        head = projections["student"].head
        targets_C, scores = self.targets_R[chunk], self.scores[chunk]
        hidden = {
            "student": hidden_RD[chunk],
            "teacher": scores.teacher_hidden,
            "reference": scores.reference_hidden,
        }
        logits = {
            role: project(hidden[role], targets_C, chunk) for role, project in projections.items()
        }
        column_C = _columns(targets_C, head)
        models, entropy_C = _statistics(logits, column_C, head)
        student = models.pop("student")
        student.truncated = self.rule.dist.truncates
        return Rows(
            logprob_C=student.logprob_C,
            scores=replace(scores, **{role: model.logprob_C for role, model in models.items()}),
            student=student,
            **models,
            entropy_C=entropy_C,
            head=head,
            column_C=column_C,
            dtype=hidden_RD.dtype,
            buffer=buffer,
        )

    def _differentiate(self, rows: Rows) -> tuple[TokenLoss, Tensor]:
        """Return the objective's results, and its gradient by the logits [C, v]."""
        with torch.enable_grad():
            rows.logprob_C.requires_grad_()
            result = self.rule.objective(rows, self.rule.settings)
            if result.dlogits_Cv is not None:
                return result, result.dlogits_Cv.to(rows.dtype)
            (g_C,) = torch.autograd.grad(result.loss_C.sum(), rows.logprob_C)
        return result, rows.logprob_gradient(g_C)


class _Sum(torch.autograd.Function):
    """Sum the loss of each token. The gradients are known already, up to a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_vD: Tensor,
        loss_R: Tensor,
        grad_hidden_RD: Tensor,
        grad_weight_vD: Tensor,
        scale: float,
        grad_factor: float,
    ) -> Tensor:
        ctx.grad_factor = grad_factor
        ctx.save_for_backward(grad_hidden_RD, grad_weight_vD)
        return loss_R.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because the weight's gradient is large. There is one backward.
        grad_hidden_RD, grad_weight_vD = ctx.saved_tensors
        factor = grad_loss * ctx.grad_factor
        return grad_hidden_RD.mul_(factor), grad_weight_vD.mul_(factor), *[None] * 5


def _statistics(
    logits: Mapping[str, Tensor], column_C: Tensor, head: VocabHead
) -> tuple[dict[str, ModelLogits], Tensor]:
    """Return each model's logits with statistics, by role, and the student's entropy [C].

    This takes one pass over the logits, and one exchange between the ranks for all models.

    Args:
        logits: by role; the student's come first.
    """
    student_Cv, *others = logits.values()
    if others:
        pairs = [kernels.kl_stats(student_Cv, other_Cv, column_C) for other_Cv in others]
        own = torch.cat((pairs[0][:3], *(pair[3:] for pair in pairs)))
    else:
        own = kernels.logit_stats(student_Cv, column_C, mean=True)
    target_PMC, lse_PMC, mean_PMC = head.stack(own).unflatten(1, (-1, 3)).unbind(dim=2)
    lse_MC = lse_PMC.logsumexp(dim=0)
    logprob_MC = target_PMC.amax(dim=0) - lse_MC
    # A rank's means are taken under its own part of the student's distribution.
    share_P1C = (lse_PMC[:, :1] - lse_MC[:1]).exp()
    mean_MC = (share_P1C * mean_PMC).sum(dim=0)
    models = {
        role: ModelLogits(logits_Cv, lse_C, logprob_C)
        for (role, logits_Cv), lse_C, logprob_C in zip(
            logits.items(), lse_MC, logprob_MC, strict=True
        )
    }
    # The means are of differences of logits; differences of log-probs are off by a constant.
    for other, mean_C in zip(list(models.values())[1:], mean_MC[1:], strict=True):
        other.kl_C = mean_C - lse_MC[0] + other.lse_C
    return models, lse_MC[0] - mean_MC[0]


def _token_stats(rows: Rows, result: TokenLoss) -> dict[str, Tensor | None]:
    """Return the columns of `HeadStats` for a chunk."""
    return {
        "logprob_R": rows.logprob_C.detach(),
        "entropy_R": rows.entropy_C,
        "loss_R": result.loss_C.detach(),
        "advantage_R": result.advantage_C,
        "ratio_R": result.ratio_C,
        "clipped_R": result.clipped_C,
        "teacher_R": None if rows.teacher is None else rows.teacher.logprob_C,
        "reference_R": None if rows.reference is None else rows.reference.logprob_C,
    }


def _concat(chunks: Sequence[Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    """Concatenate the chunks' tensors by name; skip None."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for chunk in chunks:
        for name, value_C in chunk.items():
            if value_C is not None:
                parts[name].append(value_C)
    return {name: torch.cat(values) for name, values in parts.items()}


# ------------------------------------------------------------------------------ the probe


def probed(start: int, stop: int) -> Tensor:
    """Return which places from `start` to `stop` are probed, counted from `start`.

    One in `PROBE_EVERY` is chosen by Fibonacci hashing. A fixed stride would always choose the same
    positions of responses that have the same length.
    """
    places = range(start, stop)
    # Not with `nonzero`, because the planner's tensors have no data.
    chosen = [n - start for n in places if n * _GOLDEN % 2**32 < 2**32 // PROBE_EVERY]
    return torch.tensor(chosen, dtype=torch.int64)


def _compare(rows: Rows, some_N: Tensor) -> dict[str, Tensor]:
    """Return comparisons of student and teacher at some rows of a chunk, by name, [N] each."""
    student_Nv, teacher_Nv = (m.copy_logprobs(some_N) for m in (rows.student, rows.teacher))
    probs_Nv, teacher_probs_Nv = student_Nv.exp(), teacher_Nv.exp()
    log_s_N, log_t_N, teacher_log_t_N, teacher_log_s_N = rows.expect_each(
        (probs_Nv, student_Nv),
        (probs_Nv, teacher_Nv),
        (teacher_probs_Nv, teacher_Nv),
        (teacher_probs_Nv, student_Nv),
    )
    student_NK, teacher_NK = (rows.top_k(x, PROBE_TOP_K) for x in (student_Nv, teacher_Nv))
    shared_NK = (student_NK[:, :, None] == teacher_NK[:, None, :]).any(dim=2)
    return {
        "kl/reverse": log_s_N - log_t_N,
        "kl/forward": teacher_log_t_N - teacher_log_s_N,
        "policy/teacher_entropy": -teacher_log_t_N,
        "policy/top_k_overlap": shared_NK.float().mean(dim=1),
        "policy/top_1_agreement": (student_NK[:, 0] == teacher_NK[:, 0]).float(),
    }
