"""Objectives by enumeration: expected gradients over all responses, and derivatives by autograd.

One defect of the prototype (design.md, section 3) would change every expected gradient below: a
broadcast mixed the advantages of different sequences.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny_vocabulary import (
    Table,
    bucketed,
    gradient_of_divergence,
    kl,
    plain_penalty,
    random_logits,
    rows_of,
    support,
)
from torch import Tensor

from opd_titan.distill.objectives import (
    OBJECTIVES,
    ObjectiveSettings,
    TokenLoss,
    advantages,
    expected_penalty,
    penalty,
    policy_gradient,
    reverse_kl,
)
from opd_titan.distill.vocabulary import Rows, TokenScores

TABLES = [Table(5, 4), Table(12, 2)]
TABLE = Table(5, 3)
COEFFICIENTS = [0.0, 1.0, -0.5]
by_coefficient = pytest.mark.parametrize("c", COEFFICIENTS)
by_table = pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.vocab}^{t.length}")
BASELINES = {
    "none": ObjectiveSettings(),
    "kl": ObjectiveSettings(baseline="kl"),
    "top_k": ObjectiveSettings(baseline="top_k", top_k=2),
}
by_baseline = pytest.mark.parametrize("baseline", BASELINES)
BOUNDS = {"free": {}, "clamp": {"log_ratio_clamp": 0.4}, "power": {"reward_power": 0.7}}
by_bound = pytest.mark.parametrize("bound", BOUNDS)


# ---------------------------------------------------------------- the policy gradient


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


@pytest.mark.parametrize("sampler", ["same student", "older student"])
@by_coefficient
@by_bound
@by_baseline
@by_table
def test_expected_gradient_of_the_policy_gradient(
    table: Table, baseline: str, bound: str, c: float, sampler: str
) -> None:
    """It is the gradient of the expected penalty of the next token, summed over prefixes.

    The probability of a prefix and the penalty x are constants. Without bounds x is the log ratio,
    and the sum is KL(S||T) + c KL(S||R). A baseline does not change it. If the responses are those
    of an older student, the ratio weights them, and the penalty is still the present student's.
    """
    student_PV = table.random_logits(0).requires_grad_()
    others = [table.random_logits(1), table.random_logits(2)]
    how = replace(BASELINES[baseline], reference_coef=c, **BOUNDS[bound])
    old_PV = student_PV.detach()
    if sampler == "older student":
        others.append(table.random_logits(3))
        old_PV = others[2]
        how = replace(how, true_ratio=True, clip_low=1.0, clip_high=1e9)
    result, loss, grad_PV = table.evaluate(policy_gradient, how, student_PV, *others)
    old, t, r = (x.log_softmax(1) for x in (old_PV, *others[:2]))
    x_PV = plain_penalty(student_PV.detach().log_softmax(1), t, r, how)
    truth = (table.prefix_probs(old_PV) * (student_PV.softmax(1) * x_PV).sum(1)).sum()
    (true_grad_PV,) = torch.autograd.grad(truth, student_PV)
    assert true_grad_PV.abs().max() > 0.01
    torch.testing.assert_close(grad_PV, true_grad_PV, rtol=1e-9, atol=1e-12)
    ratio_F = (student_PV.detach().log_softmax(1) - old)[table.rows_F, table.tokens_F].exp()
    torch.testing.assert_close(result.ratio_C, ratio_F)
    assert not result.clipped_C.any()
    assert (ratio_F.max().item() > 2.0) is (sampler == "older student")
    # The expected loss is the penalty, less what the baseline subtracts.
    if baseline == "none":
        assert loss.item() == pytest.approx(truth.item(), rel=1e-10)
    elif baseline == "kl":
        assert loss.item() == pytest.approx(0.0, abs=1e-12)


def sum_of_kls(table: Table, c: float, student_PV: Tensor, *others: Tensor) -> Tensor:
    """Return the sum over prefixes of P(prefix), a constant, times KL(S||T) + c KL(S||R)."""
    s_PV, t_PV, r_PV = (x.log_softmax(1) for x in (student_PV, *others))
    return (table.prefix_probs(student_PV.detach()) * (kl(s_PV, t_PV) + c * kl(s_PV, r_PV))).sum()


@by_coefficient
@pytest.mark.parametrize("objective", [policy_gradient, reverse_kl], ids=lambda f: f.__name__)
def test_the_sampled_and_the_exact_objective_have_one_gradient_and_one_optimum(
    objective, c: float
) -> None:
    """The optimum is the normalized weighted geometric mean (T R^c)^(1 / (1 + c))."""
    others = TABLE.random_logits(1), TABLE.random_logits(2)
    how = ObjectiveSettings(reference_coef=c)
    student_PV = TABLE.random_logits(0).requires_grad_()
    _, loss, grad_PV = TABLE.evaluate(objective, how, student_PV, *others)
    truth = sum_of_kls(TABLE, c, student_PV, *others)
    (true_grad_PV,) = torch.autograd.grad(truth, student_PV)
    torch.testing.assert_close(grad_PV, true_grad_PV, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-10)

    student_PV = student_PV.detach()
    for _ in range(150):
        _, _, grad_PV = TABLE.evaluate(objective, how, student_PV, *others)
        # Division by the probability of prefix and token does not change the optimum. Without it,
        # rare tokens have small gradients and would need thousands of steps.
        reach_P = TABLE.prefix_probs(student_PV)
        student_PV = student_PV - 0.3 * grad_PV / (reach_P[:, None] * student_PV.softmax(1))
    t, r = (x.log_softmax(1) for x in others)
    optimum = ((t + c * r) / (1 + c)).softmax(1)
    torch.testing.assert_close(student_PV.softmax(1), optimum, rtol=1e-6, atol=1e-9)
    if c:  # the teacher alone is another distribution
        assert (optimum - t.exp()).abs().max() > 0.1


# ---------------------------------------------------------------- penalty and baseline


def every_token(student_NV: Tensor, *others: Tensor) -> Rows:
    """Return each row of logits V times, with each token of the vocabulary as the sampled one."""
    rows, vocab = student_NV.shape
    logits = [x.repeat_interleave(vocab, 0) for x in (student_NV, *others)]
    made = rows_of(*logits, tokens_C=torch.arange(vocab).repeat(rows))
    made.logprob_C.requires_grad_()
    return made


def gradient_moments(
    student_NV: Tensor, teacher_NV: Tensor, how: ObjectiveSettings
) -> tuple[Tensor, Tensor]:
    """Return mean [N, V] and total variance [N] of one token's gradient by the logits, exactly."""
    rows = every_token(student_NV, teacher_NV)
    (g_C,) = torch.autograd.grad(policy_gradient(rows, how).loss_C.sum(), rows.logprob_C)
    probs_NV = student_NV.softmax(1)
    vocab = probs_NV.shape[1]
    score_NVV = torch.eye(vocab, dtype=torch.float64) - probs_NV[:, None]  # token, logit
    grad_NVV = g_C.view(-1, vocab, 1) * score_NVV
    mean_NV = (probs_NV[:, :, None] * grad_NVV).sum(1)
    square_N = (probs_NV[:, :, None] * grad_NVV.square()).sum((1, 2))
    return mean_NV, square_N - mean_NV.square().sum(1)


# Scale of the student's and of the teacher's logits, and the largest remaining share of variance.
PAIRS = {
    "nothing in common": (1.0, 1.0, 0.85),
    "both sure, of different tokens": (3.0, 3.0, 0.6),
    "a flat student": (0.3, 3.0, 0.8),
    # The baseline adds more to the likely token's advantage than it subtracts from the others'.
    "a sure student and a flat teacher": (3.0, 0.3, None),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_baseline_leaves_the_mean_and_changes_the_variance(case: str) -> None:
    student_scale, teacher_scale, most = PAIRS[case]
    student_NV = random_logits(300, 12, 1, student_scale)
    teacher_NV = random_logits(300, 12, 2, teacher_scale)
    mean_NV, variance_N = gradient_moments(student_NV, teacher_NV, ObjectiveSettings())
    for baseline in ("kl", "top_k"):
        other_NV, other_N = gradient_moments(student_NV, teacher_NV, BASELINES[baseline])
        torch.testing.assert_close(other_NV, mean_NV, rtol=0, atol=1e-12)
        share = other_N.sum() / variance_N.sum()
        assert share > 1.1 if most is None and baseline == "kl" else share < (most or 2.0), baseline


@by_coefficient
@by_bound
def test_the_baseline_is_the_expected_penalty(bound: str, c: float) -> None:
    logits = [random_logits(20, 9, i, 2.0) for i in range(3)]
    how = ObjectiveSettings(reference_coef=c, baseline="kl", **BOUNDS[bound])
    s, t, r = (x.log_softmax(1) for x in logits)
    mean_N = (s.exp() * plain_penalty(s, t, r, how)).sum(1)
    torch.testing.assert_close(expected_penalty(rows_of(*logits), how), mean_N)
    # The advantage is 0 on average.
    advantage_NV = policy_gradient(every_token(*logits), how).advantage_C.view(20, 9)
    assert (s.exp() * advantage_NV).sum(1).abs().max() < 1e-12
    # Top-k is exact if k is at least the vocabulary's size; otherwise the rest is one bucket.
    for k in (2, 9, 50):
        top_k_N = expected_penalty(rows_of(*logits), replace(how, baseline="top_k", top_k=k))
        s_NB, t_NB, r_NB = (bucketed(x, support(s, k)) for x in (s, t, r))
        truth_N = (s_NB.exp() * plain_penalty(s_NB, t_NB, r_NB, how)).sum(1)
        torch.testing.assert_close(top_k_N, truth_N)
        assert torch.allclose(truth_N, mean_N) is (k > 2)


logprobs = st.floats(min_value=-1e4, max_value=0.0)


@examples(max_examples=60, deadline=None)
@given(logprobs, logprobs, logprobs, st.floats(0.01, 4.0), st.floats(-2.0, 2.0))
def test_bounded_penalties(s: float, t: float, r: float, bound: float, c: float) -> None:
    values = [torch.tensor([x], dtype=torch.float64) for x in (s, t, r)]
    for settings, limit in (({"reward_power": bound}, 1.0), ({"log_ratio_clamp": bound}, bound)):
        how = ObjectiveSettings(reference_coef=c, **settings)
        x = penalty(*values, how)
        assert abs(x.item()) <= (1.0 + abs(c)) * limit + 1e-9
        torch.testing.assert_close(x, plain_penalty(*values, how), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- clip, detaching, sft


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("advantage", [2.0, 0.5, 0.0, -0.5, -2.0])
def test_gradient_is_zero_exactly_where_the_clip_acts(
    low: float, high: float, advantage: float
) -> None:
    edges = [1 - low - 1e-6, 1 - low + 1e-6, 1 + high - 1e-6, 1 + high + 1e-6]
    ratio = torch.tensor([0.01, 0.5, *edges, 1.0, 1.5, 20.0], dtype=torch.float64)
    old = torch.full_like(ratio, -1.3)
    student = (old + ratio.log()).requires_grad_()
    rows = Rows(student, TokenScores(old, student.detach() + advantage, None))
    how = ObjectiveSettings(clip_low=low, clip_high=high, true_ratio=True)
    result = policy_gradient(rows, how)
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)

    above, below = ratio > 1 + high, ratio < 1 - low
    clipped = above if advantage > 0 else below if advantage < 0 else torch.zeros_like(above)
    bound = torch.where(above, 1 + high, torch.where(below, 1 - low, ratio))
    truth = torch.where(clipped, 0.0, -advantage * ratio)
    torch.testing.assert_close(grad, truth, rtol=1e-9, atol=0)
    assert torch.equal(result.clipped_C, clipped)
    loss = -advantage * torch.where(clipped, bound, ratio)
    torch.testing.assert_close(result.loss_C, loss)
    torch.testing.assert_close(result.advantage_C, torch.full_like(ratio, advantage))
    torch.testing.assert_close(result.ratio_C, ratio)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_on_the_edge_of_the_clip_still_has_a_gradient(advantage: float) -> None:
    ratio = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    student, old = ratio.log().requires_grad_(), torch.zeros_like(ratio)
    assert torch.equal(student.exp(), ratio)  # the edges are exact
    rows = Rows(student, TokenScores(old, student.detach() + advantage))
    how = ObjectiveSettings(clip_low=0.5, clip_high=1.0, true_ratio=True)
    result = policy_gradient(rows, how)
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)
    assert torch.equal(grad, -advantage * ratio) and not result.clipped_C.any()


def test_log_probs_that_were_taken_cannot_be_read_again() -> None:
    student, teacher = (random_logits(4, 6, i) for i in range(2))
    rows = rows_of(student, teacher)
    torch.testing.assert_close(rows.teacher_Cv, teacher.log_softmax(1))
    rows.teacher.take_logprobs().zero_()
    with pytest.raises(AssertionError, match="taken"):
        _ = rows.teacher_Cv
    with pytest.raises(AssertionError, match="taken"):
        rows.kl_gradient(rows.teacher)
    torch.testing.assert_close(rows.student_Cv, student.log_softmax(1))


@pytest.mark.parametrize("true_ratio", [False, True])
@by_baseline
def test_only_the_loss_carries_a_gradient(baseline: str, true_ratio: bool) -> None:
    how = replace(BASELINES[baseline], reference_coef=1.0, true_ratio=true_ratio)
    logits = [random_logits(7, 6, i) for i in range(3)]
    rows = rows_of(logits[0].requires_grad_(), *logits[1:], rollout_C=torch.randn(7) - 2.0)
    result = policy_gradient(rows, how)
    rest = (result.advantage_C, result.ratio_C, result.clipped_C)
    assert result.loss_C.requires_grad and not any(x.requires_grad for x in rest)
    assert not advantages(rows, how).requires_grad


# ---------------------------------------------------------------- divergences

V = 9
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TOP_K = {"top_k_reverse_kl": "reverse_kl", "top_k_forward_kl": "forward_kl"}
# Every divergence with every value of its own setting.
CASES = [
    ("reverse_kl", ObjectiveSettings()),
    ("forward_kl", ObjectiveSettings()),
    *(("jsd", ObjectiveSettings(beta=beta)) for beta in BETAS),
    *((name, ObjectiveSettings(top_k=k)) for name in TOP_K for k in (1, 3, V - 1, V, V + 5)),
]
by_case = pytest.mark.parametrize(
    ("name", "how"),
    CASES,
    ids=[f"{name}-beta {how.beta}, k {how.top_k}" for name, how in CASES],
)
SCALES = [0.01, 0.3, 1.0, 5.0, 20.0, 60.0]


def evaluate(name: str, how: ObjectiveSettings, *logits: Tensor) -> TokenLoss:
    """Evaluate a divergence of student, teacher and reference."""
    return OBJECTIVES[name](rows_of(*logits), how)


def logits_of_all_scales() -> list[Tensor]:
    """Return student, teacher and reference [150, V]: each pair of scales four times.

    The last students are far more certain than the teacher: tokens that have probability under the
    teacher have almost none under the student, or none in fp32.
    """
    scales = torch.tensor(SCALES, dtype=torch.float64)
    first, second = (x.flatten().repeat(4) for x in torch.meshgrid(scales, scales, indexing="ij"))
    models = zip((first, second, scales.repeat(24)), range(3), strict=True)
    student, teacher, reference = (x[:, None] * random_logits(144, V, i) for x, i in models)
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0, 80.0, 120.0])
    sure, unsure = torch.zeros(6, V), torch.zeros(6, V)
    sure[:, 0], unsure[:, 0] = gaps, 2.0
    sure[:, 1], unsure[:, 1] = gaps - 1.0, 1.0
    pairs = ((student, sure), (teacher, unsure), (reference, unsure))
    return [torch.cat((x, y.double())) for x, y in pairs]


def assert_is(result: TokenLoss, loss_C: Tensor, dlogits_CV: Tensor, tolerance: float) -> None:
    """Compare loss and derivative, with errors relative to the loss (or to 1)."""
    for value, truth in ((result.loss_C, loss_C), (result.dlogits_Cv, dlogits_CV)):
        assert value.isfinite().all()
        size_C = loss_C.abs().clamp(min=1.0).view(-1, *[1] * (truth.dim() - 1))
        error = ((value.double() - truth).abs() / size_C).max().item()
        assert error < tolerance, f"{error:.1e}"


@by_case
def test_loss_and_derivative_are_those_of_the_plain_formula(
    name: str, how: ObjectiveSettings
) -> None:
    for c in (0.0, 0.7, -0.4):
        how = replace(how, reference_coef=c)
        logits = logits_of_all_scales()
        assert_is(evaluate(name, how, *logits), *gradient_of_divergence(name, *logits, how), 1e-11)
        # Both use the rounded logits.
        logits = [x.float() for x in logits]
        assert_is(evaluate(name, how, *logits), *gradient_of_divergence(name, *logits, how), 2e-5)
    s, t, r = (x.log_softmax(1)[:, 0] for x in logits)
    advantage_C = evaluate(name, how, *logits).advantage_C  # of token 0, as if it was sampled
    torch.testing.assert_close(advantage_C, (t - s) - 0.4 * (r - s))


@st.composite
def three_logits(draw: st.DrawFn) -> list[Tensor]:
    """Student, teacher, reference [8, V], each of its own scale; with ties if rounded."""
    vocab, seed = draw(st.integers(5, 12)), draw(st.integers(0, 2**20))
    scales = [draw(st.sampled_from(SCALES)) for _ in range(3)]
    logits = [random_logits(8, vocab, 3 * seed + i, scale) for i, scale in enumerate(scales)]
    return [x.round() for x in logits] if draw(st.booleans()) else logits


settings_of_divergences = st.builds(
    ObjectiveSettings,
    beta=st.one_of(st.sampled_from(BETAS), st.floats(1e-4, 1.0 - 1e-4)),
    top_k=st.integers(1, 14),
    reference_coef=st.one_of(st.just(0.0), st.floats(-0.9, 3.0)),
)


@examples(max_examples=60, deadline=None)
@given(three_logits(), settings_of_divergences)
@example([torch.zeros(2, 5, dtype=torch.float64)] * 3, ObjectiveSettings())
def test_any_divergence_at_any_logits(logits: list[Tensor], how: ObjectiveSettings) -> None:
    loss = {}
    for name in dict.fromkeys(name for name, _ in CASES):
        truth = gradient_of_divergence(name, *logits, how)
        result = evaluate(name, how, *logits)
        assert_is(result, *truth, 1e-11 * (1.0 + abs(how.reference_coef)))
        # Adding a constant to all logits changes nothing.
        assert result.dlogits_Cv.sum(1).abs().max() < 1e-10 * max(1.0, truth[0].abs().max())
        loss[name] = evaluate(name, replace(how, reference_coef=0.0), *logits).loss_C
        assert (loss[name] >= -1e-12).all(), name
    # Data processing inequality: the loss of buckets is at most that of tokens. Pinsker's
    # inequality: the loss is 0 only if the buckets are equal.
    student, teacher = (x.log_softmax(1) for x in logits[:2])
    for (name, whole), chooser in zip(TOP_K.items(), (student, teacher), strict=True):
        assert (loss[name] <= loss[whole] + 1e-12 * (1.0 + loss[whole])).all(), name
        ids = support(chooser, how.top_k)
        apart = (bucketed(student, ids).exp() - bucketed(teacher, ids).exp()).abs().sum(1)
        assert (loss[name] >= 0.5 * apart.square() - 1e-12).all(), name


@pytest.mark.parametrize(("end", "other"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_approaches_the_forward_and_the_reverse_kl(end: float, other: str) -> None:
    """Divided by the distance from the end, it is the limit within about that distance."""
    logits = [random_logits(20, V, i) for i in range(3)]
    truth = evaluate(other, ObjectiveSettings(), *logits)
    for distance in (1e-3, 1e-5):
        near = evaluate("jsd", ObjectiveSettings(beta=abs(end - distance)), *logits)
        for value, limit in ((near.loss_C, truth.loss_C), (near.dlogits_Cv, truth.dlogits_Cv)):
            assert (value / distance - limit).abs().max() < 1e3 * distance


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_sees_the_size_of_the_rest_and_not_how_it_is_divided(name: str) -> None:
    how = ObjectiveSettings(top_k=3)
    student = torch.tensor([[0.4, 0.2, 0.15, 0.1, 0.1, 0.05]], dtype=torch.float64)
    shuffled = torch.tensor([[0.4, 0.2, 0.15, 0.01, 0.11, 0.13]], dtype=torch.float64)
    same = evaluate(name, how, student.log(), shuffled.log(), student)
    assert same.loss_C.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(same.dlogits_Cv, torch.zeros_like(student), rtol=0, atol=1e-15)
    assert evaluate(TOP_K[name], how, student.log(), shuffled.log(), student).loss_C > 0.05

    smaller = torch.cat((student[:, :3] * 1.2, student[:, 3:] * 0.4), dim=1)
    other = evaluate(name, how, student.log(), smaller.log(), student)
    s, t = torch.tensor([[0.75, 0.25]]).double().log(), torch.tensor([[0.9, 0.1]]).double().log()
    torch.testing.assert_close(other.loss_C, kl(s, t) if name == "top_k_reverse_kl" else kl(t, s))
