"""Random inputs for the chunked head, and the same losses by plain autograd over full logits.

Teacher and reference have other widths than the student and are kept as hidden states.

Shapes: T tokens, R response tokens, D, E, F widths of student, teacher and reference, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_student import naive_kept
from tiny_vocabulary import plain_divergence, plain_policy_gradient
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opd_titan.distill import head as head_module
from opd_titan.distill.head import FrozenHeads, HeadStats, LossHead, LossRule, score_head
from opd_titan.distill.inspection import Inspector
from opd_titan.distill.objectives import OBJECTIVES, Objective, ObjectiveSettings
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution, VocabHead

T, R, D, E, F, V = 40, 21, 8, 12, 6, 32
SCALE, TOP_K = 0.07, 5
WHOLE = Distribution()
TRUNCATED = [Distribution(1.0, 3, 1.0), Distribution(0.7, 0, 0.8), Distribution(1.3, 6, 0.6)]


@dataclass(frozen=True)
class Case:
    """An objective with its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name]

    @property
    def how(self) -> ObjectiveSettings:
        return ObjectiveSettings(**{"top_k": TOP_K, **self.settings})

    @property
    def exact(self) -> bool:
        """Whether it needs the frozen models' whole distributions."""
        return self.objective.needs_vocabulary(self.how)

    @property
    def has_reference(self) -> bool:
        return self.how.reference_coef != 0.0


REF = {"reference_coef": 0.4}
SAMPLED = [
    Case("policy_gradient", {**REF, "true_ratio": True}),
    Case("policy_gradient", {"clip_low": 0.1, "clip_high": 0.4, "true_ratio": True}),
    Case("sft"),
]
BASELINES = [
    Case("policy_gradient", {"baseline": "kl", **REF}),
    Case("policy_gradient", {"baseline": "top_k", "true_ratio": True}),
    Case("policy_gradient", {"baseline": "kl", "reward_power": 0.7, "true_ratio": True}),
    Case("policy_gradient", {"baseline": "top_k", "log_ratio_clamp": 0.5, **REF}),
]
DIVERGENCES = [
    Case("reverse_kl"),
    Case("reverse_kl", {"reference_coef": -0.3}),
    Case("forward_kl"),
    Case("forward_kl", REF),
    Case("jsd", {"beta": 0.3}),
    Case("jsd", {"beta": 0.5, **REF}),
    Case("jsd", {"beta": 0.0, **REF}),
    Case("jsd", {"beta": 1.0, **REF}),
    Case("top_k_reverse_kl"),
    Case("top_k_reverse_kl", REF),
    Case("top_k_forward_kl", REF),
    Case("top_k_reverse_kl", {"top_k": V + 3}),
    Case("top_k_forward_kl", {"top_k": V}),
]
CASES = [*SAMPLED, *BASELINES, *DIVERGENCES]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Problem:
    """Hidden states and heads of three models, targets, and log-probs of the rollout.

    Args:
        vocab, teacher_vocab: rows of the heads; only the ids of both are used.
    """

    def __init__(
        self,
        dist: Distribution = WHOLE,
        *,
        vocab: int = V,
        teacher_vocab: int = V,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.dist, common = dist, min(vocab, teacher_vocab)
        if vocab != teacher_vocab:
            self.dist = Distribution(dist.temperature, vocab_size=common)
        self.hidden_TD = randn(T, D).to(dtype).requires_grad_()
        self.weight_VD = (0.6 * randn(vocab, D)).to(dtype).requires_grad_()
        # Not all positions predict a response token.
        self.predict_R = torch.randperm(T, generator=g)[:R].sort().values
        self.targets_R = torch.randint(common, (R,), generator=g)
        self.frozen = {
            "teacher": (randn(R, E).to(dtype), (0.6 * randn(teacher_vocab, E)).to(dtype)),
            "reference": (randn(R, F).to(dtype), (0.6 * randn(vocab, F)).to(dtype)),
        }
        # Near log V, so that ratios are on both sides of both bounds of the clip.
        self.rollout_R = randn(R) - 3.0

    def where(self) -> dict[str, Any]:
        """Return the arguments of `score_head` except hidden states and weight."""
        return dict(predict_R=self.predict_R, targets_R=self.targets_R, dist=self.dist)

    def loss(
        self, case: Case, weight: Tensor | None = None, tp: Any = None, **more: Any
    ) -> tuple[Tensor, HeadStats]:
        """Return the head's loss and diagnostics.

        Args:
            weight: a weight that is split over ranks, to use instead of `weight_VD`.
            tp: the ranks over which the frozen heads are split.
        """
        roles = {"teacher"} | ({"reference"} if case.has_reference else set())
        scores, heads = TokenScores(self.rollout_R), {}
        for role, (hidden, head) in self.frozen.items():
            if not case.exact:
                setattr(scores, role, self.pick(self.frozen_logprobs(role)).float())
            elif role in roles:
                setattr(scores, f"{role}_hidden", hidden)
                part = head if tp is None else head.chunk(tp.size)[tp.rank]
                heads[role] = VocabHead(part) if tp is None else VocabHead(part, tp)
        head = LossHead(
            LossRule(case.objective, case.how, self.dist),
            self.predict_R,
            self.targets_R,
            scores,
            SCALE,
            FrozenHeads(**heads),
            **more,
        )
        return head(self.hidden_TD, self.weight_VD if weight is None else weight)

    def pick(self, logprobs_RV: Tensor) -> Tensor:
        """Return the log-probs [R] of the targets."""
        return logprobs_RV.gather(1, self.targets_R[:, None]).squeeze(1)

    def plain_loss(
        self, case: Case, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss per token [R] and, for a policy gradient, the advantage [R]."""
        s_RV = self.student_logprobs(dtype)
        t_RV, r_RV = (self.frozen_logprobs(role) for role in self.frozen)
        if case.name == "sft":
            return -self.pick(s_RV), torch.ones(R)
        if case.name == "policy_gradient":
            rollout_R = self.rollout_R.double()
            return plain_policy_gradient(s_RV, t_RV, r_RV, self.targets_R, rollout_R, case.how)
        return plain_divergence(case.name, s_RV, t_RV, r_RV, case.how), None

    def frozen_logprobs(self, role: str) -> Tensor:
        """Return a frozen model's log-probs [R, V] fp64, never truncated."""
        return self._logits(*self.frozen[role], torch.float64).log_softmax(1)

    def student_logprobs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the student's log-probs [R, V] fp64; truncation keeps the sampled token.

        Args:
            dtype: of the product with the head.
        """
        logits_RV = self._logits(self.hidden_TD[self.predict_R], self.weight_VD, dtype)
        if self.dist.truncates:
            kept_RV = naive_kept(logits_RV, self.dist.top_k, self.dist.top_p)
            kept_RV[torch.arange(R), self.targets_R] = True
            logits_RV = logits_RV.masked_fill(~kept_RV, -1e9)
        return logits_RV.log_softmax(1)

    def _logits(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        common = self.dist.vocab_size or len(weight)
        logits_RV = (hidden.to(dtype) @ weight[:common].to(dtype).t()).double()
        return logits_RV / self.dist.temperature

    def gradients(self, loss: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(
            loss, (self.hidden_TD, self.weight_VD), torch.tensor(factor).to(loss)
        )


def set_chunk_rows(patch: pytest.MonkeyPatch, case: Case, rows: int, vocab: int = V) -> None:
    """Make the loss head work in chunks of this many rows of `vocab` columns."""
    frozen = case.exact * (1 + case.has_reference)
    tensors = 1 + frozen + case.objective.temporaries(case.how)
    budget = -(-4 * rows * vocab * max(3, tensors) // 3)
    patch.setattr(head_module, "CHUNK_BYTES", {"cpu": budget})


def assert_close(a: Tensor, b: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


# ---------------------------------------------------------------- split over ranks

# Each objective, and truncated distributions if it may have them.
SPLIT = [(case, Distribution(0.9)) for case in CASES]
SPLIT += [(case, TRUNCATED[2]) for case in (*SAMPLED, *BASELINES)]


def split_problem(world: World, dist: Distribution) -> tuple[Problem, Tensor]:
    """Return a problem, and its head's weight split over `world.tp`."""
    m = Problem(dist)
    weight = distribute_tensor(m.weight_VD.detach(), world.tp_mesh, [Shard(0)])
    return m, nn.Parameter(weight)


def split_results(world: World | None, case: Case, dist: Distribution) -> dict[str, Tensor]:
    """Return all results of the head, including gradients, the same on every rank."""
    # More of the likeliest tokens than one of two ranks has.
    watch = Inspector([slice(0, 2), slice(3, R)], V // 2 + 2)
    m, rows, tp = Problem(dist), V, None
    weight: Tensor = m.weight_VD
    if world is not None:
        (m, weight), tp = split_problem(world, dist), world.tp
        rows = V // tp.size
    with pytest.MonkeyPatch.context() as patch:
        set_chunk_rows(patch, case, 8, rows)
        loss, stats = m.loss(case, weight, tp, watches={"student": watch})
    assert len(set((m.targets_R // rows).tolist())) == V // rows  # targets on every rank
    loss.backward(torch.tensor(-0.37))
    if world is not None:
        all_reduce(m.hidden_TD.grad, group=world.tp.group)
    grad = weight.grad
    columns = dict(vars(stats), **stats.probe)
    columns |= dict(zip(("ranks", "ids", "values"), columns.pop("seen")["student"], strict=True))
    found = {
        "loss": loss.detach(),
        "hidden": m.hidden_TD.grad,
        "weight": grad.full_tensor() if isinstance(grad, DTensor) else grad,
        "scored": score_head(m.hidden_TD, weight, **m.where()),
    }
    return found | {name: x for name, x in columns.items() if isinstance(x, Tensor)}
