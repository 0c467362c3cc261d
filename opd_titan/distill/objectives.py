"""What the student minimises, per response token. Pure tensor maths; the head calls it by chunks.

Shapes: C response tokens of a chunk. Log-probs are fp32, natural, at the sampling temperature.

S is the student, T the teacher, R the reference. `docs/objective.md` derives each formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class TokenScores:
    """What is known of each response token before the update. None: not needed or not there.

    Attributes:
        rollout: log S at the time of sampling.
        teacher: log T.
        reference: log R.
    """

    rollout: Tensor | None = None
    teacher: Tensor | None = None
    reference: Tensor | None = None

    def __getitem__(self, chunk: slice) -> TokenScores:
        values = (getattr(self, f.name) for f in fields(self))
        return TokenScores(*(None if v is None else v[chunk] for v in values))


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
    true_ratio: bool = False


@dataclass
class TokenLoss:
    """Per-token results. All but `loss_C` are detached."""

    loss_C: Tensor
    advantage_C: Tensor
    ratio_C: Tensor
    clipped_C: Tensor


def reverse_kl_advantage(
    student_C: Tensor, scores: TokenScores, settings: ObjectiveSettings
) -> Tensor:
    """A = -[(log S - log T) + c (log S - log R)], detached.

    The expectation of -A over the student's own samples is KL(S||T) + c KL(S||R); its optimum is
    S proportional to (T R^c)^(1/(1+c)). `log_ratio_clamp` bounds each of the two differences.
    """

    def bounded(difference_C: Tensor) -> Tensor:
        limit = settings.log_ratio_clamp
        return difference_C.clamp(-limit, limit) if limit > 0 else difference_C

    kl_C = bounded(student_C - scores.teacher)
    if settings.reference_coef != 0.0:
        kl_C = kl_C + settings.reference_coef * bounded(student_C - scores.reference)
    return -kl_C.detach()


def policy_gradient(
    student_C: Tensor, scores: TokenScores, settings: ObjectiveSettings
) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = S / S_old (PPO, arXiv 1707.06347)."""
    old_C = scores.rollout if settings.true_ratio else student_C.detach()
    advantage_C = reverse_kl_advantage(old_C, scores, settings)
    ratio_C = (student_C - old_C).exp()
    clipped_ratio_C = ratio_C.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    unclipped_C, clipped_C = ratio_C * advantage_C, clipped_ratio_C * advantage_C
    is_clipped_C = (clipped_C < unclipped_C).detach()
    return TokenLoss(
        # Not torch.minimum: it halves the gradient of a tie, and a ratio of 1 with a clip of 0 is
        # one.
        loss_C=-torch.where(is_clipped_C, clipped_C, unclipped_C),
        advantage_C=advantage_C,
        ratio_C=ratio_C.detach(),
        clipped_C=is_clipped_C,
    )


def sft(student_C: Tensor, scores: TokenScores, settings: ObjectiveSettings) -> TokenLoss:
    """-log S: cross-entropy on responses that somebody else wrote."""
    ones_C = torch.ones_like(student_C)
    return TokenLoss(-student_C, ones_C, ones_C, torch.zeros_like(student_C, dtype=torch.bool))


Objective = Callable[[Tensor, TokenScores, ObjectiveSettings], TokenLoss]

OBJECTIVES: dict[str, Objective] = {"policy_gradient": policy_gradient, "sft": sft}
