"""The losses of response tokens, as functions that the head calls for each chunk.

An objective is a function of `Rows` and settings with the decorator `objective`, and an entry of
`OBJECTIVES`. An objective of the sampled token returns a loss that has a gradient with respect
to `rows.logprob_C`. An objective over the vocabulary returns the gradient with respect to the
logits. `docs/objectives.md` derives each of them.

Shapes: C response tokens of a chunk, v a rank's part of the vocabulary, K tokens of a support, B =
K + 1 buckets. Log-probs are fp32, natural, at the sampling temperature.

S (p) is the student, T (q) the teacher, R the reference, c the reference's coefficient.
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
        true_ratio: whether a rollout is used for several updates. Then ratios are relative to the
            rollout's log-probs. Otherwise the old log-probs are the current ones, detached, and
            every ratio is 1.
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
        """Return the settings of a configuration."""
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
    """Results of each token. All but `loss_C` are detached. None: the objective has no such result.

    Attributes:
        dlogits_Cv: gradient of the loss with respect to this rank's logits after division by the
            temperature. None if the loss depends on them only through `rows.logprob_C`; then
            `loss_C` has a gradient with respect to that.
    """

    loss_C: Tensor
    advantage_C: Tensor
    ratio_C: Tensor | None = None
    clipped_C: Tensor | None = None
    dlogits_Cv: Tensor | None = None


class Objective:
    """A function of `Rows` and settings, and the tensors that it needs.

    Args:
        whole: whether it compares whole distributions, not only log-probs of the sampled token.
        temporaries: how many tensors as large as the logits it makes, including `rows.probs_Cv`.
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
        """Return whether the frozen models' whole distributions are needed."""
        return self.whole or settings.baseline != "none"

    def temporaries(self, settings: ObjectiveSettings) -> int:
        """Return how many tensors as large as the logits it makes."""
        return self._temporaries if settings.baseline == "none" else 3


def objective(**needs: Any) -> Callable[[Callable[..., TokenLoss]], Objective]:
    """Return a decorator that makes a function an `Objective` with these arguments."""
    return functools.partial(Objective, **needs)


# ------------------------------------------------------------ the sampled token


def penalty(
    student: Tensor, teacher: Tensor, reference: MaybeTensor, settings: ObjectiveSettings
) -> Tensor:
    """Return (log S - log T) + c (log S - log R), elementwise.

    Its mean under S is KL(S||T) + c KL(S||R). `log_ratio_clamp` bounds each difference.
    `reward_power` a > 0 replaces log S - log T by S^a - T^a, which is in [-1, 1] (PowerOPD, arXiv
    2606.17199).
    """
    power, limit = settings.reward_power, settings.log_ratio_clamp or math.inf
    others = [(1.0, teacher)]
    if settings.reference_coef != 0.0:
        others.append((settings.reference_coef, reference))
    # One tensor at a time in addition to the sum, because they may be over the vocabulary.
    total = torch.zeros_like(student)
    for weight, other in others:
        if power > 0.0:
            total.add_((power * student).exp_(), alpha=weight)
            total.sub_((power * other).exp_(), alpha=weight)
        else:
            total.add_((student - other).clamp_(-limit, limit), alpha=weight)
    return total


def advantages(rows: Rows, settings: ObjectiveSettings) -> Tensor:
    """Return A = -penalty of the sampled token + baseline, [C], detached.

    log S in it is the present value, also after the student has moved. Then E[grad r A] under S_old
    is the gradient of the present penalty's mean under S.
    """
    scores = rows.scores
    advantage_C = -penalty(rows.logprob_C.detach(), scores.teacher, scores.reference, settings)
    if settings.baseline == "none":
        return advantage_C
    return advantage_C + expected_penalty(rows, settings)


def expected_penalty(rows: Rows, settings: ObjectiveSettings) -> Tensor:
    """Return the penalty's mean [C] over the student's next token, which `baseline` adds to A.

    It does not depend on the sampled token, so it does not change the mean of the gradient. It
    removes the part of the variance that comes from the size of the distance (vOPD, arXiv
    2605.07865). "top_k" sums over the student's k likeliest tokens and one bucket for the rest.
    """
    if settings.baseline == "kl":
        values_Cv = penalty(rows.student_Cv, rows.teacher_Cv, rows.reference_Cv, settings)
        return rows.expect(rows.probs_Cv, values_Cv)
    ids_CK = rows.top_k(rows.student_Cv, settings.top_k)
    student_CB, teacher_CB, reference_CB = _bucketed(rows, ids_CK, settings)
    values_CB = penalty(student_CB, teacher_CB, reference_CB, settings)
    values_CB = values_CB.masked_fill(student_CB == -torch.inf, 0.0)  # empty buckets
    return (student_CB.exp() * values_CB).sum(dim=1)


@objective(whole=False)
def policy_gradient(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = S / S_old (PPO, arXiv 1707.06347)."""
    old_C = rows.scores.rollout if settings.true_ratio else rows.logprob_C.detach()
    advantage_C = advantages(rows, settings)
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
    """KL(S||T) + c KL(S||R). The head computes the KL together with the log-probs."""
    return _with_reference(rows, settings, rows.teacher.kl_C, rows.kl_gradient(rows.teacher))


@objective(temporaries=2)
def forward_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """KL(T||S) + c KL(S||R): sum q (log q - log p), with the gradient p - q."""
    teacher_probs_Cv = rows.teacher_Cv.exp()
    loss_C = rows.expect(teacher_probs_Cv, rows.teacher.take_logprobs().sub_(rows.student_Cv))
    dlogits_Cv = torch.sub(rows.probs_Cv, teacher_probs_Cv, out=teacher_probs_Cv)
    return _with_reference(rows, settings, loss_C, dlogits_Cv)


@objective(temporaries=3)
def jsd(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """beta KL(T||M) + (1 - beta) KL(S||M) with M = beta T + (1 - beta) S, plus c KL(S||R).

    The gradient is (1 - beta) p (x - sum p x), x = log p - log m. At beta 0 and 1 this is 0. These
    values therefore select the limits of the loss divided by beta and by 1 - beta, which are the
    forward and the reverse KL (generalised JSD, arXiv 2306.13649).
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
    """Return p (x - mean), the gradient of the mean of x under the student, in place of x."""
    return x_Cv.sub_(mean_C[:, None]).mul_(rows.probs_Cv)


def _with_reference(
    rows: Rows, settings: ObjectiveSettings, loss_C: Tensor, dlogits_Cv: Tensor
) -> TokenLoss:
    """Add c KL(S||R) and its gradient, and the advantage."""
    c = settings.reference_coef
    if c != 0.0:
        loss_C = loss_C + c * rows.reference.kl_C
        dlogits_Cv.add_(rows.kl_gradient(rows.reference), alpha=c)
    return _with_advantage(rows, settings, loss_C, dlogits_Cv)


def _with_advantage(
    rows: Rows, settings: ObjectiveSettings, loss_C: Tensor, dlogits_Cv: Tensor
) -> TokenLoss:
    """Add the advantage that a policy gradient would have, for written rollouts."""
    scores = rows.scores
    penalty_C = penalty(rows.logprob_C.detach(), scores.teacher, scores.reference, settings)
    return TokenLoss(loss_C, -penalty_C, dlogits_Cv=dlogits_Cv)


# ------------------------------------------------------------ k tokens and the rest


@objective(temporaries=3)
def top_k_reverse_kl(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
    """`reverse_kl` over the student's k likeliest tokens and one bucket for all others."""
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
    """`forward_kl` over the teacher's k likeliest tokens and one bucket for all others."""
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
    """Return log-probs [C, B] of student, teacher and reference (None if its coefficient is 0)."""
    others = [] if settings.reference_coef == 0.0 else [rows.reference_Cv]
    found = rows.buckets(ids_CK, rows.student_Cv, rows.teacher_Cv, *others)
    student_CB, teacher_CB, *reference_CB = found
    return student_CB, teacher_CB, next(iter(reference_CB), None)


def _log_ratio(a_CB: Tensor, b_CB: Tensor) -> Tensor:
    """Return log a - log b, or 0 for a bucket without tokens."""
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
