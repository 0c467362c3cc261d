"""Divergences over the vocabulary: their derivatives, their ends, their order, their optima."""

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
    random_logits,
    rows_of,
    support,
)
from torch import Tensor
from torch.nn.functional import kl_div

from opd_titan.config import load_config
from opd_titan.config.consistency import EXTRAPOLATES
from opd_titan.distill.head import FrozenHeads, loss_head
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings, TokenLoss
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.errors import ConfigError
from opd_titan.models.logits import Distribution, VocabHead

V = 9
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TOP_KS = [1, 3, V - 1, V, V + 5]
TOP_K = {"top_k_reverse_kl": "reverse_kl", "top_k_forward_kl": "forward_kl"}
# Every divergence with every number that is its own.
CASES = [
    ("reverse_kl", ObjectiveSettings()),
    ("forward_kl", ObjectiveSettings()),
    *(("jsd", ObjectiveSettings(beta=beta)) for beta in BETAS),
    *((name, ObjectiveSettings(top_k=k)) for name in TOP_K for k in TOP_KS),
]


def name_of(case: object) -> str:
    if isinstance(case, str):
        return case
    return (
        f"beta {case.beta}, k {case.top_k}" if isinstance(case, ObjectiveSettings) else repr(case)
    )


by_case = pytest.mark.parametrize(("name", "how"), CASES, ids=name_of)
SCALES = [0.01, 0.3, 1.0, 5.0, 20.0, 60.0]


def evaluate(
    name: str, how: ObjectiveSettings, student: Tensor, teacher: Tensor, reference: Tensor
) -> TokenLoss:
    return OBJECTIVES[name](rows_of(student, teacher, reference), how)


def logits_of_all_scales(vocab: int = V, seed: int = 0) -> list[Tensor]:
    """Student, teacher and reference [36 * 4, V]: each pair of scales four times."""
    scales = torch.tensor(SCALES, dtype=torch.float64)
    student, teacher = (
        x.flatten().repeat(4) for x in torch.meshgrid(scales, scales, indexing="ij")
    )
    n = len(student)
    reference = scales.repeat(n // len(SCALES) + 1)[:n]
    return [
        scale[:, None] * random_logits(n, vocab, 3 * seed + i)
        for i, scale in enumerate((student, teacher, reference))
    ]


def assert_is(result: TokenLoss, loss_C: Tensor, dlogits_CV: Tensor, tolerance: float) -> None:
    """Of the loss relative to itself, of the derivative relative to the loss, both at least 1."""
    for value, truth in ((result.loss_C, loss_C), (result.dlogits_Cv, dlogits_CV)):
        assert value.isfinite().all()
        size_C = loss_C.abs().clamp(min=1.0).view(-1, *[1] * (truth.dim() - 1))
        error = ((value.double() - truth).abs() / size_C).max().item()
        assert error < tolerance, f"{error:.1e}"


# ---------------------------------------------------------------- value and derivative


@pytest.mark.parametrize("c", [0.0, 0.7, -0.4])
@by_case
def test_loss_and_derivative_are_those_of_the_plain_formula(
    name: str, how: ObjectiveSettings, c: float
) -> None:
    how = replace(how, reference_coef=c)
    logits = logits_of_all_scales()
    assert_is(evaluate(name, how, *logits), *gradient_of_divergence(name, *logits, how), 1e-11)
    # The same numbers in fp32: both sides start from the rounded ones.
    logits = [x.float() for x in logits]
    assert_is(evaluate(name, how, *logits), *gradient_of_divergence(name, *logits, how), 2e-5)


@st.composite
def three_logits(draw: st.DrawFn) -> list[Tensor]:
    """Student, teacher, reference [8, V], each of its own scale; with ties if rounded."""
    vocab, seed = draw(st.integers(5, 12)), draw(st.integers(0, 2**20))
    scales = [draw(st.sampled_from(SCALES)) for _ in range(3)]
    tied, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float64, torch.float32]))
    logits = [random_logits(8, vocab, 3 * seed + i, scale) for i, scale in enumerate(scales)]
    return [(x.round() if tied else x).to(dtype) for x in logits]


numbers = st.builds(
    ObjectiveSettings,
    beta=st.one_of(st.sampled_from(BETAS), st.floats(1e-4, 1.0 - 1e-4)),
    top_k=st.integers(1, 14),
    reference_coef=st.one_of(st.just(0.0), st.floats(-0.9, 3.0)),
)


@examples(max_examples=400, deadline=None)
@given(st.sampled_from(sorted({name for name, _ in CASES})), numbers, three_logits())
def test_derivative_of_any_divergence_at_any_logits(
    name: str, how: ObjectiveSettings, logits: list[Tensor]
) -> None:
    truth = gradient_of_divergence(name, *logits, how)
    tolerance = 1e-11 if logits[0].dtype == torch.float64 else 2e-5
    result = evaluate(name, how, *logits)
    assert_is(result, *truth, tolerance * (1.0 + abs(how.reference_coef)))
    # Logits that all rise by as much change nothing.
    drift = result.dlogits_Cv.sum(1).abs().max().item()
    assert drift < 10 * tolerance * max(1.0, truth[0].abs().max().item())


@by_case
def test_a_student_surer_than_the_teacher_by_far_keeps_an_exact_derivative(
    name: str, how: ObjectiveSettings
) -> None:
    """The teacher gives tokens mass to which the student gives next to none, or none in fp32."""
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0, 80.0, 120.0], dtype=torch.float32)
    student, teacher = torch.zeros(6, V), torch.zeros(6, V)
    student[:, 0], teacher[:, 0] = gaps, 2.0
    student[:, 1], teacher[:, 1] = gaps - 1.0, 1.0
    logits = [student, teacher, teacher]
    assert_is(evaluate(name, how, *logits), *gradient_of_divergence(name, *logits, how), 1e-5)


def test_advantages_are_those_of_the_sampled_token() -> None:
    logits, tokens = [random_logits(V, V, i) for i in range(3)], torch.arange(V)
    s, t, r = (x.log_softmax(1).diagonal() for x in logits)
    for name, how in CASES:
        rows = rows_of(*logits, tokens_C=tokens)
        result = OBJECTIVES[name](rows, replace(how, reference_coef=0.5))
        torch.testing.assert_close(result.advantage_C, (t - s) + 0.5 * (r - s))


# ---------------------------------------------------------------- relations between them


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_the_published_one(beta: float) -> None:
    """As TRL's GKD writes it: `kl_div(input, target)` is KL(target || input)."""
    logits = logits_of_all_scales()
    student, teacher = (x.log_softmax(1) for x in logits[:2])
    mixture = (beta * teacher.exp() + (1.0 - beta) * student.exp()).log()

    def divergence(input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction="none", log_target=True).sum(1)

    if beta == 0.0:
        truth = divergence(student, teacher)
    elif beta == 1.0:
        truth = divergence(teacher, student)
    else:
        truth = beta * divergence(mixture, teacher) + (1.0 - beta) * divergence(mixture, student)
    loss_C = evaluate("jsd", ObjectiveSettings(beta=beta), *logits).loss_C
    torch.testing.assert_close(loss_C, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("end", "other"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsds_ends_are_the_forward_and_the_reverse_kl(end: float, other: str) -> None:
    how = ObjectiveSettings(reference_coef=0.3)
    logits = logits_of_all_scales()
    at_end, truth = evaluate("jsd", replace(how, beta=end), *logits), evaluate(other, how, *logits)
    assert torch.equal(at_end.loss_C, truth.loss_C)
    assert torch.equal(at_end.dlogits_Cv, truth.dlogits_Cv)
    # And it goes there: each tenth of the distance takes nine tenths of the difference.
    logits = [random_logits(20, V, i) for i in range(3)]
    truth = evaluate(other, ObjectiveSettings(), *logits)
    errors = []
    for distance in (1e-3, 1e-4, 1e-5):
        near = evaluate("jsd", ObjectiveSettings(beta=abs(end - distance)), *logits)
        gaps = near.loss_C / distance - truth.loss_C, near.dlogits_Cv / distance - truth.dlogits_Cv
        errors.append([x.abs().max().item() for x in gaps])
    for before, after in zip(errors, errors[1:], strict=False):
        assert after == pytest.approx([x / 10 for x in before], rel=0.1)
    assert max(errors[-1]) < 1e-2


@pytest.mark.parametrize("c", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("k", [V, V + 5])
@pytest.mark.parametrize("name", TOP_K)
def test_top_k_of_all_tokens_is_the_whole_divergence(name: str, k: int, c: float) -> None:
    how = ObjectiveSettings(top_k=k, reference_coef=c)
    logits = logits_of_all_scales()
    ours, whole = evaluate(name, how, *logits), evaluate(TOP_K[name], how, *logits)
    torch.testing.assert_close(ours.loss_C, whole.loss_C, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.dlogits_Cv, whole.dlogits_Cv, rtol=1e-9, atol=1e-11)


@examples(max_examples=100, deadline=None)
@given(three_logits(), numbers)
@example([torch.zeros(2, 5)] * 3, ObjectiveSettings())
def test_divergences_are_positive_and_buckets_only_lose(
    logits: list[Tensor], how: ObjectiveSettings
) -> None:
    """The data processing inequality: what is told apart by buckets is told apart by tokens."""
    how = replace(how, reference_coef=0.0)
    rounding = 1e-12 if logits[0].dtype == torch.float64 else 1e-4
    loss = {name: evaluate(name, how, *logits).loss_C for name, _ in CASES}
    for name, loss_C in loss.items():
        assert (loss_C >= -rounding).all(), name
    for name, whole in TOP_K.items():
        assert (loss[name] <= loss[whole] + rounding * (1.0 + loss[whole])).all(), name
    # Pinsker: it is 0 only for equal buckets.
    student, teacher = (x.log_softmax(1) for x in logits[:2])
    for name, chooser in (("top_k_reverse_kl", student), ("top_k_forward_kl", teacher)):
        ids = support(chooser, how.top_k)
        apart = (bucketed(student, ids).exp() - bucketed(teacher, ids).exp()).abs().sum(1)
        assert (loss[name] >= 0.5 * apart.square() - rounding).all(), name


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_is_zero_for_equal_buckets_and_sees_a_difference_in_the_rest(name: str) -> None:
    """The rest may be shared out otherwise. Its size counts, though the k tokens' ratios agree."""
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
    truth = kl(s, t) if name == "top_k_reverse_kl" else kl(t, s)
    torch.testing.assert_close(other.loss_C, truth)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_support_is_the_students_for_reverse_and_the_teachers_for_forward(k: int) -> None:
    logits = [random_logits(30, V, i, 2.0) for i in range(3)]
    student, teacher = (x.log_softmax(1) for x in logits[:2])
    how = ObjectiveSettings(top_k=k)
    on_student, on_teacher = (
        [bucketed(x, support(chooser, k)) for x in (student, teacher)]
        for chooser in (student, teacher)
    )
    reverse = evaluate("top_k_reverse_kl", how, *logits).loss_C
    torch.testing.assert_close(reverse, kl(*on_student))
    assert (reverse - kl(*on_teacher)).abs().max() > 0.1
    forward = evaluate("top_k_forward_kl", how, *logits).loss_C
    torch.testing.assert_close(forward, kl(*reversed(on_teacher)))
    assert (forward - kl(*reversed(on_student))).abs().max() > 0.1


# ---------------------------------------------------------------- optima


TABLE = Table(5, 3)


def minimise(name: str, how: ObjectiveSettings, rate: float, *others: Tensor) -> Tensor:
    """Log-probs [P, V] that plain descent reaches on the mean gradient over all responses."""
    student_PV = TABLE.random_logits(0)
    for _ in range(1000):
        _, _, grad_PV = TABLE.evaluate(OBJECTIVES[name], how, student_PV, *others)
        # A prefix is as good as another here, however rare: it moves no optimum.
        step_PV = rate * grad_PV / TABLE.prefix_probs(student_PV)[:, None]
        if step_PV.abs().max() < 1e-8:
            break
        student_PV -= step_PV
    return student_PV.log_softmax(1)


@pytest.mark.parametrize(
    ("name", "beta"),
    [("forward_kl", 0.5), ("reverse_kl", 0.5), *(("jsd", b) for b in BETAS)],
)
def test_without_a_reference_the_teacher_is_reached(name: str, beta: float) -> None:
    others = TABLE.random_logits(1), TABLE.random_logits(2)
    # Towards its ends the JSD goes to 0 as fast as beta or as 1 - beta does.
    rate = 2.0 / (beta * (1.0 - beta)) if name == "jsd" and 0.0 < beta < 1.0 else 2.0
    student = minimise(name, ObjectiveSettings(beta=beta), rate, *others)
    torch.testing.assert_close(student.exp(), others[0].softmax(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", TOP_K)
def test_top_k_reaches_the_teacher_as_far_as_it_can_see(name: str, k: int) -> None:
    others = TABLE.random_logits(1), TABLE.random_logits(2)
    student = minimise(name, ObjectiveSettings(top_k=k), 1.0, *others)
    teacher = others[0].log_softmax(1)
    ids = support(student if name == "top_k_reverse_kl" else teacher, k)
    seen = [bucketed(x, ids).exp() for x in (student, teacher)]
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-8)
    assert (student.exp() - teacher.exp()).abs().max() > 0.01


# ---------------------------------------------------------------- through the head


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", [*TOP_K, "reverse_kl", "forward_kl", "jsd"])
def test_gradients_reach_the_hidden_states_at_the_sampling_temperature(
    monkeypatch: pytest.MonkeyPatch, name: str, temperature: float
) -> None:
    """All models' logits are divided by it, and the student's gradient is."""
    monkeypatch.setattr("opd_titan.distill.head.CHUNK_BYTES", {"cpu": 9 * V * 4})
    tokens, widths = 10, (6, 4, 8)
    hidden = [torch.randn(tokens, d, generator=torch.Generator().manual_seed(d)) for d in widths]
    weight = [torch.randn(V, d, generator=torch.Generator().manual_seed(9 + d)) for d in widths]
    hidden[0].requires_grad_(), weight[0].requires_grad_()
    how = ObjectiveSettings(reference_coef=0.7, beta=0.3, top_k=3)
    loss, _ = loss_head(
        hidden[0],
        weight[0],
        predict_R=torch.arange(tokens),
        targets_R=torch.arange(tokens) % V,
        scores=TokenScores(teacher_hidden=hidden[1], reference_hidden=hidden[2]),
        scale=0.25,
        objective=OBJECTIVES[name],
        settings=how,
        dist=Distribution(temperature),
        frozen=FrozenHeads(VocabHead(weight[1]), VocabHead(weight[2])),
    )
    student, *others = (h @ w.t() / temperature for h, w in zip(hidden, weight, strict=True))
    loss_R, dlogits_RV = gradient_of_divergence(name, student, *others, how)
    torch.testing.assert_close(loss.double(), 0.25 * loss_R.sum(), rtol=1e-5, atol=1e-6)
    truth = torch.autograd.grad(student, (hidden[0], weight[0]), 0.25 * dlogits_RV.float())
    ours = torch.autograd.grad(loss, (hidden[0], weight[0]))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------- a negative reference.coef


def optimised(name: str, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """log S after optimisation from the reference, log T, and log S* of this c."""
    g = torch.Generator().manual_seed(0)
    reference = 4.0 * torch.randn(1, 500, generator=g, dtype=torch.float64)
    teacher = reference + torch.randn(1, 500, generator=g, dtype=torch.float64)
    how = ObjectiveSettings(reference_coef=c)
    student = torch.nn.Parameter(reference.clone())
    optimizer = torch.optim.Adam([student], lr=0.05)
    log_t, log_r = teacher.log_softmax(1), reference.log_softmax(1)
    for _ in range(1500):
        student.grad = evaluate(name, how, student.detach(), teacher, reference).dlogits_Cv
        optimizer.step()
    log_star = ((log_t + c * log_r) / (1.0 + c)).log_softmax(1)
    return student.detach().log_softmax(1), log_t, log_star


def distance(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum().item()


def test_a_kl_from_the_student_extrapolates_to_its_optimum() -> None:
    log_s, log_t, log_star = optimised("reverse_kl", -0.3)
    assert distance(log_s, log_star) < 1e-3 < distance(log_star, log_t)


def test_jsd_with_a_negative_coefficient_runs_away_so_the_config_refuses_it() -> None:
    log_s, log_t, _ = optimised("jsd", -0.3)
    token = log_s.argmax()
    assert log_s.max().exp() > 0.99 and log_t[0, token] < -5.0
    for name in OBJECTIVES:
        argv = ["--student.hf_path", "s", "--teacher.hf_path", "t", "--reference.coef", "-0.3"]
        argv += ["--distill.objective", name]
        if name in EXTRAPOLATES:
            assert load_config(argv).reference.coef == -0.3
        elif name != "sft":
            with pytest.raises(ConfigError, match="reference.*coef.*-0.3 contradicts"):
                load_config(argv)
