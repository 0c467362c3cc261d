"""Every objective through the chunked head, against plain autograd over full logits in fp64.

Teacher and reference are of other widths than the student, and come as hidden states.

Shapes: T tokens, R response tokens, D, E, F widths of student, teacher and reference, V vocabulary,
K tokens of a support, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_student import naive_kept
from torch import Tensor
from torch.autograd.profiler import profile

from opd_titan.distill import head as head_module
from opd_titan.distill.head import (
    PROBE_EVERY,
    FrozenHeads,
    HeadStats,
    hidden_head,
    loss_head,
    probed,
    score_head,
)
from opd_titan.distill.objectives import (
    OBJECTIVES,
    ObjectiveSettings,
)
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.models.kernels import head_plain
from opd_titan.models.logits import Distribution, VocabHead

T, R, D, E, F, V = 40, 21, 8, 12, 6, 32
SCALE = 0.07
TOP_K = 5


@dataclass(frozen=True)
class Case:
    """An objective with settings; `expected` is the plain version of it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def objective(self) -> Callable[..., Any]:
        return OBJECTIVES[self.name]

    @property
    def chosen(self) -> ObjectiveSettings:
        return ObjectiveSettings(**{"top_k": TOP_K, **self.settings})

    @property
    def exact(self) -> bool:
        return self.objective.needs_vocabulary(self.chosen)


REF = {"reference_coef": 0.4}
SAMPLED = [Case("policy_gradient", {**REF, "true_ratio": True}), Case("sft")]
BASELINES = [
    Case("policy_gradient", {"baseline": "kl", **REF}),
    Case("policy_gradient", {"baseline": "top_k", "true_ratio": True}),
    Case("policy_gradient", {"baseline": "kl", "reward_power": 0.7, "true_ratio": True}),
    Case("policy_gradient", {"baseline": "top_k", "log_ratio_clamp": 0.5, **REF}),
]
DIVERGENCES = [
    Case("reverse_kl"),
    Case("reverse_kl", REF),
    Case("reverse_kl", {"reference_coef": -0.3}),
    Case("forward_kl"),
    Case("forward_kl", REF),
    Case("jsd", {"beta": 0.3}),
    Case("jsd", {"beta": 0.5, **REF}),
    Case("jsd", {"beta": 0.0, **REF}),
    Case("jsd", {"beta": 1.0, **REF}),
    Case("top_k_reverse_kl"),
    Case("top_k_reverse_kl", REF),
    Case("top_k_forward_kl"),
    Case("top_k_forward_kl", REF),
    Case("top_k_reverse_kl", {"top_k": V + 3}),
    Case("top_k_forward_kl", {"top_k": V}),
]
CASES = [*SAMPLED, *BASELINES, *DIVERGENCES]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


# ---------------------------------------------------------------- the head


class Models:
    """Random hidden states and heads of three models, targets and scores of the rollout."""

    def __init__(
        self,
        seed: int = 0,
        vocab: int = V,
        teacher_vocab: int = V,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.dist = Distribution(temperature, vocab_size=min(vocab, teacher_vocab))
        if vocab == teacher_vocab:
            self.dist = Distribution(temperature)
        self.hidden_TD = randn(T, D).to(dtype).requires_grad_()
        self.weight_VD = (0.6 * randn(vocab, D)).to(dtype).requires_grad_()
        self.predict_R = torch.randperm(T, generator=g)[:R].sort().values
        self.targets_R = torch.randint(min(vocab, teacher_vocab), (R,), generator=g)
        self.heads = {
            "teacher": (randn(R, E).to(dtype), (0.6 * randn(teacher_vocab, E)).to(dtype)),
            "reference": (randn(R, F).to(dtype), (0.6 * randn(vocab, F)).to(dtype)),
        }
        self.rollout_R = randn(R) - 3.0

    def loss(self, case: Case, weight: Tensor | None = None) -> tuple[Tensor, HeadStats]:
        """
        Args:
            weight: in the place of `weight_VD`: split over ranks, as the frozen heads may be.
        """
        logprobs = {role: self.frozen_logprobs(role) for role in self.heads}
        scores, frozen = TokenScores(self.rollout_R), FrozenHeads()
        if case.exact:
            used = {"teacher"} | ({"reference"} if case.chosen.reference_coef else set())
            scores.teacher_hidden = self.heads["teacher"][0]
            scores.reference_hidden = self.heads["reference"][0] if "reference" in used else None
            heads = {role: self.heads[role][1] for role in used}
            frozen = FrozenHeads(
                **{r: VocabHead(h) if isinstance(h, Tensor) else h for r, h in heads.items()}
            )
        else:
            picked = {r: v.gather(1, self.targets_R[:, None])[:, 0] for r, v in logprobs.items()}
            scores = TokenScores(self.rollout_R, **{r: v.float() for r, v in picked.items()})
        return loss_head(
            self.hidden_TD,
            self.weight_VD if weight is None else weight,
            predict_R=self.predict_R,
            targets_R=self.targets_R,
            scores=scores,
            scale=SCALE,
            objective=case.objective,
            settings=case.chosen,
            dist=self.dist,
            frozen=frozen,
        )

    def frozen_logprobs(self, role: str) -> Tensor:
        """fp64 log-probs [R, V] of all that the models have in common."""
        hidden_RE, weight_VE = self.heads[role]
        return self._logprobs(hidden_RE, weight_VE)

    def student_logprobs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        hidden_RD = self.hidden_TD[self.predict_R]
        return self._logprobs(hidden_RD, self.weight_VD, dtype, cut=True)

    def _logprobs(
        self, hidden: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64, cut: bool = False
    ) -> Tensor:
        common = self.dist.vocab_size or len(weight)
        logits_RV = (hidden.to(dtype) @ weight[:common].to(dtype).t()).double()
        logits_RV = logits_RV / self.dist.temperature
        if cut and self.dist.truncates:
            kept_RV = naive_kept(logits_RV, self.dist.top_k, self.dist.top_p)
            kept_RV[torch.arange(R), self.targets_R] = True
            logits_RV = logits_RV.masked_fill(~kept_RV, -1e9)
        return logits_RV.log_softmax(1)

    def gradients(self, loss: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(
            loss, (self.hidden_TD, self.weight_VD), torch.tensor(factor).to(loss)
        )


# ---------------------------------------------------------------- the plain version


def token(logprobs_RV: Tensor, m: Models) -> Tensor:
    return logprobs_RV.gather(1, m.targets_R[:, None]).squeeze(1)


def plain_kl(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV.exp() * (a_RV - b_RV)).sum(1)


def bucketed(ids_RK: Tensor, logprobs_RV: Tensor) -> Tensor:
    """Of these tokens and of all others together; without the latter where there are none."""
    inside_RK = logprobs_RV.gather(1, ids_RK)
    if ids_RK.shape[1] == logprobs_RV.shape[1]:
        return inside_RK
    others_RV = logprobs_RV.scatter(1, ids_RK, -torch.inf)
    return torch.cat((inside_RK, others_RV.logsumexp(1, keepdim=True)), 1)


def plain_penalty(s: Tensor, t: Tensor, r: Tensor, c: ObjectiveSettings) -> Tensor:
    def one(other: Tensor) -> Tensor:
        if c.reward_power:
            return s.exp() ** c.reward_power - other.exp() ** c.reward_power
        bound = c.log_ratio_clamp or torch.inf
        return (s - other).clamp(-bound, bound)

    return one(t) + c.reference_coef * one(r)


def plain_policy_gradient(m: Models, c: ObjectiveSettings, s_RV: Tensor) -> Tensor:
    t_RV, r_RV, now_RV = m.frozen_logprobs("teacher"), m.frozen_logprobs("reference"), s_RV.detach()
    s_R = token(s_RV, m)
    old_R = m.rollout_R.double() if c.true_ratio else s_R.detach()
    advantage_R = -plain_penalty(old_R, token(t_RV, m), token(r_RV, m), c)
    if c.baseline == "top_k":
        ids_RK = now_RV.topk(c.top_k).indices
        now_RV, t_RV, r_RV = (bucketed(ids_RK, x) for x in (now_RV, t_RV, r_RV))
    if c.baseline != "none":
        advantage_R = advantage_R + (now_RV.exp() * plain_penalty(now_RV, t_RV, r_RV, c)).sum(1)
    ratio_R = (s_R - old_R).exp()
    clipped_R = ratio_R.clamp(1 - c.clip_low, 1 + c.clip_high)
    # The mean of equals would halve a gradient; none of these ratios is at an edge.
    return -torch.minimum(ratio_R * advantage_R, clipped_R * advantage_R)


def plain_divergence(name: str, beta: float, s_RV: Tensor, t_RV: Tensor) -> Tensor:
    if name == "forward_kl" or (name == "jsd" and beta == 0.0):
        return plain_kl(t_RV, s_RV)
    if name == "reverse_kl" or (name == "jsd" and beta == 1.0):
        return plain_kl(s_RV, t_RV)
    mixture_RV = torch.logaddexp(t_RV + math.log(beta), s_RV + math.log(1 - beta))
    return beta * plain_kl(t_RV, mixture_RV) + (1 - beta) * plain_kl(s_RV, mixture_RV)


def plain_loss(m: Models, case: Case, s_RV: Tensor) -> Tensor:
    """Per token, [R] fp64."""
    c, name = case.chosen, case.name
    if name == "policy_gradient":
        return plain_policy_gradient(m, c, s_RV)
    if name == "sft":
        return -token(s_RV, m)
    t_RV, r_RV = m.frozen_logprobs("teacher"), m.frozen_logprobs("reference")
    if name.startswith("top_k_"):
        whose_RV = s_RV if "reverse" in name else t_RV
        ids_RK = whose_RV.detach().topk(min(c.top_k, s_RV.shape[1])).indices
        s_RV, t_RV, r_RV = (bucketed(ids_RK, x) for x in (s_RV, t_RV, r_RV))
        name = name.removeprefix("top_k_")
    divergence_R = plain_divergence(name, c.beta, s_RV, t_RV)
    return divergence_R + c.reference_coef * plain_kl(s_RV, r_RV)


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, case: Case, rows: int, vocab: int = V) -> None:
    """Make the head work in chunks of so many rows."""
    frozen = case.exact * (1 + (case.chosen.reference_coef != 0.0))
    tensors = 1 + frozen + case.objective.temporaries(case.chosen)
    budget = -(-4 * rows * vocab * max(3, tensors) // 3)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": budget})


def assert_close(a: Tensor, b: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@each_case
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, case: Case, temperature: float, rows: int
) -> None:
    rows_per_chunk(monkeypatch, case, rows)
    m = Models(temperature=temperature)
    s_RV = m.student_logprobs()
    plain_R = plain_loss(m, case, s_RV)
    loss, stats = m.loss(case)
    assert_close(loss, SCALE * plain_R.sum())
    assert_close(stats.loss_R, plain_R)
    assert_close(stats.logprob_R, token(s_RV, m))
    assert_close(stats.entropy_R, -(s_RV.exp() * s_RV).sum(1))
    plain_gradients = m.gradients(SCALE * plain_R.sum(), -0.37)
    for mine, plain in zip(m.gradients(loss, -0.37), plain_gradients, strict=True):
        assert plain.norm() > 1e-3
        assert_close(mine, plain)


@pytest.mark.parametrize("dist", [(0.7, 0, 0.8), (1.3, 6, 1.0), (1.0, 9, 0.7)], ids=str)
@pytest.mark.parametrize("case", BASELINES, ids=str)
def test_a_baseline_is_of_what_was_sampled_from(case: Case, dist: tuple[float, int, float]) -> None:
    """The student's distribution is cut, the teacher's is not."""
    m = Models()
    m.dist = Distribution(*dist)
    plain_R = plain_loss(m, case, m.student_logprobs())
    loss, stats = m.loss(case)
    assert_close(stats.loss_R, plain_R)
    for pair in zip(m.gradients(loss), m.gradients(SCALE * plain_R.sum()), strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("case", [*BASELINES, *DIVERGENCES], ids=str)
def test_log_probs_of_the_frozen_models_come_along(case: Case) -> None:
    m = Models(temperature=0.8)
    _, stats = m.loss(case)
    assert_close(stats.teacher_R, token(m.frozen_logprobs("teacher"), m))
    if case.chosen.reference_coef:
        assert_close(stats.reference_R, token(m.frozen_logprobs("reference"), m))
    else:
        assert stats.reference_R is None
    # They are those that scoring gives, to rounding.
    hidden_RE, weight_VE = m.heads["teacher"]
    scored_R = score_head(hidden_RE, weight_VE, torch.arange(R), m.targets_R, m.dist)
    assert_close(stats.teacher_R, scored_R, atol=1e-6)
    kept_RE = hidden_head(torch.cat((hidden_RE, hidden_RE)), weight_VE, torch.arange(R, 2 * R))
    assert torch.equal(kept_RE, hidden_RE)


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_nothing_is_looked_up_that_the_sampled_token_does_not_need(case: Case) -> None:
    _, stats = Models().loss(case)
    assert stats.teacher_R is stats.reference_R is None and not stats.probe


@pytest.mark.parametrize("rows", [3, 1000])
@each_case
def test_bf16_is_within_its_rounding(
    monkeypatch: pytest.MonkeyPatch, case: Case, rows: int
) -> None:
    """As near to fp64 on the same rounded numbers as bf16 logits and autograd are."""
    rows_per_chunk(monkeypatch, case, rows)
    m = Models(dtype=torch.bfloat16)
    loss, stats = m.loss(case)
    assert loss.dtype == torch.float32
    exact_R, plain_R = (
        plain_loss(m, case, m.student_logprobs(dtype)) for dtype in (torch.float64, torch.bfloat16)
    )
    error, plain_error = ((x - exact_R).norm() for x in (stats.loss_R, plain_R))
    assert error <= 2 * plain_error + 2e-3 * exact_R.norm()
    exact, plain = (SCALE * x_R.sum() for x_R in (exact_R, plain_R))
    triples = zip(m.gradients(loss), m.gradients(plain), m.gradients(exact), strict=True)
    for mine, plain_grad, true in triples:
        assert mine.dtype == torch.bfloat16
        error, plain_error = ((g.float() - true.float()).norm() for g in (mine, plain_grad))
        assert error <= 2 * plain_error + 4e-3 * true.float().norm()
        assert error <= 0.02 * true.float().norm()


@each_case
def test_large_logits_do_not_overflow(case: Case) -> None:
    m = Models()
    with torch.no_grad():
        m.hidden_TD *= 100.0
        for hidden, _ in m.heads.values():
            hidden *= 100.0
        m.rollout_R = token(m.student_logprobs(), m).float() + 0.05
    plain_R = plain_loss(m, case, m.student_logprobs())
    loss, stats = m.loss(case)
    bounded = case.name == "jsd" or case.chosen.reward_power or case.chosen.log_ratio_clamp
    assert plain_R.abs().max() > (0.5 if bounded else 30.0)
    assert_close(stats.loss_R, plain_R, rtol=1e-4, atol=2e-3)
    for mine, true in zip(m.gradients(loss), m.gradients(SCALE * plain_R.sum()), strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= 1e-3 * true.norm() + 1e-4


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("length", [1, 2, 8, 12, 64, 100, 512, 1000])
@pytest.mark.parametrize("start", [0, 5, 123_456])
def test_the_probe_looks_at_every_position_of_equal_responses_alike(
    length: int, start: int
) -> None:
    """A stride of 8 would see the first token of all, or of none."""
    count = 16_000
    place = probed(start, start + count * length)
    assert len(place) == pytest.approx(count * length / PROBE_EVERY, rel=1e-3)
    seen = torch.bincount(place % length, minlength=length)
    assert seen.min() > 0.8 * count / PROBE_EVERY and seen.max() < 1.2 * count / PROBE_EVERY


def brute_force(m: Models) -> dict[str, list[float]]:
    """Of the tokens that are probed, by loops."""
    found: dict[str, list[float]] = {}
    s_RV, t_RV = m.student_logprobs().detach(), m.frozen_logprobs("teacher")
    for i in probed(0, R).tolist():
        s, t = s_RV[i].tolist(), t_RV[i].tolist()
        ranked = [sorted(range(V), key=lambda v: -x[v]) for x in (s, t)]  # noqa: B023
        p, q = s_RV[i].exp().tolist(), t_RV[i].exp().tolist()
        values = {
            "kl/reverse": sum(p[v] * (s[v] - t[v]) for v in range(V)),
            "kl/forward": sum(q[v] * (t[v] - s[v]) for v in range(V)),
            "policy/teacher_entropy": -sum(q[v] * t[v] for v in range(V)),
            "policy/top_k_overlap": len(set(ranked[0][:16]) & set(ranked[1][:16])) / 16,
            "policy/top_1_agreement": float(ranked[0][0] == ranked[1][0]),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 16, 20, 1000])
def test_the_probe_sees_the_same_tokens_however_they_are_chunked(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    case = Case("reverse_kl", REF)
    rows_per_chunk(monkeypatch, case, rows)
    m = Models(temperature=0.8)
    with torch.no_grad():  # so that they agree, and overlap, in part
        m.heads["teacher"][0][:, :D] = m.hidden_TD[m.predict_R]
        m.heads["teacher"][1][:, :D] = m.weight_VD
        m.heads["teacher"][1][:, D:] *= 0.3
        m.heads["teacher"][0][:5] *= -1.0
    expected = brute_force(m)
    assert 0 < sum(expected["policy/top_1_agreement"]) < len(probed(0, R))
    assert 1 < sum(expected["policy/top_k_overlap"]) < 3
    _, stats = m.loss(case)
    assert stats.probe.keys() == expected.keys()
    for name, values in expected.items():
        assert stats.probe[name].tolist() == pytest.approx(values, rel=2e-5, abs=2e-6), name


# ---------------------------------------------------------------- padded vocabularies


@pytest.mark.parametrize("sizes", [(13, 16), (16, 13)], ids=lambda s: f"student {s[0]} of {s[1]}")
@each_case
def test_only_what_all_models_know_takes_part(case: Case, sizes: tuple[int, int]) -> None:
    vocab, teacher_vocab = sizes
    m = Models(vocab=vocab, teacher_vocab=teacher_vocab)
    assert m.student_logprobs().shape == m.frozen_logprobs("teacher").shape == (R, 13)
    plain_R = plain_loss(m, case, m.student_logprobs())
    loss, stats = m.loss(case)
    assert_close(stats.loss_R, plain_R)
    assert_close(stats.logprob_R.exp(), token(m.student_logprobs(), m).exp())
    hidden_grad_TD, weight_grad_VD = m.gradients(loss)
    true_grads = m.gradients(SCALE * plain_R.sum())
    assert_close(hidden_grad_TD, true_grads[0])
    assert_close(weight_grad_VD, true_grads[1])
    assert (weight_grad_VD[13:] == 0).all() and (weight_grad_VD[:13] != 0).any(1).all()
    scored_R = score_head(m.hidden_TD, m.weight_VD, m.predict_R, m.targets_R, m.dist)
    assert_close(scored_R, token(m.student_logprobs(), m))


# ---------------------------------------------------------------- memory


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The most that was allocated at a time, by the allocator itself: temporaries inside of
    operations count too.
    """
    with profile(profile_memory=True) as record:
        fn()
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


@pytest.mark.parametrize("case", [c for c in CASES if c.chosen.top_k == TOP_K], ids=str)
def test_all_that_lives_at_once_is_three_chunks(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """And the head's gradient."""
    vocab, rows, width, tokens = 3000, 30, 4, 200
    budget = rows * vocab * 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": budget})
    monkeypatch.setattr(head_plain, "_BLOCK_BYTES", {"cpu": 4 * vocab})
    hidden_RD = torch.randn(tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocab, width, requires_grad=True)
    scores, frozen = TokenScores(*torch.randn(3, tokens).sub(8.0)), FrozenHeads()
    if case.exact:
        scores.teacher_hidden = scores.reference_hidden = torch.randn(tokens, width)
        other = VocabHead(torch.randn(vocab, width))
        frozen = FrozenHeads(other, other if case.chosen.reference_coef else None)

    def step() -> None:
        loss, _ = loss_head(
            hidden_RD,
            weight_VD,
            predict_R=torch.arange(tokens),
            targets_R=torch.arange(tokens),
            scores=scores,
            scale=1.0,
            objective=case.objective,
            settings=case.chosen,
            dist=Distribution(),
            frozen=frozen,
        )
        loss.backward()

    peak = peak_bytes(step) - weight_VD.nbytes
    # The probe's four copies of an eighth of the rows are beyond the three.
    assert budget < peak < 3.75 * budget, peak / budget
