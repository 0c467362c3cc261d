"""The plan of micro-batches and the packing: any plan makes the same update.

Defects of the prototype that belong here (design.md, section 3): advantages of one sequence that
leak into another, a first response token that is never trained, and a stop token that is not
trained if it is the padding token too. `test_two_ranks` has real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from distributed_utils import lone_world
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_student import (
    CPU,
    make_sample,
    naive_logprobs,
    one_process_group,
    random_samples,
    tiny_qwen3,
    with_rollout_logprobs,
)
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from opd_titan.data.types import Sample
from opd_titan.distill.objectives import ObjectiveSettings, policy_gradient
from opd_titan.distill.packing import (
    Minibatch,
    balance,
    fill_microbatches,
    pack,
    pack_values,
    plan_minibatches,
    split_minibatches,
    unpack_values,
)
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.world import ALONE, Axis, World
from opd_titan.models.logits import Distribution

RAGGED = [(3, 5), (1, 1), (6, 19), (14, 1), (2, 7), (5, 4), (2, 13)]
RULE = UpdateRule(policy_gradient, ObjectiveSettings(reference_coef=0.5), Distribution(), 0.0)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process_group():
        yield


# ---------------------------------------------------------------- the plan

lengths_of_samples = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1)


@settings(max_examples=100, deadline=None)
@given(lengths_of_samples, st.integers(1, 6), st.integers(1, 5), st.integers(1, 60))
def test_plan_properties(
    lengths: list[tuple[int, int]], minibatches: int, ranks: int, budget: int
) -> None:
    minibatches = min(minibatches, len(lengths))
    samples = [make_sample([1] * p, [2] * r, i) for i, (p, r) in enumerate(lengths)]
    plans = [plan_minibatches(samples, minibatches, budget, Axis(r, ranks)) for r in range(ranks)]
    alone = plan_minibatches(samples, minibatches, budget, ALONE)
    all_indices: list[int] = []
    for update_number in range(minibatches):
        parts = [plan[update_number] for plan in plans]
        members = [index_of(part) for part in parts]
        # Every sample is in one micro-batch of one rank; the update does not depend on the ranks.
        together = sorted(i for member in members for i in member)
        assert together == sorted(index_of(alone[update_number]))
        all_indices += together
        # Forward and backward are collective: all ranks have as many.
        assert len({len(part.microbatches) for part in parts}) == 1
        tokens = sum(lengths[i][1] for i in together)
        assert {part.response_tokens for part in parts} == {tokens}
        for part in parts:
            for microbatch in part.microbatches:
                assert sum(s.num_tokens for s in microbatch) <= budget or len(microbatch) == 1
        # Some rank needs all of them: there are no more empty micro-batches than necessary.
        assert any(all(part.microbatches) for part in parts)
        loads = [sum(sum(lengths[i]) for i in member) for member in members]
        longest = max(sum(lengths[i]) for i in together)
        assert max(loads) - min(loads) <= longest
    assert sorted(all_indices) == list(range(len(samples)))


def index_of(part: Minibatch) -> list[int]:
    return [s.prompt.index for microbatch in part.microbatches for s in microbatch]


@given(st.integers(1, 200), st.integers(1, 50))
def test_minibatches_are_consecutive_and_nearly_equal(num_samples: int, minibatches: int) -> None:
    minibatches = min(minibatches, num_samples)
    parts = split_minibatches(num_samples, minibatches)
    assert len(parts) == minibatches
    assert [i for part in parts for i in part] == list(range(num_samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
@example([1, 1, 2], 2)  # the shortest first would be half as much again
def test_balance_is_within_four_thirds_of_the_best(lengths: list[int], ranks: int) -> None:
    best = min(
        max(sum(n for n, r in zip(lengths, to, strict=True) if r == rank) for rank in range(ranks))
        for to in product(range(ranks), repeat=len(lengths))
    )
    parts = balance(lengths, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in part) for part in parts) <= 4 / 3 * best + 1e-9
    assert all(part == sorted(part) for part in parts)


@given(st.lists(st.integers(2, 40)), st.integers(1, 60))
def test_microbatches_are_full(lengths: list[int], budget: int) -> None:
    samples = [make_sample([1], [2] * (n - 1), i) for i, n in enumerate(lengths)]
    bins = fill_microbatches(samples, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in b) for b in bins)
    assert all(a + b > budget for a, b in zip(loads, loads[1:], strict=False))


# ---------------------------------------------------------------- indices


def test_no_id_is_special() -> None:
    """The mask comes from lengths: a padding or stop id anywhere is a token like any other.

    The prototype's mask was `token != pad`, and Qwen3-Base pads with its stop token.
    """
    usual = pack([make_sample([2, 3], [4, 5]), make_sample([6], [2, 8, 9])], lone_world())
    same = pack([make_sample([0] * 2, [0] * 2), make_sample([0], [0] * 3)], lone_world())
    assert torch.equal(same.predict_R, usual.predict_R)
    assert same.targets_R.tolist() == [0] * 5
    assert torch.equal(same.attend.positions_T, usual.attend.positions_T)


def test_values_survive_packing() -> None:
    samples = random_samples(RAGGED)
    values = [s.teacher_logprobs for s in samples]
    packed_R = pack_values(values, CPU)
    assert packed_R.shape == pack(samples, lone_world()).targets_R.shape
    for mine, truth in zip(unpack_values(packed_R, samples), values, strict=True):
        assert torch.equal(mine, truth)
    assert pack_values([None, None], CPU) is None and pack_values([], CPU) is None


# ---------------------------------------------------------------- the same update


def step(samples: list[Sample], budget: int, dp: Axis = ALONE) -> tuple[float, Tensor]:
    """Return one rank's share of an update: its sum of token losses, and its gradient.

    Plain SGD at a rate of 1 moves the weights by minus the gradient.
    """
    model = tiny_qwen3()
    before = parameters_to_vector(model.parameters()).detach()
    plan = plan_minibatches(samples, 1, budget, dp)
    own = sum(len(s.response_ids) for m in plan[0].microbatches for s in m)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scalars = update(model, optimizer, plan, RULE, lone_world()).scalars
    return scalars["loss/policy"] * own, before - parameters_to_vector(model.parameters())


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return with_rollout_logprobs(tiny_qwen3(), random_samples(RAGGED))


@pytest.fixture(scope="module")
def truth(samples: list[Sample]) -> tuple[float, Tensor]:
    """Return loss and gradient from full logits: the sum over tokens, divided by their number."""
    model = tiny_qwen3()
    total = torch.zeros(())
    for s in samples:
        logprob_R = naive_logprobs(model, s)
        old_R = logprob_R.detach()
        k_R = (old_R - s.teacher_logprobs) + 0.5 * (old_R - s.reference_logprobs)
        total = total + (k_R * (logprob_R - old_R).exp()).sum()
    tokens = sum(len(s.response_ids) for s in samples)
    grads = torch.autograd.grad(total / tokens, list(model.parameters()))
    return total.item(), torch.cat([g.flatten() for g in grads])


def assert_same(loss: float, grad: Tensor, truth: tuple[float, Tensor]) -> None:
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert (grad - truth[1]).norm() < 1e-5 * truth[1].norm()


def test_the_token_budget_changes_neither_loss_nor_gradient(
    samples: list[Sample], truth: tuple[float, Tensor]
) -> None:
    counts = {b: len(plan_minibatches(samples, 1, b, ALONE)[0].microbatches) for b in (1, 13, 30)}
    assert counts[1] == len(samples) > counts[13] > counts[30] > 1
    for budget in (1, 13, 1 << 20):
        assert_same(*step(samples, budget), truth)
    assert_same(*step(samples[::-1], 30), truth)  # nor does the order of samples


@pytest.mark.parametrize(("ranks", "budget"), [(3, 1 << 20), (7, 13)])
def test_shares_of_the_ranks_add_up(
    ranks: int, budget: int, samples: list[Sample], truth: tuple[float, Tensor]
) -> None:
    """Each rank must divide by the global number of tokens."""
    losses, grads = zip(*(step(samples, budget, Axis(r, ranks)) for r in range(ranks)), strict=True)
    assert_same(sum(losses), sum(grads), truth)


def test_padding_to_equal_shares_of_tensor_parallel_ranks_predicts_nothing() -> None:
    samples = random_samples([(3, 5), (1, 3), (6, 12), (4, 1), (2, 5)])
    whole = pack(samples, lone_world())
    padded = pack(samples, World(CPU, None, ALONE, Axis(0, 4)))
    missing = -len(whole.tokens_T) % 4
    assert missing > 0 and len(padded.tokens_T) == len(whole.tokens_T) + missing
    assert torch.equal(padded.predict_R, whole.predict_R)
    assert torch.equal(padded.targets_R, whole.targets_R)
    assert torch.equal(padded.tokens_T[: len(whole.tokens_T)], whole.tokens_T)
    # It is a sequence of its own, so that no token of a sample attends to it, nor it to them.
    assert padded.attend.seq_lens == [*whole.attend.seq_lens, missing]
