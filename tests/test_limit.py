"""With a limit on a rollout's tokens, what is kept depends only on the responses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_rollout import EOS, prompts, requests, summary, tiny

from opd_titan.data.types import Sample
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.rollout import cut
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import UNLIMITED, common_length


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 200))
def test_the_greatest_common_length(lengths: list[int], budget: int) -> None:
    def total(limit: int) -> int:
        return sum(min(n, limit) for n in lengths)

    limit = common_length(lengths, budget)
    if sum(lengths) <= budget:
        assert limit == UNLIMITED
    else:
        assert total(limit) <= budget < total(limit + 1)


@pytest.fixture(scope="module")
def whole() -> list[Sample]:
    """The responses without a limit."""
    params = SamplingParams(25, temperature=1.1)
    return Generator(tiny(), EOS).generate(requests(prompts(), 3), params)


@pytest.mark.parametrize(("slots", "budget"), [(0, 36), (5, 230), (0, 230), (5, 10**6)])
def test_sampling_stops_early_and_keeps_the_same(
    whole: list[Sample], slots: int, budget: int
) -> None:
    wanted = requests(prompts(), 3)
    params = SamplingParams(25, temperature=1.1, max_tokens=budget)
    some = Generator(tiny(), EOS, slots, 40).generate(wanted, params)
    kept = cut(some, budget)
    assert summary(kept) == summary(cut(whole, budget))
    assert sum(len(s.response_ids) for s in kept) <= budget and all(s.response_ids for s in kept)
    for s, before in zip(kept, whole, strict=True):
        length = len(s.response_ids)
        assert s.student_logprobs.shape == (length,)
        torch.testing.assert_close(s.student_logprobs, before.student_logprobs[:length])
        was_cut = length < len(before.response_ids)
        assert s.finish_reason == ("length" if was_cut else before.finish_reason)
    if budget == 230:
        assert len({len(s.response_ids) for s in kept}) > 3, "short responses stay whole"
    if slots == 0:  # all run side by side: a step more at most
        assert sum(len(s.response_ids) for s in some) <= budget + len(wanted)
