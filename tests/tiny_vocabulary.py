"""Vocabularies so small that every response can be enumerated, and plain formulas of the losses.

`Table` weights the results of an objective on every response by its probability. The formulas below
it do not use `opd_titan.distill.objectives`; autograd differentiates them.

Shapes: F tokens of all responses, P prefixes, C tokens of a chunk, V vocabulary, K tokens of a
support, B buckets.
"""

from __future__ import annotations

import math

import torch
from tiny_student import all_responses
from torch import Tensor

from opd_titan.distill.objectives import Objective, ObjectiveSettings, TokenLoss
from opd_titan.distill.vocabulary import ModelLogits, Rows, TokenScores
from opd_titan.models.logits import VocabHead


def rows_of(
    student_CV: Tensor,
    teacher_CV: Tensor,
    reference_CV: Tensor | None = None,
    tokens_C: Tensor | None = None,
    rollout_C: Tensor | None = None,
) -> Rows:
    """Return what the head passes to an objective for these logits [C, V].

    Args:
        tokens_C: the sampled tokens; token 0 by default.
        rollout_C: their log S at the time of sampling.
    """
    if tokens_C is None:
        tokens_C = torch.zeros(student_CV.shape[0], dtype=torch.int64)

    def log_softmax(logits_CV: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if logits_CV is None:
            return None, None
        logprobs_CV = logits_CV.log_softmax(1)
        return logprobs_CV, logprobs_CV.gather(1, tokens_C[:, None]).squeeze(1)

    student_CV, logprob_C = log_softmax(student_CV)
    teacher_CV, teacher_C = log_softmax(teacher_CV)
    reference_CV, reference_C = log_softmax(reference_CV)
    student_CV = student_CV.detach()

    def model(logprobs_CV: Tensor | None) -> ModelLogits | None:
        if logprobs_CV is None:
            return None
        zero_C = torch.zeros_like(logprobs_CV[:, 0])
        return ModelLogits(logprobs_CV.clone(), zero_C, zero_C, kl(student_CV, logprobs_CV))

    return Rows(
        logprob_C=logprob_C,
        scores=TokenScores(rollout_C, teacher_C, reference_C),
        student=model(student_CV),
        teacher=model(teacher_CV),
        reference=model(reference_CV),
        head=VocabHead(student_CV.new_empty(student_CV.shape[1], 0)),
        dtype=student_CV.dtype,
    )


def random_logits(rows: int, vocab: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


class Table:
    """A policy as a table of logits [P, V], and every response that it can give.

    Attributes:
        rows_F, tokens_F, owner_F: for every token of every response the row of its prefix, its id
            and the number of its response.
    """

    def __init__(self, vocab: int, length: int) -> None:
        responses = all_responses(vocab, 0, length)
        rows: dict[tuple[int, ...], int] = {}
        flat = []
        for owner, ids in enumerate(responses):
            for t, token in enumerate(ids):
                flat.append((rows.setdefault(ids[:t], len(rows)), token, owner))
        self.rows_F, self.tokens_F, self.owner_F = torch.tensor(flat).t()
        self.vocab, self.length, self.prefixes = vocab, length, rows
        self.num_responses = len(responses)

    def random_logits(self, seed: int, scale: float = 1.0) -> Tensor:
        return random_logits(len(self.prefixes), self.vocab, seed, scale)

    def response_probs(self, logits_PV: Tensor) -> Tensor:
        logprob_F = logits_PV.log_softmax(1)[self.rows_F, self.tokens_F]
        zero = torch.zeros(self.num_responses, dtype=torch.float64)
        return zero.index_add(0, self.owner_F, logprob_F).exp()

    def prefix_probs(self, logits_PV: Tensor) -> Tensor:
        logprobs = logits_PV.log_softmax(1).tolist()
        totals = [
            sum(logprobs[self.prefixes[p[:t]]][token] for t, token in enumerate(p))
            for p in self.prefixes
        ]
        return torch.tensor(totals, dtype=torch.float64).exp()

    def evaluate(
        self,
        objective: Objective,
        settings: ObjectiveSettings,
        student_PV: Tensor,
        teacher_PV: Tensor,
        reference_PV: Tensor | None = None,
        rollout_PV: Tensor | None = None,
    ) -> tuple[TokenLoss, Tensor, Tensor]:
        """Evaluate an objective on every token of every response.

        Args:
            rollout_PV: the student that sampled; the same student by default.

        Returns:
            The objective's results, the expected sum of the losses of a response, and the expected
            gradient with respect to the student's logits [P, V].
        """
        student_PV = student_PV.detach().requires_grad_()
        sampler_PV = student_PV.detach() if rollout_PV is None else rollout_PV
        old_F = sampler_PV.log_softmax(1)[self.rows_F, self.tokens_F]
        reference_FV = None if reference_PV is None else reference_PV[self.rows_F]
        rows = rows_of(
            student_PV[self.rows_F], teacher_PV[self.rows_F], reference_FV, self.tokens_F, old_F
        )
        result = objective(rows, settings)
        weight_F = self.response_probs(sampler_PV)[self.owner_F]
        loss = (weight_F * result.loss_C).sum()
        if result.dlogits_Cv is None:
            (grad_PV,) = torch.autograd.grad(loss, student_PV)
        else:
            grad_FV = weight_F[:, None] * result.dlogits_Cv
            grad_PV = torch.zeros_like(student_PV.detach()).index_add(0, self.rows_F, grad_FV)
        return result, loss.detach(), grad_PV


# ---------------------------------------------------------------- plain formulas


def kl(p_CB: Tensor, q_CB: Tensor) -> Tensor:
    """Return KL(p || q) [C] of log-probs."""
    return (p_CB.exp() * (p_CB - q_CB)).sum(1)


def bucketed(logprobs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Return the log-probs [C, B] of these tokens and, if there are any, of all others together."""
    parts = [logprobs_CV.gather(1, ids_CK)]
    if ids_CK.shape[1] < logprobs_CV.shape[1]:
        rest_CV = logprobs_CV.scatter(1, ids_CK, -torch.inf)
        parts.append(rest_CV.logsumexp(1, keepdim=True))
    return torch.cat(parts, dim=1)


def support(logprobs_CV: Tensor, k: int) -> Tensor:
    """Return the ids [C, K] of the k likeliest tokens."""
    return logprobs_CV.detach().topk(min(k, logprobs_CV.shape[1]), dim=1).indices


def plain_penalty(s: Tensor, t: Tensor, r: Tensor | None, how: ObjectiveSettings) -> Tensor:
    """Return (log S - log T) + c (log S - log R), with the clamp or the power of the settings."""

    def difference(other: Tensor) -> Tensor:
        if how.reward_power:
            return (how.reward_power * s).exp() - (how.reward_power * other).exp()
        limit = how.log_ratio_clamp or torch.inf
        return (s - other).clamp(-limit, limit)

    c = how.reference_coef
    return difference(t) + (c * difference(r) if c else 0.0)


def plain_divergence(
    name: str, s_CV: Tensor, t_CV: Tensor, r_CV: Tensor, how: ObjectiveSettings
) -> Tensor:
    """Return the loss [C] of a divergence in `OBJECTIVES` between log-probs."""
    beta, c = how.beta, how.reference_coef
    if name.startswith("top_k_"):
        ids_CK = support(s_CV if name == "top_k_reverse_kl" else t_CV, how.top_k)
        s_CV, t_CV, r_CV = (bucketed(x, ids_CK) for x in (s_CV, t_CV, r_CV))
        name = name.removeprefix("top_k_")
    if name == "reverse_kl" or (name == "jsd" and beta == 1.0):
        loss_C = kl(s_CV, t_CV)
    elif name == "forward_kl" or (name == "jsd" and beta == 0.0):
        loss_C = kl(t_CV, s_CV)
    else:
        m_CV = torch.logaddexp(t_CV + math.log(beta), s_CV + math.log(1.0 - beta))
        loss_C = beta * kl(t_CV, m_CV) + (1.0 - beta) * kl(s_CV, m_CV)
    return loss_C + c * kl(s_CV, r_CV) if c != 0.0 else loss_C


def plain_policy_gradient(
    s_CV: Tensor,
    t_CV: Tensor,
    r_CV: Tensor,
    tokens_C: Tensor,
    rollout_C: Tensor,
    how: ObjectiveSettings,
) -> tuple[Tensor, Tensor]:
    """Return the loss [C] of the policy gradient, and the advantage [C]."""
    s_C, t_C, r_C = (x.gather(1, tokens_C[:, None]).squeeze(1) for x in (s_CV, t_CV, r_CV))
    old_C = rollout_C if how.true_ratio else s_C.detach()
    advantage_C = -plain_penalty(s_C.detach(), t_C, r_C, how)
    s_CV = s_CV.detach()
    if how.baseline == "top_k":
        ids_CK = support(s_CV, how.top_k)
        s_CV, t_CV, r_CV = (bucketed(x, ids_CK) for x in (s_CV, t_CV, r_CV))
    if how.baseline != "none":
        advantage_C = advantage_C + (s_CV.exp() * plain_penalty(s_CV, t_CV, r_CV, how)).sum(1)
    ratio_C = (s_C - old_C).exp()
    clipped_C = ratio_C.clamp(1.0 - how.clip_low, 1.0 + how.clip_high)
    return -torch.minimum(ratio_C * advantage_C, clipped_C * advantage_C), advantage_C


def gradient_of_divergence(
    name: str,
    student_CV: Tensor,
    teacher_CV: Tensor,
    reference_CV: Tensor,
    how: ObjectiveSettings,
) -> tuple[Tensor, Tensor]:
    """Return the loss [C] and its gradient by the student's logits [C, V], by autograd in fp64."""
    logits_CV = student_CV.detach().double().requires_grad_()
    t_CV, r_CV = (x.double().log_softmax(1) for x in (teacher_CV, reference_CV))
    loss_C = plain_divergence(name, logits_CV.log_softmax(1), t_CV, r_CV, how)
    (grad_CV,) = torch.autograd.grad(loss_C.sum(), logits_CV)
    return loss_C.detach(), grad_CV
