"""The loss of each response token: functions of tensors that the head calls for each chunk.

An objective is a function of `Rows` and settings with the decorator `objective`, and a row of the
table at the end. Objectives of the sampled token return a loss with a gradient with respect to
`rows.logprob_C`; objectives over the vocabulary return the gradient with respect to the logits.
`docs/objectives.md` derives each.

Shapes: C response tokens of a chunk, v a rank's part of the vocabulary, K tokens of a support, B =
K + 1 buckets. Log-probs are fp32, natural, at the sampling temperature.

S (p) is the student, T (q) the teacher, R the reference, c its coefficient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_titan.config.job_config import Distill, Reference
from opd_titan.distill.vocabulary import MaybeTensor, Rows


@dataclass(frozen=True)
class ObjectiveSettings:
    """The numbers of `[distill]` and `[reference]` that the objectives use.

    Attributes:
        true_ratio: the student has moved since the rollout (several updates per rollout), so that
            ratios are taken against the rollout's log-probs. Otherwise the old value *is* the
            current one, detached, and every ratio is 1.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    reference_coef: float = 0.0
    log_ratio_clamp: float = 0.0
    reward_power: float = 0.0
    baseline: str = "none"
    beta: float = 0.5
    top_k: int = 16
    true_ratio: bool = False

    @classmethod
    def of(cls, d: Distill, reference: Reference) -> ObjectiveSettings:
        return cls(
            clip_low=d.clip_low,
            clip_high=d.clip_high,
            reference_coef=reference.coef,
            log_ratio_clamp=d.log_ratio_clamp,
            reward_power=d.reward_power,
            baseline=d.baseline,
            beta=d.beta,
            top_k=d.top_k,
            true_ratio=d.minibatches > 1,
        )


@dataclass
class TokenLoss:
    """Per-token results. All but `loss_C` are detached; None where the objective has no such thing.

    Attributes:
        dlogits_Cv: derivative of the loss by this rank's logits, at temperature 1. None: the loss
            depends on them through `rows.logprob_C` alone, and carries that gradient.
    """

    loss_C: Tensor
    advantage_C: Tensor
    ratio_C: Tensor | None = None
    clipped_C: Tensor | None = None
    dlogits_Cv: Tensor | None = None


class Objective:
    """A function of `Rows` and settings, and the tensors that it needs.

    Args:
        whole: it compares whole distributions, not only log-probs of the sampled token.
        temporaries: tensors as large as the logits that it makes, `rows.probs_Cv` among them.
    """

    def __init__(
        self,
        loss: Callable[[Rows, ObjectiveSettings], TokenLoss],
        whole: bool = True,
        temporaries: int = 0,
    ) -> None:
        functools.update_wrapper(self, loss)
        self.loss, self.whole, self._temporaries = loss, whole, temporaries

    def __call__(self, rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
        return self.loss(rows, settings)

    def needs_vocabulary(self, settings: ObjectiveSettings) -> bool:
        """Whether the frozen models' whole distributions are needed."""
        return self.whole or settings.baseline != "none"

    def temporaries(self, settings: ObjectiveSettings) -> int:
        return self._temporaries if settings.baseline == "none" else 3


def objective(**needs: Any) -> Callable[[Callable[..., TokenLoss]], Objective]:
    """Mark a function as an `Objective`; see there."""
    return functools.partial(Objective, **needs)


# ------------------------------------------------------------ the sampled token


def penalty(
    student: Tensor, teacher: Tensor, reference: MaybeTensor, settings: ObjectiveSettings
) -> Tensor:
    """(log S - log T) + c (log S - log R), elementwise; its mean under S is KL(S||T) + c KL(S||R).

    `log_ratio_clamp` bounds each difference; `reward_power` a > 0 puts S^a - T^a in [-1, 1] in
    their place (PowerOPD, arXiv 2606.17199).
    """
    power, limit = settings.reward_power, settings.log_ratio_clamp or math.inf
    others = [(1.0, teacher)]
    if settings.reference_coef != 0.0:
        others.append((settings.reference_coef, reference))
    # One tensor of this size at a time beside the sum: it may be over the vocabulary.
    total = torch.zeros_like(student)
    for weight, other in others:
        if power > 0.0:
            total.add_((power * student).exp_(), alpha=weight)
            total.sub_((power * other).exp_(), alpha=weight)
        else:
            total.add_((student - other).clamp_(-limit, limit), alpha=weight)
    return total


def advantages(student_C: Tensor, rows: Rows, settings: ObjectiveSettings) -> Tensor:
    """A = -penalty of the sampled token + baseline [C], detached.

    Args:
        student_C: log S at the time of sampling.
    """
    scores = rows.scores
    advantage_C = -penalty(student_C.detach(), scores.teacher, scores.reference, settings)
    if settings.baseline == "none":
        return advantage_C
    return advantage_C + expected_penalty(rows, settings)


def expected_penalty(rows: Rows, settings: ObjectiveSettings) -> Tensor:
    """The penalty's mean [C] over the student's next token: what `baseline` adds to A.

    It does not depend on which token was sampled, so it leaves the mean of the gradient alone; it
    takes away the part of the variance that the distance as such makes (vOPD, arXiv 2605.07865).
    "top_k" sums over the student's k likeliest tokens and one bucket for the rest.
    """
    if settings.baseline == "kl":
        values_Cv = penalty(rows.student_Cv, rows.teacher_Cv, rows.reference_Cv, settings)
        return rows.expect(rows.probs_Cv, values_Cv)
    ids_CK = rows.top_k(rows.student_Cv, settings.top_k)
    student_CB, teacher_CB, reference_CB = _bucketed(rows, ids_CK, settings)
    values_CB = penalty(student_CB, teacher_CB, reference_CB, settings)
    values_CB = values_CB.masked_fill(student_CB == -torch.inf, 0.0)  # no tokens in it
    return (student_CB.exp() * values_CB).sum(dim=1)


@objective(whole=False)
def policy_gradient(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = S / S_old (PPO, arXiv 1707.06347)."""
    old_C = rows.scores.rollout if settings.true_ratio else rows.logprob_C.detach()
    advantage_C = advantages(old_C, rows, settings)
    ratio_C = (rows.logprob_C - old_C).exp()
    clipped_ratio_C = ratio_C.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    unclipped_C, clipped_C = ratio_C * advantage_C, clipped_ratio_C * advantage_C
    is_clipped_C = (clipped_C < unclipped_C).detach()
    return TokenLoss(
        loss_C=-torch.where(is_clipped_C, clipped_C, unclipped_C),
        advantage_C=advantage_C,
        ratio_C=ratio_C.detach(),
        clipped_C=is_clipped_C,
    )


@objective(whole=False)
def sft(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """-log S: cross-entropy on the responses of the data set."""
    return TokenLoss(-rows.logprob_C, torch.ones_like(rows.logprob_C))


# ------------------------------------------------------------ the whole vocabulary


@objective()
def reverse_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """KL(S||T) + c KL(S||R). The head finds a KL together with the log-probs."""
    return _with_reference(rows, settings, rows.teacher.kl_C, rows.kl_gradient(rows.teacher))


@objective(temporaries=2)
def forward_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """KL(T||S) + c KL(S||R). Sum q (log q - log p), and by a logit p - q."""
    teacher_probs_Cv = rows.teacher_Cv.exp()
    loss_C = rows.expect(teacher_probs_Cv, rows.teacher.take_logprobs().sub_(rows.student_Cv))
    dlogits_Cv = torch.sub(rows.probs_Cv, teacher_probs_Cv, out=teacher_probs_Cv)
    return _with_reference(rows, settings, loss_C, dlogits_Cv)


@objective(temporaries=3)
def jsd(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """beta KL(T||M) + (1 - beta) KL(S||M) with M = beta T + (1 - beta) S, plus c KL(S||R).

    By a logit: (1 - beta) p (x - sum p x), x = log p - log m. beta 0 and 1, where this is 0, stand
    for its limits after division by beta and by 1 - beta: the forward and the reverse KL
    (generalised JSD, arXiv 2306.13649).
    """
    beta = settings.beta
    if beta == 0.0:
        return forward_kl(rows, settings)
    if beta == 1.0:
        return reverse_kl(rows, settings)
    weighted_Cv = rows.student_Cv + (math.log1p(-beta) - math.log(beta))
    mixture_Cv = torch.logaddexp(rows.teacher_Cv, weighted_Cv, out=weighted_Cv).add_(math.log(beta))
    teacher_probs_Cv = rows.teacher_Cv.exp()
    teacher_x_Cv = rows.teacher.take_logprobs().sub_(mixture_Cv)
    student_x_Cv = torch.sub(rows.student_Cv, mixture_Cv, out=mixture_Cv)
    from_teacher_C, from_student_C = rows.expect_each(
        (teacher_probs_Cv, teacher_x_Cv), (rows.probs_Cv, student_x_Cv)
    )
    loss_C = beta * from_teacher_C + (1.0 - beta) * from_student_C
    dlogits_Cv = _gradient_of_mean_(rows, student_x_Cv, from_student_C).mul_(1.0 - beta)
    return _with_reference(rows, settings, loss_C, dlogits_Cv)


def _gradient_of_mean_(rows: Rows, x_Cv: Tensor, mean_C: Tensor) -> Tensor:
    """p (x - mean), in place of x: what the logits get of a mean of x under the student."""
    return x_Cv.sub_(mean_C[:, None]).mul_(rows.probs_Cv)


def _with_reference(
    rows: Rows, settings: ObjectiveSettings, loss_C: Tensor, dlogits_Cv: Tensor
) -> TokenLoss:
    c = settings.reference_coef
    if c != 0.0:
        loss_C = loss_C + c * rows.reference.kl_C
        dlogits_Cv.add_(rows.kl_gradient(rows.reference), alpha=c)
    return _with_advantage(rows, settings, loss_C, dlogits_Cv)


def _with_advantage(
    rows: Rows, settings: ObjectiveSettings, loss_C: Tensor, dlogits_Cv: Tensor
) -> TokenLoss:
    """Add the advantage of a policy gradient at the current weights, for written rollouts."""
    scores = rows.scores
    penalty_C = penalty(rows.logprob_C.detach(), scores.teacher, scores.reference, settings)
    return TokenLoss(loss_C, -penalty_C, dlogits_Cv=dlogits_Cv)


# ------------------------------------------------------------ k tokens and the rest


@objective(temporaries=3)
def top_k_reverse_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """`reverse_kl` between the student's k likeliest tokens, with all others as one bucket."""
    ids_CK = rows.top_k(rows.student_Cv, settings.top_k)
    student_CB, teacher_CB, reference_CB = _bucketed(rows, ids_CK, settings)
    x_CB = _log_ratio(student_CB, teacher_CB)
    if settings.reference_coef != 0.0:
        x_CB += settings.reference_coef * _log_ratio(student_CB, reference_CB)
    probs_CB = student_CB.exp()
    loss_C = (probs_CB * x_CB).sum(dim=1)
    dlogits_CB = probs_CB * (x_CB - loss_C[:, None])
    dlogits_Cv = rows.spread(dlogits_CB, student_CB[:, -1], ids_CK)
    return _with_advantage(rows, settings, loss_C, dlogits_Cv)


@objective(temporaries=3)
def top_k_forward_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """`forward_kl` between the teacher's k likeliest tokens, with all others as one bucket."""
    ids_CK = rows.top_k(rows.teacher_Cv, settings.top_k)
    student_CB, teacher_CB, reference_CB = _bucketed(rows, ids_CK, settings)
    x_CB = _log_ratio(teacher_CB, student_CB)
    probs_CB, teacher_probs_CB = student_CB.exp(), teacher_CB.exp()
    loss_C = (teacher_probs_CB * x_CB).sum(dim=1)
    dlogits_CB = probs_CB - teacher_probs_CB
    c = settings.reference_coef
    if c != 0.0:
        ratio_CB = _log_ratio(student_CB, reference_CB)
        kl_C = (probs_CB * ratio_CB).sum(dim=1)
        loss_C = loss_C + c * kl_C
        dlogits_CB += c * probs_CB * (ratio_CB - kl_C[:, None])
    dlogits_Cv = rows.spread(dlogits_CB, student_CB[:, -1], ids_CK)
    return _with_advantage(rows, settings, loss_C, dlogits_Cv)


def _bucketed(
    rows: Rows, ids_CK: Tensor, settings: ObjectiveSettings
) -> tuple[Tensor, Tensor, MaybeTensor]:
    """Log-probs [C, B] of student, teacher and, where it counts, reference."""
    others = [] if settings.reference_coef == 0.0 else [rows.reference_Cv]
    found = rows.buckets(ids_CK, rows.student_Cv, rows.teacher_Cv, *others)
    student_CB, teacher_CB, *reference_CB = found
    return student_CB, teacher_CB, next(iter(reference_CB), None)


def _log_ratio(a_CB: Tensor, b_CB: Tensor) -> Tensor:
    """log a - log b, 0 for a bucket that has no tokens."""
    return (a_CB - b_CB).masked_fill_(a_CB == -torch.inf, 0.0)


OBJECTIVES: dict[str, Objective] = {
    "policy_gradient": policy_gradient,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "top_k_reverse_kl": top_k_reverse_kl,
    "top_k_forward_kl": top_k_forward_kl,
    "sft": sft,
}
