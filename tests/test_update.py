"""The update on one process: one optimizer step per mini-batch, and its scalars.

`test_two_ranks` makes the same updates on two; `test_packing` in any micro-batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from distributed_utils import lone_world
from tiny_head import REF, Case
from tiny_rollout import FAMILY, tiny
from tiny_student import (
    CPU,
    LargestTensor,
    naive_logprobs,
    one_process_group,
    random_samples,
    tiny_qwen3,
    with_rollout_logprobs,
)
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from opd_titan.distill import head as head_module
from opd_titan.distill.objectives import (
    Objective,
    ObjectiveSettings,
    TokenLoss,
    policy_gradient,
    sft,
)
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distill.vocabulary import Rows
from opd_titan.distributed.sharding import fsdp_groups
from opd_titan.distributed.world import ALONE, build_world
from opd_titan.models.logits import Distribution


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process_group():
        yield


LENGTHS = [(3, 5), (1, 2), (6, 9), (4, 1), (2, 7), (5, 4)]


def rule(max_grad_norm: float = 0.0, **settings) -> UpdateRule:
    return UpdateRule(policy_gradient, ObjectiveSettings(**settings), Distribution(), max_grad_norm)


def weights(model: torch.nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def run_update(model, plan: list[Minibatch], how: UpdateRule, lr: float = 1.0):
    """Return scalars and movement by plain SGD: at a rate of 1, minus the gradient."""
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scalars = update(model, optimizer, plan, how, lone_world()).scalars
    return scalars, weights(model) - before


LARGE = 0.6  # a learning rate at which an update moves ratios across the bounds of the clip


def test_first_update_has_ratio_one_and_the_clip_acts_on_the_second() -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    plan = plan_minibatches(samples, 2, 1 << 20, ALONE)

    first, _ = run_update(copy.deepcopy(model), plan[:1], rule(true_ratio=True))
    assert first["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/clip_fraction"] == 0.0
    assert first["policy/logprob_gap_max"] < 1e-5

    # Without true ratios the old value is the current one, and the clip never acts.
    blind, _ = run_update(copy.deepcopy(model), plan, rule(true_ratio=False), lr=LARGE)
    assert (blind["policy/ratio_mean"], blind["policy/clip_fraction"]) == (1.0, 0.0)

    moved = copy.deepcopy(model)
    run_update(moved, plan[:1], rule(true_ratio=True), lr=LARGE)
    later = [s for microbatch in plan[1].microbatches for s in microbatch]
    with torch.no_grad():
        now = torch.cat([naive_logprobs(moved, s) for s in later])
    ratio = (now - torch.cat([s.student_logprobs for s in later])).exp()
    advantage = torch.cat([s.teacher_logprobs for s in later]) - now
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert 0 < clipped.sum() < clipped.numel()
    second, _ = run_update(copy.deepcopy(moved), plan[1:], rule(true_ratio=True))
    assert second["policy/clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert second["policy/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    # One call that makes both updates reports means over all tokens of the step.
    both, _ = run_update(copy.deepcopy(model), plan, rule(true_ratio=True), lr=LARGE)
    tokens = sum(n for _, n in LENGTHS)
    assert both["policy/clip_fraction"] == pytest.approx(clipped.sum().item() / tokens)
    # Only the first update has the weights of the rollout, so only there the gap is measured.
    assert both["policy/logprob_gap_max"] < 1e-5


@pytest.mark.parametrize(("c", "true_ratio"), [(0.0, False), (1.0, True)])
def test_advantages_are_written_to_the_samples(c: float, true_ratio: bool) -> None:
    model = tiny_qwen3()
    samples = random_samples(LENGTHS)
    with torch.no_grad():
        now = [naive_logprobs(model, s) for s in samples]
    plan = plan_minibatches(samples, 2 if true_ratio else 1, 12, ALONE)
    run_update(model, plan, rule(true_ratio=true_ratio, reference_coef=c), lr=0.0)
    for s, current in zip(samples, now, strict=True):
        truth = (s.teacher_logprobs - current) + c * (s.reference_logprobs - current)
        torch.testing.assert_close(s.advantages, truth, rtol=1e-5, atol=1e-5)
        assert s.advantages.dtype == torch.float32 and s.advantages.device.type == "cpu"


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
    # At a rate of 0 no update changes the next.
    norms = [run_update(model, [m], rule(), lr=0.0)[0]["grad_norm"] for m in plan]
    both = run_update(model, plan, rule(), lr=0.0)[0]["grad_norm"]
    assert both == pytest.approx(sum(norms) / 3, rel=1e-6)


@pytest.mark.parametrize(("bad", "objective"), [(math.nan, policy_gradient), (math.inf, sft)])
def test_a_non_finite_update_is_skipped_and_the_next_one_made(bad, objective) -> None:
    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples(LENGTHS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    how = UpdateRule(objective, ObjectiveSettings(), Distribution(), 1.0)
    clean = plan_minibatches(samples, 1, 12, ALONE)
    assert update(model, optimizer, clean, how, lone_world()).made == [True]
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    plan = plan_minibatches(samples, 2, 12, ALONE)
    hit = plan[0].microbatches[-1][0]
    if objective is policy_gradient:
        hit.teacher_logprobs[0] = bad
        result = update(model, optimizer, plan[:1], how, lone_world())
        assert result.suspects == [hit]
    else:  # the gradient overflows, the loss does not
        gradient = next(model.parameters()).register_hook(lambda grad: grad * bad)
        result = update(model, optimizer, plan[:1], how, lone_world())
        gradient.remove()
        mine = [s for m in plan[0].microbatches for s in m]
        assert sorted(map(id, result.suspects)) == sorted(map(id, mine))
    assert result.made == [False] and result.scalars["skipped_updates"] == 1
    assert not math.isfinite(result.scalars["grad_norm"])
    assert torch.equal(weights(model), before)
    for mine, old in zip(optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert all(torch.equal(mine[key], old[key]) for key in old)
    # The next update is the same as if there had been none before.
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share them
    assert update(model, optimizer, plan[1:], how, lone_world()).made == [True]
    update(twin, twin_optimizer, plan[1:], how, lone_world())
    assert torch.equal(weights(model), weights(twin)) and not torch.equal(weights(model), before)


def test_a_non_finite_loss_is_seen_though_its_gradient_is_finite() -> None:
    def loss(rows: Rows, settings: ObjectiveSettings) -> TokenLoss:
        return TokenLoss(math.inf - rows.logprob_C, torch.zeros_like(rows.logprob_C))

    model, samples = tiny_qwen3(), random_samples(LENGTHS)
    how = UpdateRule(Objective(loss, whole=False), ObjectiveSettings(), Distribution(), 1.0)
    scalars, moved = run_update(model, plan_minibatches(samples, 1, 99, ALONE), how)
    assert scalars["skipped_updates"] == 1 and not moved.any()


# ---------------------------------------------------------------- memory and frozen models


def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prototype had [batch, time, vocabulary] log-probs of all three models."""
    vocab, rows, responses = 3000, 20, (20, 70, 30)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": rows * vocab * 4})
    case = Case("reverse_kl", REF)
    samples = random_samples([(6, n) for n in responses], vocab)
    student, teacher, reference = (
        tiny(seed=n, vocab_size=vocab, n_layers=1, tied=True) for n in range(3)
    )
    student.requires_grad_(True)
    one = build_world(CPU)
    models = {"teacher": teacher, "reference": reference}
    for model in (student, *models.values()):
        FAMILY.parallelize(model, one, torch.float32)
    plan = plan_minibatches(samples, 1, 1 << 20, one.dp)
    how = UpdateRule(case.objective, case.how, Distribution(0.9), 1.0)
    with LargestTensor() as scoring:
        score(teacher, plan, Distribution(0.9), one)
        for role, model in models.items():
            for s, hidden in score(model, plan, Distribution(0.9), one, keep_hidden=True):
                setattr(s, f"{role}_hidden", hidden)
    with LargestTensor() as updating:
        update(student, torch.optim.AdamW(student.parameters()), plan, how, one, frozen=models)
    weight, rest = vocab * student.args.dim, 2 * student.args.dim
    # FSDP keeps the last norm in one tensor with the head.
    assert rows * vocab < weight <= updating.numel <= weight + rest
    assert scoring.numel == weight < sum(responses) * vocab / 3


def test_a_frozen_model_is_cast_but_not_copied() -> None:
    one = build_world(CPU)
    plain, frozen, half = (tiny(vocab_size=62) for _ in range(3))
    storage = {p.data_ptr() for p in frozen.parameters()}
    FAMILY.parallelize(frozen, one, torch.float32)
    seen: set[int] = set()

    def look(module: torch.nn.Module, args: object) -> None:
        seen.update(p.data_ptr() for p in module.parameters(recurse=False))

    for module in frozen.modules():
        module.register_forward_pre_hook(look)
    plan = plan_minibatches(random_samples(LENGTHS, 62), 1, 18, ALONE)
    pairs = score(frozen, plan, Distribution(), one)
    assert not fsdp_groups(frozen) and seen and seen <= storage
    truth = score(plain, plan, Distribution(), one)
    for (_, mine), (_, theirs) in zip(pairs, truth, strict=True):
        assert torch.equal(mine, theirs)
    FAMILY.parallelize(half, one, torch.bfloat16)
    assert len(fsdp_groups(half)) == half.args.n_layers + 1
