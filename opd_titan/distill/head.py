"""The vocabulary head in chunks: log-probs and the loss, forward and backward in one pass.

No tensor of [tokens, vocabulary] ever exists beyond one chunk, and only positions that predict a
response token are projected. Whole distributions of frozen models are kept as hidden states and
projected next to the student's.

Under tensor parallelism each rank projects onto its part of the vocabulary; the ranks exchange a
few numbers per token, never logits (except where top-k or top-p have to see them all).

Shapes: T packed tokens, R response tokens, C response tokens of a chunk, D model width, E a frozen
model's, v the part of the vocabulary that this rank holds (all of it without tensor parallelism),
P tensor-parallel ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from opd_titan.distill.inspection import Columns, Inspector
from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenLoss
from opd_titan.distill.vocabulary import ModelLogits, Rows, TokenScores
from opd_titan.models import kernels
from opd_titan.models.kernels.device import device_of
from opd_titan.models.logits import (
    Distribution,
    VocabHead,
    projects_in_place,
    scaled_logits,
    truncated_logits,
)

# fp32 logits of one chunk. On a CPU larger chunks reach the same matmul speed and only cost memory.
# A GPU rereads the head's fp32 gradient for each chunk, so it wants many rows (by arithmetic: at
# 64 MiB that traffic would be three times the products' own time).
CHUNK_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}
# Diagnostics that need extra passes over the vocabulary use one in PROBE_EVERY tokens.
PROBE_EVERY = 8
_GOLDEN = 2654435769  # 2**32 over the golden ratio
PROBE_TOP_K = 16


def _chunks(n: int, head: VocabHead, dist: Distribution, tensors: int = 2) -> list[slice]:
    """Return slices such that one tensor [C, v] takes at most CHUNK_BYTES, and `tensors` of them
    at most three times that (the probe's copies of some rows not included)."""
    # Truncation sees the whole vocabulary, sorted: seven such tensors at its peak.
    width = 8 * head.vocab_size if dist.truncates else head.rows
    chunk_bytes = CHUNK_BYTES[device_of(head.weight_vD).type] * 3 // max(3, tensors)
    rows = max(1, chunk_bytes // (4 * width))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


class _Projection:
    """Project one model's hidden states in chunks, into one buffer for all chunks.

    Args:
        watch: looks at the logits of some rows before they are truncated.
    """

    def __init__(
        self,
        head: VocabHead,
        dist: Distribution,
        chunks: Sequence[slice],
        watch: Inspector | None = None,
    ) -> None:
        self.head, self.dist, self.monitor = head, dist, watch
        self.buffer = _Buffer(head, chunks) if projects_in_place(head.weight_vD) else None

    def __call__(self, h_CD: Tensor, targets_C: Tensor, chunk: slice) -> Tensor:
        out_Cv = None if self.buffer is None else self.buffer.first(h_CD.shape[0])
        logits_Cv = scaled_logits(h_CD, self.head, self.dist, out_Cv)
        if self.monitor is not None:
            self.monitor.look(chunk, logits_Cv, targets_C, self.head)
        return truncated_logits(logits_Cv, self.head, self.dist, targets_C)


class _Buffer:
    """fp32 [C, v] that holds any of the chunks; made when it is used for the first time."""

    def __init__(self, head: VocabHead, chunks: Sequence[slice]) -> None:
        self.head, self.chunks = head, chunks

    @functools.cached_property
    def _whole(self) -> Tensor:
        rows = max(c.stop - c.start for c in self.chunks)
        return torch.empty(rows, self.head.rows, device=self.head.weight_vD.device)

    def first(self, rows: int) -> Tensor:
        return self._whole[:rows]


@torch.no_grad()
def score_head(
    hidden_TD: Tensor,
    weight: Tensor,
    predict_R: Tensor,
    targets_R: Tensor,
    dist: Distribution,
    watch: Inspector | None = None,
) -> Tensor:
    """Log-probs [R] fp32 of the targets, without gradients. Give it to the model's forward.

    Args:
        weight: of the head [V, D], as the model's forward has it.
        predict_R: for each target, the packed position whose hidden state predicts it.
        targets_R: token ids.
        watch: notes where some of the targets stand.
    """
    head = VocabHead.of(weight).first(dist.vocab_size)
    out_R = torch.empty(targets_R.numel(), device=hidden_TD.device)
    chunks = _chunks(targets_R.numel(), head, dist)
    project = _Projection(head, dist, chunks, watch)
    for chunk in chunks:
        targets_C = targets_R[chunk]
        logits_Cv = project(hidden_TD[predict_R[chunk]], targets_C, chunk)
        own_2C = kernels.logit_stats(logits_Cv, _row(targets_C, head), mean=False)
        target_PC, lse_PC = head.stack(own_2C).unbind(dim=1)
        out_R[chunk] = target_PC.amax(dim=0) - lse_PC.logsumexp(dim=0)
    if watch is not None:
        watch.finish(out_R)
    return out_R


def hidden_head(hidden_TD: Tensor, weight: Tensor, predict_R: Tensor) -> Tensor:
    """The hidden states [R, D] that predict the targets, for a later pass over the vocabulary."""
    return hidden_TD.index_select(0, predict_R)


def _row(targets_C: Tensor, head: VocabHead) -> Tensor:
    """Return the row of each target among this rank's, -1 where it has none."""
    row_C, held_C = head.locate(targets_C)
    return row_C.masked_fill(~held_C, -1)


def _distributions(
    logits: Mapping[str, Tensor], targets_C: Tensor, head: VocabHead
) -> tuple[dict[str, Tensor], dict[str, ModelLogits], Tensor]:
    """Return by role the targets' log-probs [C] and distributions, and the student's entropy [C].

    One pass over the logits, and one exchange between the ranks, whatever the number of models.

    Args:
        logits: the student's comes first.
    """
    row_C = _row(targets_C, head)
    student_Cv, *others = logits.values()
    if others:
        pairs = [kernels.kl_stats(student_Cv, other_Cv, row_C) for other_Cv in others]
        own = torch.cat((pairs[0][:3], *(pair[3:] for pair in pairs)))
    else:
        own = kernels.logit_stats(student_Cv, row_C, mean=True)
    target_PMC, lse_PMC, mean_PMC = head.stack(own).unflatten(1, (-1, 3)).unbind(dim=2)
    lse_MC = lse_PMC.logsumexp(dim=0)
    # A rank's means are under its own part of the student's distribution.
    share_P1C = (lse_PMC[:, :1] - lse_MC[:1]).exp()
    mean_MC = (share_P1C * mean_PMC).sum(dim=0)
    logprob_MC = target_PMC.amax(dim=0) - lse_MC
    models = {
        role: ModelLogits(values_Cv, lse_C)
        for (role, values_Cv), lse_C in zip(logits.items(), lse_MC, strict=True)
    }
    for other, mean_C in zip(list(models.values())[1:], mean_MC[1:], strict=True):
        # Of differences of logits; those of log-probs differ by a constant.
        other.kl_C = mean_C - lse_MC[0] + other.lse_C
    return dict(zip(logits, logprob_MC, strict=True)), models, lse_MC[0] - mean_MC[0]


@dataclass
class HeadStats:
    """Diagnostics of an update, detached.

    Attributes:
        logprob_R, entropy_R, loss_R, advantage_R: of every token.
        ratio_R, clipped_R: where the objective has them.
        teacher_R, reference_R: log-probs, where they were found only here.
        probe: by name, values of the tokens that `probed` chooses; where the teacher's whole
            distribution is there.
        seen: by role, what watches found.
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
class FrozenHeads:
    """Heads of the models that are kept as hidden states, gathered while updates last."""

    teacher: VocabHead | None = None
    reference: VocabHead | None = None

    @property
    def by_role(self) -> dict[str, VocabHead]:
        """Those that are there."""
        heads = {"teacher": self.teacher, "reference": self.reference}
        return {role: head for role, head in heads.items() if head is not None}


NONE_FROZEN = FrozenHeads()


def probed(start: int, stop: int) -> Tensor:
    """Return the places from `start` to `stop` that are probed, counted from `start`.

    One in `PROBE_EVERY` is chosen by Fibonacci hashing. A plain stride would always choose the same
    positions of responses that all have the same length.
    """
    places = range(start, stop)
    # Not by `nonzero`: the planner's tensors have shapes and no data.
    chosen = [n - start for n in places if n * _GOLDEN % 2**32 < 2**32 // PROBE_EVERY]
    return torch.tensor(chosen, dtype=torch.int64)


def loss_head(
    hidden_TD: Tensor,
    weight: Tensor,
    *,
    predict_R: Tensor,
    targets_R: Tensor,
    scores: TokenScores,
    scale: float,
    objective: Objective,
    settings: ObjectiveSettings,
    dist: Distribution,
    frozen: FrozenHeads = NONE_FROZEN,
    probe_from: int = 0,
    watches: Mapping[str, Inspector] = MappingProxyType({}),
) -> tuple[Tensor, HeadStats]:
    """The objective summed over response tokens, times `scale`, with its diagnostics.

    `scale` is one over the *global* number of response tokens of the update, so that adding up
    micro-batches and ranks gives the mean over tokens and never a mean of means.

    `probe_from` differs between micro-batches, so that different positions of the responses are
    probed.

    `watches` record the ranks of some of the targets under the "student" and the frozen models.
    """
    head = VocabHead.of(weight).first(dist.vocab_size)
    chunked = _ChunkedLoss(
        head.tp, targets_R, scores, scale, objective, settings, dist, frozen, probe_from, watches
    )
    loss = _FusedLoss.apply(hidden_TD.index_select(0, predict_R), head.weight_vD, chunked)
    return loss, chunked.stats()


class _FusedLoss(torch.autograd.Function):
    """A loss that computes the gradients of both arguments in its forward.

    Under tensor parallelism each rank has one summand of the hidden states' gradient; the backward
    of `gather_tokens` adds them.
    """

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_vD: Tensor, chunked: _ChunkedLoss) -> Tensor:
        loss, ctx.factor, grad_hidden_RD, grad_weight_vD = chunked(hidden_RD, weight_vD.detach())
        ctx.save_for_backward(grad_hidden_RD, grad_weight_vD.to(weight_vD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        # In place: these are as large as the head, and serve one backward.
        grad_hidden_RD, grad_weight_vD = ctx.saved_tensors
        factor = grad_loss * ctx.factor
        return grad_hidden_RD.mul_(factor), grad_weight_vD.mul_(factor), None


class _ChunkedLoss:
    """Loss and gradients of each chunk while its logits are there."""

    def __init__(
        self,
        tp: Any,
        targets_R: Tensor,
        scores: TokenScores,
        scale: float,
        objective: Objective,
        settings: ObjectiveSettings,
        dist: Distribution,
        frozen: FrozenHeads,
        probe_from: int,
        watches: Mapping[str, Inspector],
    ) -> None:
        self.probe_from, self.watches = probe_from, watches
        self.tp, self.targets_R, self.scores, self.scale = tp, targets_R, scores, scale
        self.objective, self.settings, self.dist = objective, settings, dist
        self.frozen = {role: head.first(dist.vocab_size) for role, head in frozen.by_role.items()}
        self.columns: dict[str, list[Tensor]] = {}
        self.probe: dict[str, list[Tensor]] = {}

    def __call__(
        self, hidden_RD: Tensor, weight_vD: Tensor
    ) -> tuple[Tensor, float, Tensor, Tensor]:
        """The loss, the factor that both gradients still need, and the gradients."""
        head = VocabHead(weight_vD, self.tp)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=torch.float32)
        # Everybody's logits, and the objective's own.
        tensors = 1 + len(self.frozen) + self.objective.temporaries(self.settings)
        chunks = _chunks(self.targets_R.numel(), head, self.dist, tensors)
        project = {"student": _Projection(head, self.dist, chunks, self.watches.get("student"))}
        for role, frozen in self.frozen.items():
            watch = self.watches.get(role)
            project[role] = _Projection(frozen, self.dist.untruncated, chunks, watch)
        probs = _Buffer(head, chunks)
        for chunk, some in zip(chunks, self._probed(chunks, hidden_RD.device), strict=True):
            rows = self._rows(hidden_RD, chunk, project, head, probs)
            if some.numel():
                self._examine(rows[some])
            result, dlogits_Cv = self._differentiate(rows, chunk, head)
            torch.mm(dlogits_Cv, head.weight_vD, out=grad_hidden_RD[chunk])
            kernels.add_product_(grad_weight_vD, dlogits_Cv.t(), hidden_RD[chunk])
            self._keep(
                logprob_R=rows.logprob_C,
                entropy_R=rows.entropy_C,
                loss_R=result.loss_C,
                advantage_R=result.advantage_C,
                ratio_R=result.ratio_C,
                clipped_R=result.clipped_C,
                teacher_R=rows.scores.teacher if "teacher" in self.frozen else None,
                reference_R=rows.scores.reference if "reference" in self.frozen else None,
            )
            del rows, result, dlogits_Cv  # or they would live on beside the next chunk's
        loss = torch.cat(self.columns["loss_R"]).sum() * self.scale
        return loss, self.scale / self.dist.temperature, grad_hidden_RD, grad_weight_vD

    def _rows(
        self,
        hidden_RD: Tensor,
        chunk: slice,
        project: Mapping[str, _Projection],
        head: VocabHead,
        probs: _Buffer,
    ) -> Rows:
        targets_C, scores = self.targets_R[chunk], self.scores[chunk]
        logits = {"student": project["student"](hidden_RD[chunk], targets_C, chunk)}
        for role in self.frozen:
            hidden_CE = getattr(scores, f"{role}_hidden")
            logits[role] = project[role](hidden_CE, targets_C, chunk)
        logprobs, models, entropy_C = _distributions(logits, targets_C, head)
        models["student"].truncated = self.dist.truncates
        return Rows(
            logprob_C=logprobs.pop("student"),
            scores=replace(scores, **logprobs),
            **models,
            entropy_C=entropy_C,
            tp=self.tp,
            dtype=hidden_RD.dtype,
            probs_out=lambda: probs.first(targets_C.numel()),
        )

    def _differentiate(self, rows: Rows, chunk: slice, head: VocabHead) -> tuple[TokenLoss, Tensor]:
        """The objective's results, and its derivative by the logits [C, v] at temperature 1."""
        with torch.enable_grad():
            rows.logprob_C.requires_grad_()
            result = self.objective(rows, self.settings)
            if result.dlogits_Cv is not None:
                return result, result.dlogits_Cv.to(rows.dtype)
            (g_C,) = torch.autograd.grad(result.loss_C.sum(), rows.logprob_C)
        row_C = _row(self.targets_R[chunk], head)
        student = rows.student
        return result, kernels.softmax_grad(
            student.values_Cv, student.lse_C, g_C, row_C, rows.dtype
        )

    def _probed(self, chunks: Sequence[slice], device: torch.device) -> Sequence[Tensor]:
        """Return the rows of each chunk to examine, brought to the device in one copy."""
        first, there = self.probe_from, "teacher" in self.frozen
        some = [probed(first + c.start, first + c.stop if there else 0) for c in chunks]
        return torch.cat(some).to(device).split([len(part) for part in some])

    def _examine(self, rows: Rows) -> None:
        """Compare the distributions of student and teacher at some tokens."""
        student_Cv, teacher_Cv, probs_Cv = rows.student_Cv, rows.teacher_Cv, rows.probs_Cv
        teacher_probs_Cv = teacher_Cv.exp()
        log_s_C, log_t_C, teacher_log_t_C, teacher_log_s_C = rows.expect_each(
            (probs_Cv, student_Cv),
            (probs_Cv, teacher_Cv),
            (teacher_probs_Cv, teacher_Cv),
            (teacher_probs_Cv, student_Cv),
        )
        student_CK, teacher_CK = (rows.top_k(x, PROBE_TOP_K) for x in (student_Cv, teacher_Cv))
        shared_CK = (student_CK[:, :, None] == teacher_CK[:, None, :]).any(dim=2)
        values = {
            "kl/reverse": log_s_C - log_t_C,
            "kl/forward": teacher_log_t_C - teacher_log_s_C,
            "policy/teacher_entropy": -teacher_log_t_C,
            "policy/top_k_overlap": shared_CK.float().mean(dim=1),
            "policy/top_1_agreement": (student_CK[:, 0] == teacher_CK[:, 0]).float(),
        }
        for name, value_C in values.items():
            self.probe.setdefault(name, []).append(value_C)

    def _keep(self, **columns: Tensor | None) -> None:
        for name, value_C in columns.items():
            if value_C is not None:
                self.columns.setdefault(name, []).append(value_C.detach())

    def stats(self) -> HeadStats:
        columns = {name: torch.cat(parts) for name, parts in self.columns.items()}
        probe = {name: torch.cat(parts) for name, parts in self.probe.items()}
        for role, watch in self.watches.items():
            watch.finish(columns["logprob_R" if role == "student" else f"{role}_R"])
        seen = {role: watch.columns for role, watch in self.watches.items()}
        return HeadStats(**columns, probe=probe, seen=seen)
