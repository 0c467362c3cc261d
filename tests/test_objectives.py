"""The objective against enumeration of every response, and the update that follows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from distributed_utils import lone_world
from tiny_student import (
    all_responses,
    naive_logprobs,
    one_process_group,
    random_samples,
    tiny_qwen3,
    with_rollout_logprobs,
)
from torch import Tensor

from opd_titan.distill.objectives import (
    OBJECTIVES,
    ObjectiveSettings,
    TokenScores,
    policy_gradient,
    reverse_kl_advantage,
    sft,
)
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.world import ALONE
from opd_titan.models.logits import Distribution

VOCAB, STOP, LENGTH = 5, 0, 3


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process_group():
        yield


# ---------------------------------------------------------------- enumeration


class Table:
    """A policy as a table of logits, one row per prefix, and every response it can give.

    rows_F, tokens_F, owner_F: for every token of every response its prefix's row, its id and the
    response it belongs to.
    """

    def __init__(self) -> None:
        responses = all_responses(VOCAB, STOP, LENGTH)
        rows: dict[tuple[int, ...], int] = {}
        flat = []
        for owner, ids in enumerate(responses):
            for t, token in enumerate(ids):
                flat.append((rows.setdefault(ids[:t], len(rows)), token, owner))
        self.rows_F, self.tokens_F, self.owner_F = torch.tensor(flat).t()
        self.prefixes, self.num_responses = rows, len(responses)

    def random_logits(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(self.prefixes), VOCAB, generator=generator, dtype=torch.float64)

    def token_logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(1)[self.rows_F, self.tokens_F]

    def response_probs(self, logits: Tensor) -> Tensor:
        logprob = torch.zeros(self.num_responses, dtype=torch.float64)
        return logprob.index_add(0, self.owner_F, self.token_logprobs(logits)).exp()

    def prefix_probs(self, logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(1)
        totals = [
            sum((logprobs[self.prefixes[p[:t]], token] for t, token in enumerate(p)), start=0.0)
            for p in self.prefixes
        ]
        return torch.as_tensor(totals, dtype=torch.float64).exp()


TABLE = Table()


def expected_loss(student: Tensor, teacher: Tensor, reference: Tensor, c: float, **kw) -> Tensor:
    """Our objective on every response, weighted by the student's detached probability of it."""
    logprob_F = TABLE.token_logprobs(student)
    scores = TokenScores(
        logprob_F.detach(), TABLE.token_logprobs(teacher), TABLE.token_logprobs(reference)
    )
    loss_F = policy_gradient(logprob_F, scores, ObjectiveSettings(reference_coef=c, **kw)).loss_C
    return (TABLE.response_probs(student.detach())[TABLE.owner_F] * loss_F).sum()


def kl_of_steps(student: Tensor, teacher: Tensor, reference: Tensor, c: float) -> Tensor:
    """Sum over prefixes of P(prefix), detached, times KL(S||T) + c KL(S||R) of the next token."""
    s, t, r = (x.log_softmax(1) for x in (student, teacher, reference))
    kl_P = (s.exp() * ((s - t) + c * (s - r))).sum(1)
    return (TABLE.prefix_probs(student.detach()) * kl_P).sum()


def test_enumeration_covers_every_response_once() -> None:
    student = TABLE.random_logits(0)
    assert TABLE.num_responses == 1 + 4 + 4 * 4 * 5
    assert TABLE.response_probs(student).sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("true_ratio", [False, True])
@pytest.mark.parametrize("c", [0.0, 1.0, -0.5])
def test_expected_gradient_is_that_of_the_kl(c: float, true_ratio: bool) -> None:
    student = TABLE.random_logits(0).requires_grad_()
    teacher, reference = TABLE.random_logits(1), TABLE.random_logits(2)
    ours = expected_loss(student, teacher, reference, c, true_ratio=true_ratio)
    truth = kl_of_steps(student, teacher, reference, c)
    (grad,) = torch.autograd.grad(ours, student)
    (true_grad,) = torch.autograd.grad(truth, student)
    assert true_grad.abs().max() > 0.01
    torch.testing.assert_close(grad, true_grad, rtol=1e-10, atol=1e-13)
    # At ratio 1 the loss itself is -A, whose expectation is the KL.
    assert ours.item() == pytest.approx(truth.item(), rel=1e-10)


@pytest.mark.parametrize("c", [0.0, 1.0, -0.5])
def test_optimum_is_the_weighted_geometric_mean(c: float) -> None:
    student = TABLE.random_logits(0).requires_grad_()
    teacher, reference = TABLE.random_logits(1), TABLE.random_logits(2)
    for _ in range(150):
        (grad,) = torch.autograd.grad(expected_loss(student, teacher, reference, c), student)
        with torch.no_grad():
            # A rare prefix or token has a small gradient: dividing by its probability moves no
            # optimum and spares thousands of steps.
            student -= 0.3 * grad / (TABLE.prefix_probs(student)[:, None] * student.softmax(1))
    s, t, r = (x.detach().log_softmax(1) for x in (student, teacher, reference))
    optimum = ((t + c * r) / (1 + c)).softmax(1)
    torch.testing.assert_close(s.exp(), optimum, rtol=1e-6, atol=1e-9)
    if c:  # and not somewhere that the teacher alone would explain
        assert (s.exp() - t.exp()).abs().max() > 0.1


# ---------------------------------------------------------------- clip, clamp, sft


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("advantage", [2.0, 0.5, 0.0, -0.5, -2.0])
def test_gradient_is_zero_exactly_where_the_clip_says(
    low: float, high: float, advantage: float
) -> None:
    edges = [1 - low - 1e-6, 1 - low + 1e-6, 1 + high - 1e-6, 1 + high + 1e-6]
    ratio = torch.tensor([0.01, 0.5, *edges, 1.0, 1.5, 20.0], dtype=torch.float64)
    old = torch.full_like(ratio, -1.3)
    student = (old + ratio.log()).requires_grad_()
    scores = TokenScores(old, old + advantage, None)
    settings = ObjectiveSettings(clip_low=low, clip_high=high, true_ratio=True)
    result = policy_gradient(student, scores, settings)
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


def test_nothing_but_the_loss_carries_a_gradient() -> None:
    student = torch.randn(7, requires_grad=True)
    scores = TokenScores(*torch.randn(3, 7))
    for objective in OBJECTIVES.values():
        for true_ratio in (False, True):
            settings = ObjectiveSettings(reference_coef=1.0, true_ratio=true_ratio)
            result = objective(student, scores, settings)
            assert result.loss_C.requires_grad
            rest = (result.advantage_C, result.ratio_C, result.clipped_C)
            assert not any(x.requires_grad for x in rest)
    assert not reverse_kl_advantage(student, scores, ObjectiveSettings()).requires_grad


def test_log_ratio_clamp_bounds_each_difference() -> None:
    student = torch.tensor([-1.0, -1.0, -9.0, -1.0])
    scores = TokenScores(None, torch.tensor([-30.0, -2.5, -1.0, -1.0]), student + 7.0)
    free = policy_gradient(student, scores, ObjectiveSettings()).advantage_C
    assert free.tolist() == [-29.0, -1.5, 8.0, 0.0]
    settings = ObjectiveSettings(log_ratio_clamp=5.0, reference_coef=0.5)
    bounded = policy_gradient(student, scores, settings).advantage_C
    assert bounded.tolist() == [-2.5, 1.0, 7.5, 2.5]


def test_sft_is_cross_entropy() -> None:
    student = torch.tensor([-0.1, -3.0], requires_grad=True)
    result = sft(student, TokenScores(), ObjectiveSettings())
    (grad,) = torch.autograd.grad(result.loss_C.sum(), student)
    assert result.loss_C.tolist() == pytest.approx([0.1, 3.0])
    assert grad.tolist() == [-1.0, -1.0]


# ---------------------------------------------------------------- update


LENGTHS = [(3, 5), (1, 2), (6, 9), (4, 1), (2, 7), (5, 4)]


def rule(max_grad_norm: float = 0.0, **settings) -> UpdateRule:
    return UpdateRule(policy_gradient, ObjectiveSettings(**settings), Distribution(), max_grad_norm)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_update(model, plan: list[Minibatch], how: UpdateRule, lr: float = 1.0):
    """Plain SGD: with a rate of 1 the weights move by minus the gradient."""
    before = weights(model)
    scalars = update(model, torch.optim.SGD(model.parameters(), lr=lr), plan, how, lone_world())
    return scalars, weights(model) - before


def test_first_update_has_ratio_one_and_the_clip_acts_on_the_second() -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    plan = plan_minibatches(samples, 2, 1 << 20, ALONE)

    first, _ = run_update(copy.deepcopy(model), plan[:1], rule(true_ratio=True))
    assert first["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/clip_fraction"] == 0.0
    assert first["policy/logprob_gap_max"] < 1e-5

    # Without true ratios the old value follows the current one: the clip can never act.
    blind, _ = run_update(copy.deepcopy(model), plan, rule(true_ratio=False), lr=0.3)
    assert (blind["policy/ratio_mean"], blind["policy/clip_fraction"]) == (1.0, 0.0)

    moved = copy.deepcopy(model)
    run_update(moved, plan[:1], rule(true_ratio=True), lr=0.3)
    later = [s for microbatch in plan[1].microbatches for s in microbatch]
    with torch.no_grad():
        ratio = torch.cat([(naive_logprobs(moved, s) - s.student_logprobs).exp() for s in later])
    advantage = torch.cat([s.teacher_logprobs - s.student_logprobs for s in later])
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert 0 < clipped.sum() < clipped.numel()
    second, _ = run_update(copy.deepcopy(moved), plan[1:], rule(true_ratio=True))
    assert second["policy/clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert second["policy/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    # One call that makes both updates reports the mean over all of the step's tokens.
    both, _ = run_update(copy.deepcopy(model), plan, rule(true_ratio=True), lr=0.3)
    tokens = sum(n for _, n in LENGTHS)
    assert both["policy/clip_fraction"] == pytest.approx(clipped.sum().item() / tokens)
    # The gap compares rollout and update on the same weights, so only on the first update.
    assert both["policy/logprob_gap_max"] < 1e-5


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize("true_ratio", [False, True])
def test_advantages_are_written_to_the_samples(c: float, true_ratio: bool) -> None:
    model = tiny_qwen3()
    samples = random_samples(LENGTHS)
    with torch.no_grad():
        now = [naive_logprobs(model, s) for s in samples]
    plan = plan_minibatches(samples, 2 if true_ratio else 1, 12, ALONE)
    run_update(model, plan, rule(true_ratio=true_ratio, reference_coef=c), lr=0.0)
    for s, current in zip(samples, now, strict=True):
        old = s.student_logprobs if true_ratio else current
        truth = (s.teacher_logprobs - old) + c * (s.reference_logprobs - old)
        torch.testing.assert_close(s.advantages, truth, rtol=1e-5, atol=1e-5)
        assert s.advantages.dtype == torch.float32 and s.advantages.device.type == "cpu"


def test_scalars_are_token_means() -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    with torch.no_grad():
        kl = torch.cat([s.student_logprobs - s.teacher_logprobs for s in samples])
    plan = plan_minibatches(samples, 1, 10, ALONE)
    scalars, _ = run_update(model, plan, rule())
    assert scalars["loss/policy"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert scalars["loss/total"] == scalars["loss/policy"]


def test_grad_norm_is_the_one_before_clipping() -> None:
    model = tiny_qwen3()
    plan = plan_minibatches(with_rollout_logprobs(model, random_samples(LENGTHS)), 1, 99, ALONE)
    free, free_move = run_update(copy.deepcopy(model), plan, rule(0.0))
    norm = free["grad_norm"]
    assert free_move.norm().item() == pytest.approx(norm, rel=1e-4) and norm > 0.1
    tight, tight_move = run_update(copy.deepcopy(model), plan, rule(norm / 4))
    assert tight["grad_norm"] == norm
    assert tight_move.norm().item() == pytest.approx(norm / 4, rel=1e-4)
    torch.testing.assert_close(tight_move * 4, free_move, rtol=1e-4, atol=1e-6)
    loose, loose_move = run_update(copy.deepcopy(model), plan, rule(norm * 4))
    assert loose["grad_norm"] == norm and torch.equal(loose_move, free_move)


def test_grad_norm_is_the_mean_over_updates() -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    plan = plan_minibatches(samples, 3, 99, ALONE)
    # At a rate of 0 the updates do not see one another.
    norms = [run_update(model, [m], rule(), lr=0.0)[0]["grad_norm"] for m in plan]
    both = run_update(model, plan, rule(), lr=0.0)[0]["grad_norm"]
    assert both == pytest.approx(sum(norms) / 3, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_leaves_everything_untouched(bad: float) -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plan = plan_minibatches(samples, 1, 12, ALONE)
    update(model, optimizer, plan, rule(1.0), lone_world())
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    samples[3].teacher_logprobs[0] = bad
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf)"):
        update(model, optimizer, plan, rule(1.0), lone_world())
    assert torch.equal(weights(model), before)
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state[index][k]) for k, v in values.items())
