"""The policy gradient against enumeration of every response."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny_student import (
    one_process_group,
)
from tiny_vocabulary import Table, kl, random_logits, rows_of
from torch import Tensor

from opd_titan.distill.objectives import (
    ObjectiveSettings,
    advantages,
    expected_penalty,
    penalty,
    policy_gradient,
    reverse_kl,
    sft,
)
from opd_titan.distill.vocabulary import Rows, TokenScores


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process_group():
        yield


# ---------------------------------------------------------------- enumeration

TABLES = [Table(5, 4), Table(8, 3), Table(12, 2)]
TABLE = Table(5, 3)
COEFFICIENTS = [0.0, 1.0, -0.5]
BASELINES = {
    "none": ObjectiveSettings(),
    "kl": ObjectiveSettings(baseline="kl"),
    "top_k": ObjectiveSettings(baseline="top_k", top_k=2),
}
by_table = pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.vocab}^{t.length}")
by_baseline = pytest.mark.parametrize("baseline", BASELINES)


def kl_of_steps(
    table: Table, student_PV: Tensor, teacher_PV: Tensor, reference_PV: Tensor, c: float
) -> Tensor:
    """Sum over prefixes of P(prefix), detached, times KL(S||T) + c KL(S||R) of the next token."""
    s_PV, t_PV, r_PV = (x.log_softmax(1) for x in (student_PV, teacher_PV, reference_PV))
    return (table.prefix_probs(student_PV.detach()) * (kl(s_PV, t_PV) + c * kl(s_PV, r_PV))).sum()


@by_table
def test_enumeration_covers_every_response_once(table: Table) -> None:
    student_PV = table.random_logits(0)
    stopped = sum((table.vocab - 1) ** n for n in range(table.length - 1))
    assert table.num_responses == stopped + table.vocab * (table.vocab - 1) ** (table.length - 1)
    probs = table.response_probs(student_PV)
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-12)
    reach_P = torch.zeros(len(table.prefixes), dtype=torch.float64)
    reach_P.index_add_(0, table.rows_F, probs[table.owner_F])
    torch.testing.assert_close(reach_P, table.prefix_probs(student_PV), rtol=1e-10, atol=0)


@pytest.mark.parametrize("true_ratio", [False, True])
@pytest.mark.parametrize("c", COEFFICIENTS)
@by_baseline
@by_table
def test_expected_gradient_is_that_of_the_kl(
    table: Table, baseline: str, c: float, true_ratio: bool
) -> None:
    student_PV = table.random_logits(0).requires_grad_()
    others = table.random_logits(1), table.random_logits(2)
    how = replace(BASELINES[baseline], reference_coef=c, true_ratio=true_ratio)
    _, loss, grad_PV = table.evaluate(policy_gradient, how, student_PV, *others)
    truth = kl_of_steps(table, student_PV, *others, c)
    (true_grad_PV,) = torch.autograd.grad(truth, student_PV)
    assert true_grad_PV.abs().max() > 0.01
    torch.testing.assert_close(grad_PV, true_grad_PV, rtol=1e-9, atol=1e-13)
    # At ratio 1 the loss itself is -A: its mean is the KL, less what the baseline takes away.
    if baseline == "none":
        assert loss.item() == pytest.approx(truth.item(), rel=1e-10)
    elif baseline == "kl":
        assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("c", COEFFICIENTS)
@by_table
def test_the_exact_objective_has_the_gradient_that_the_sampled_one_has_on_average(
    table: Table, c: float
) -> None:
    student_PV = table.random_logits(0).requires_grad_()
    others = table.random_logits(1), table.random_logits(2)
    how = ObjectiveSettings(reference_coef=c)
    _, loss, grad_PV = table.evaluate(reverse_kl, how, student_PV, *others)
    truth = kl_of_steps(table, student_PV, *others, c)
    (true_grad_PV,) = torch.autograd.grad(truth, student_PV)
    torch.testing.assert_close(grad_PV, true_grad_PV, rtol=1e-9, atol=1e-13)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-10)


@pytest.mark.parametrize("c", COEFFICIENTS)
@by_baseline
def test_responses_of_an_older_student_are_weighed_by_the_ratio(baseline: str, c: float) -> None:
    """Sampled by S_old, with log S_old in the penalty x: the gradient of E_S_old[r x] = E_S[x]."""
    student_PV = TABLE.random_logits(0).requires_grad_()
    teacher_PV, reference_PV, old_PV = (TABLE.random_logits(i) for i in (1, 2, 3))
    how = replace(
        BASELINES[baseline], reference_coef=c, true_ratio=True, clip_low=1.0, clip_high=1e9
    )
    others = teacher_PV, reference_PV, old_PV
    result, _, grad_PV = TABLE.evaluate(policy_gradient, how, student_PV, *others)
    t, r, old = (x.log_softmax(1) for x in others)
    x_PV = (old - t) + c * (old - r)
    mean_P = (student_PV.softmax(1) * x_PV).sum(1)
    truth = (TABLE.prefix_probs(old_PV) * mean_P).sum()
    (true_grad_PV,) = torch.autograd.grad(truth, student_PV)
    torch.testing.assert_close(grad_PV, true_grad_PV, rtol=1e-9, atol=1e-13)
    where = TABLE.rows_F, TABLE.tokens_F
    ratio_F = (student_PV.detach().log_softmax(1) - old)[where].exp()
    torch.testing.assert_close(result.ratio_C, ratio_F)
    assert not result.clipped_C.any() and ratio_F.max() > 2.0


@pytest.mark.parametrize("c", COEFFICIENTS)
@pytest.mark.parametrize("objective", [policy_gradient, reverse_kl], ids=lambda f: f.__name__)
def test_optimum_is_the_weighted_geometric_mean(objective, c: float) -> None:
    student_PV = TABLE.random_logits(0)
    others = TABLE.random_logits(1), TABLE.random_logits(2)
    how = ObjectiveSettings(reference_coef=c)
    for _ in range(150):
        _, _, grad_PV = TABLE.evaluate(objective, how, student_PV, *others)
        # A rare prefix or token has a small gradient: dividing by its probability moves no
        # optimum and spares thousands of steps.
        reach_P = TABLE.prefix_probs(student_PV)
        student_PV = student_PV - 0.3 * grad_PV / (reach_P[:, None] * student_PV.softmax(1))
    s, t, r = (x.log_softmax(1) for x in (student_PV, *others))
    optimum = ((t + c * r) / (1 + c)).softmax(1)
    torch.testing.assert_close(s.exp(), optimum, rtol=1e-6, atol=1e-9)
    if c:  # and not somewhere that the teacher alone would explain
        assert (s.exp() - t.exp()).abs().max() > 0.1


# ---------------------------------------------------------------- the baseline


def every_token(student_NV: Tensor, teacher_NV: Tensor, reference_NV: Tensor | None = None) -> Rows:
    """Each row of logits V times, with each token of the vocabulary as the sampled one."""
    rows, vocab = student_NV.shape
    logits = [
        None if x is None else x.repeat_interleave(vocab, 0)
        for x in (student_NV, teacher_NV, reference_NV)
    ]
    made = rows_of(*logits, tokens_C=torch.arange(vocab).repeat(rows))
    made.logprob_C.requires_grad_()
    return made


def gradient_moments(
    student_NV: Tensor, how: ObjectiveSettings, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [N, V] and total variance [N] of one token's gradient by the logits, exactly."""
    rows = every_token(student_NV, *others)
    loss = policy_gradient(rows, how).loss_C.sum()
    (g_C,) = torch.autograd.grad(loss, rows.logprob_C)
    probs_NV = student_NV.softmax(1)
    vocab = probs_NV.shape[1]
    score_NVV = torch.eye(vocab, dtype=torch.float64) - probs_NV[:, None]  # token, logit
    grad_NVV = g_C.view(-1, vocab, 1) * score_NVV
    mean_NV = (probs_NV[:, :, None] * grad_NVV).sum(1)
    square_N = (probs_NV[:, :, None] * grad_NVV.square()).sum((1, 2))
    return mean_NV, square_N - mean_NV.square().sum(1)


# Student's scale, teacher's scale, or how far it is from the student; most of the variance left.
PAIRS = {
    "near the teacher": (1.0, None, 0.3, 0.99),
    "nothing in common": (1.0, 1.0, None, 0.85),
    "both sure, of different tokens": (3.0, 3.0, None, 0.6),
    "a flat student": (0.3, 3.0, None, 0.8),
}


def pair(scale: float, teacher_scale: float | None, noise: float | None) -> tuple[Tensor, Tensor]:
    student_NV, other_NV = random_logits(300, 12, 1, scale), random_logits(300, 12, 2)
    if noise is not None:
        return student_NV, student_NV + noise * other_NV
    return student_NV, teacher_scale * other_NV


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("baseline", ["kl", "top_k"])
def test_baseline_leaves_the_mean_and_lowers_the_variance(baseline: str, case: str) -> None:
    """Variance added up over 300 draws: it need not fall for each."""
    *scales, bound = PAIRS[case]
    student_NV, teacher_NV = pair(*scales)
    mean_NV, variance_N = gradient_moments(student_NV, ObjectiveSettings(), teacher_NV)
    less_NV, less_N = gradient_moments(student_NV, BASELINES[baseline], teacher_NV)
    torch.testing.assert_close(less_NV, mean_NV, rtol=0, atol=1e-12)
    ratio, share = less_N.sum() / variance_N.sum(), (less_N < variance_N).double().mean()
    assert ratio < bound, f"{ratio:.4f} of the variance; it falls for {share:.0%} of the draws"
    assert share > 0.5


def test_a_baseline_does_not_help_a_student_that_is_sure_where_the_teacher_is_not() -> None:
    """What it adds to the likely token's advantage outweighs what it takes from the others'."""
    student_NV, teacher_NV = pair(3.0, 0.3, None)
    _, variance_N = gradient_moments(student_NV, ObjectiveSettings(), teacher_NV)
    _, with_kl_N = gradient_moments(student_NV, BASELINES["kl"], teacher_NV)
    assert with_kl_N.sum() > 1.1 * variance_N.sum()


BOUNDED = {
    "free": ObjectiveSettings(),
    "clamp": ObjectiveSettings(log_ratio_clamp=0.4),
    "power": ObjectiveSettings(reward_power=0.5),
}


@pytest.mark.parametrize("c", COEFFICIENTS)
@pytest.mark.parametrize("bounded", BOUNDED)
def test_kl_baseline_is_the_mean_of_the_penalty(bounded: str, c: float) -> None:
    logits = [random_logits(20, 9, i, 2.0) for i in range(3)]
    how = replace(BOUNDED[bounded], reference_coef=c, baseline="kl")
    rows = every_token(*logits)
    scores = rows.scores
    x_NV = penalty(rows.logprob_C.detach(), scores.teacher, scores.reference, how).view(20, 9)
    mean_N = (logits[0].softmax(1) * x_NV).sum(1)
    torch.testing.assert_close(expected_penalty(rows, how).view(20, 9)[:, 0], mean_N)
    # So that an advantage is 0 on average.
    advantage_NV = policy_gradient(rows, how).advantage_C.view(20, 9)
    mean_advantage_N = (logits[0].softmax(1) * advantage_NV).sum(1)
    torch.testing.assert_close(mean_advantage_N, torch.zeros_like(mean_N), rtol=0, atol=1e-12)
    # Over the whole vocabulary top-k leaves nothing out.
    for k in (9, 50):
        top_k_N = expected_penalty(every_token(*logits), replace(how, baseline="top_k", top_k=k))
        torch.testing.assert_close(top_k_N.view(20, 9)[:, 0], mean_N)


def test_top_k_baseline_counts_the_rest_as_one_token() -> None:
    student_NV = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    teacher_NV = torch.tensor([[0.2, 0.4, 0.1, 0.3]], dtype=torch.float64)
    how = ObjectiveSettings(baseline="top_k", top_k=2)
    s, t = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.4, 0.4]).double()

    def baseline(**settings: float) -> Tensor:
        rows = rows_of(student_NV.log(), teacher_NV.log())
        return expected_penalty(rows, replace(how, **settings))

    torch.testing.assert_close(baseline(), (s * (s / t).log()).sum()[None])
    clamped = (s * (s / t).log().clamp(-0.5, 0.5)).sum()
    torch.testing.assert_close(baseline(log_ratio_clamp=0.5), clamped[None])
    powers = (s * (s**0.5 - t**0.5)).sum()
    torch.testing.assert_close(baseline(reward_power=0.5), powers[None])


# ---------------------------------------------------------------- a bounded penalty


@pytest.mark.parametrize("c", COEFFICIENTS)
@by_baseline
@pytest.mark.parametrize("bounded", ["clamp", "power"])
def test_expected_gradient_of_a_bounded_penalty(bounded: str, baseline: str, c: float) -> None:
    """By a logit p (x - sum p x), where x is what stands in the log ratio's place."""
    student_PV, teacher_PV, reference_PV = (TABLE.random_logits(i) for i in range(3))
    s, t, r = (x.log_softmax(1) for x in (student_PV, teacher_PV, reference_PV))
    if bounded == "power":
        how = replace(BASELINES[baseline], reward_power=0.7, reference_coef=c)
        x_PV = (s.exp() ** 0.7 - t.exp() ** 0.7) + c * (s.exp() ** 0.7 - r.exp() ** 0.7)
    else:
        how = replace(BASELINES[baseline], log_ratio_clamp=0.4, reference_coef=c)
        x_PV = (s - t).clip(-0.4, 0.4) + c * (s - r).clip(-0.4, 0.4)
        assert 0.1 < ((s - t).abs() > 0.4).double().mean() < 0.9
    p_PV = s.exp()
    truth_PV = p_PV * (x_PV - (p_PV * x_PV).sum(1, keepdim=True))
    truth_PV *= TABLE.prefix_probs(student_PV)[:, None]
    _, _, grad_PV = TABLE.evaluate(policy_gradient, how, student_PV, teacher_PV, reference_PV)
    torch.testing.assert_close(grad_PV, truth_PV, rtol=1e-9, atol=1e-13)


logprobs = st.floats(min_value=-1e4, max_value=0.0)


@examples(max_examples=100, deadline=None)
@given(logprobs, logprobs, logprobs, st.floats(0.01, 4.0), st.floats(-2.0, 2.0))
def test_power_reward_is_bounded(s: float, t: float, r: float, power: float, c: float) -> None:
    values = [torch.tensor([x]) for x in (s, t, r)]
    how = ObjectiveSettings(reward_power=power)
    x = penalty(*values, how).item()
    assert -1.0 <= x <= 1.0
    assert x == pytest.approx(pow(torch.e, power * s) - pow(torch.e, power * t), abs=1e-5)
    assert abs(penalty(*values, replace(how, reference_coef=c)).item()) <= 1.0 + abs(c) + 1e-6


def test_log_ratio_clamp_bounds_each_difference() -> None:
    student = torch.tensor([-1.0, -1.0, -9.0, -1.0])
    rows = Rows(student, TokenScores(None, torch.tensor([-30.0, -2.5, -1.0, -1.0]), student + 7.0))
    free = policy_gradient(rows, ObjectiveSettings()).advantage_C
    assert free.tolist() == [-29.0, -1.5, 8.0, 0.0]
    settings = ObjectiveSettings(log_ratio_clamp=5.0, reference_coef=0.5)
    bounded = policy_gradient(rows, settings).advantage_C
    assert bounded.tolist() == [-2.5, 1.0, 7.5, 2.5]


# ---------------------------------------------------------------- clip, detaching, sft


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("advantage", [2.0, 0.5, 0.0, -0.5, -2.0])
def test_gradient_is_zero_exactly_where_the_clip_says(
    low: float, high: float, advantage: float
) -> None:
    edges = [1 - low - 1e-6, 1 - low + 1e-6, 1 + high - 1e-6, 1 + high + 1e-6]
    ratio = torch.tensor([0.01, 0.5, *edges, 1.0, 1.5, 20.0], dtype=torch.float64)
    old = torch.full_like(ratio, -1.3)
    student = (old + ratio.log()).requires_grad_()
    rows = Rows(student, TokenScores(old, old + advantage, None))
    settings = ObjectiveSettings(clip_low=low, clip_high=high, true_ratio=True)
    result = policy_gradient(rows, settings)
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)

    above, below = ratio > 1 + high, ratio < 1 - low
    clipped = above if advantage > 0 else below if advantage < 0 else torch.zeros_like(above)
    truth = torch.where(clipped, 0.0, -advantage * ratio)
    torch.testing.assert_close(grad, truth, rtol=1e-9, atol=0)
    assert torch.equal(result.clipped_C, clipped)
    bound = torch.where(above, 1 + high, torch.where(below, 1 - low, ratio))
    torch.testing.assert_close(
        result.loss_C, torch.where(clipped, -advantage * bound, -advantage * ratio)
    )
    torch.testing.assert_close(result.advantage_C, torch.full_like(ratio, advantage))
    torch.testing.assert_close(result.ratio_C, ratio)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_on_the_clips_edge_still_learns(advantage: float) -> None:
    ratio = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    student, old = ratio.log().requires_grad_(), torch.zeros_like(ratio)
    assert torch.equal(student.exp(), ratio)  # so that they lie on the edges exactly
    rows = Rows(student, TokenScores(old, old + advantage))
    how = ObjectiveSettings(clip_low=0.5, clip_high=1.0, true_ratio=True)
    result = policy_gradient(rows, how)
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)
    assert torch.equal(grad, -advantage * ratio) and not result.clipped_C.any()


@pytest.mark.parametrize("true_ratio", [False, True])
@by_baseline
def test_nothing_but_the_loss_carries_a_gradient(baseline: str, true_ratio: bool) -> None:
    how = replace(BASELINES[baseline], reference_coef=1.0, true_ratio=true_ratio)
    logits = [random_logits(7, 6, i) for i in range(3)]
    rows = rows_of(logits[0].requires_grad_(), *logits[1:], rollout_C=torch.randn(7) - 2.0)
    result = policy_gradient(rows, how)
    rest = (result.advantage_C, result.ratio_C, result.clipped_C)
    assert result.loss_C.requires_grad and not any(x.requires_grad for x in rest)
    assert not advantages(rows.logprob_C, rows, how).requires_grad


def test_sft_is_cross_entropy() -> None:
    student = torch.tensor([-0.1, -3.0], requires_grad=True)
    result = sft(Rows(student, TokenScores()), ObjectiveSettings())
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)
    assert result.loss_C.tolist() == pytest.approx([0.1, 3.0])
    assert grad.tolist() == [-1.0, -1.0]
