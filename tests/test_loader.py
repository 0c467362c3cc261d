"""The loader of prompts: epochs, the shares of several sets, and resuming."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_titan.data.loader import PromptLoader
from opd_titan.data.types import Prompt
from opd_titan.errors import CheckpointError, DataError


def fake_prompts(count: int) -> list[Prompt]:
    return [Prompt(index=3 * i, text=str(i), token_ids=(i,)) for i in range(count)]


def take(loader: PromptLoader, batches: int) -> list[list[int]]:
    return [[prompt.index for prompt in next(loader)] for _ in range(batches)]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 30), st.integers(0, 2**63), st.booleans())
def test_an_epoch_has_no_prompt_twice(data, count: int, seed: int, shuffle: bool) -> None:
    size = data.draw(st.integers(1, count))
    loader = PromptLoader([fake_prompts(count)], prompts_per_step=size, seed=seed, shuffle=shuffle)
    assert loader.batches_per_epoch == count // size
    for _ in range(3):
        seen = sum(take(loader, count // size), [])
        assert len(set(seen)) == len(seen) == count // size * size
        if not shuffle:
            assert seen == [3 * i for i in range(len(seen))]


def test_loader_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int) -> list[list[int]]:
        return take(PromptLoader([fake_prompts(100)], prompts_per_step=100, seed=seed), 2)

    before = torch.get_rng_state()
    orders = [tuple(epoch) for seed in range(20) for epoch in order(seed)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(orders)) == 40
    torch.rand(3)
    assert tuple(order(5)[0]) == orders[10]
    # Two sets of one size, which take turns, are shuffled differently.
    (both,) = take(PromptLoader([fake_prompts(50)] * 2, prompts_per_step=100, seed=0), 1)
    assert both[::2] != both[1::2] and sorted(both[::2]) == sorted(both[1::2])
    # Pinned: a checkpoint of today must go on in the same order tomorrow.
    loader = PromptLoader([fake_prompts(8)], prompts_per_step=4, seed=0)
    assert take(loader, 4) == [[12, 3, 9, 15], [0, 6, 18, 21], [12, 21, 15, 6], [3, 0, 18, 9]]


def test_loader_refuses_what_it_cannot_do() -> None:
    for size in (0, 9):
        with pytest.raises(DataError) as error:
            PromptLoader([fake_prompts(8)], prompts_per_step=size, seed=0)
        assert f"rollout.prompts_per_step = {size}, but the data set has 8 p" in str(error.value)
    state = PromptLoader([fake_prompts(8)], prompts_per_step=4, seed=0).state_dict()
    for change, count in (
        (dict(prompts_per_step=2, seed=0), 8),
        (dict(prompts_per_step=4, seed=1), 8),
        (dict(prompts_per_step=4, seed=0, shuffle=False), 8),
        (dict(prompts_per_step=4, seed=0), 9),
    ):
        with pytest.raises(CheckpointError) as error:
            PromptLoader([fake_prompts(count)], **change).load_state_dict(state)
        assert "cannot be resumed" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sets_have_their_shares_and_resume_anywhere(data) -> None:
    sizes = data.draw(st.lists(st.integers(8, 40), min_size=1, max_size=4))
    weights = data.draw(
        st.lists(st.sampled_from([0.2, 1.0, 2.0, 3.5]), min_size=len(sizes), max_size=len(sizes))
    )
    size = data.draw(st.integers(1, 8))
    ends = list(itertools.accumulate(sizes))
    sets = [
        [Prompt(i, "", (i,)) for i in range(end - n, end)]
        for n, end in zip(sizes, ends, strict=True)
    ]
    settings = dict(prompts_per_step=size, seed=3, weights=weights)
    total = 25
    batches = take(PromptLoader(sets, **settings), total)

    def of_set(i: int, indices: list[int]) -> list[int]:
        return [n for n in indices if ends[i] - sizes[i] <= n < ends[i]]

    for done in range(1, total + 1):
        so_far = sum(batches[:done], [])
        for i, weight in enumerate(weights):
            share = len(so_far) * weight / sum(weights)
            assert abs(len(of_set(i, so_far)) - share) <= len(sizes) / 2
    for i, count in enumerate(sizes):
        # Epoch by epoch: one begins where a batch would not fit into what is left.
        epoch: set[int] = set()
        for batch in batches:
            own = of_set(i, batch)
            assert len(set(own)) == len(own)
            if len(epoch) + len(own) > count:
                epoch = set()
            assert not epoch & set(own)
            epoch |= set(own)

    stop = data.draw(st.integers(0, total))
    first, second = PromptLoader(sets, **settings), PromptLoader(sets, **settings)
    assert take(first, stop) == batches[:stop]
    take(second, 3)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert take(second, total - stop) == batches[stop:]


def test_a_set_that_is_too_small_for_its_share_is_refused() -> None:
    sets = [fake_prompts(30), fake_prompts(3)]
    for weights, told in (
        ([1.0, 1.0], "data.sets[1].weight: 1.0 of 2 asks for 4.0 of the 8 prompts of a step, but"),
        ([0.0001, 1.0], "but the set has 3 prompts"),
    ):
        with pytest.raises(DataError) as error:
            PromptLoader(sets, prompts_per_step=8, seed=0, weights=weights)
        assert told in str(error.value)
    take(PromptLoader(sets, prompts_per_step=8, seed=0, weights=[5.0, 3.0]), 20)
    state = PromptLoader(sets, prompts_per_step=4, seed=0, weights=[5.0, 3.0]).state_dict()
    with pytest.raises(CheckpointError, match="data.weights is"):
        PromptLoader(sets, prompts_per_step=4, seed=0, weights=[5.0, 2.0]).load_state_dict(state)
