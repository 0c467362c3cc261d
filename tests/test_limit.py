"""With a limit on a rollout's tokens, what is kept depends only on the responses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_rollout import EOS, prompts, requests, summary, tiny
from tiny_world import REPO

from opd_titan.config import load_config
from opd_titan.data.types import Sample
from opd_titan.errors import ConfigError
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


@pytest.mark.parametrize("slots", [2, 5, 0])
@pytest.mark.parametrize("budget", [36, 100, 230, 10**6])
def test_sampling_stops_early_and_keeps_the_same(
    whole: list[Sample], slots: int, budget: int
) -> None:
    wanted, limited = requests(prompts(), 3), Generator(tiny(), EOS, slots, 40)
    expected = cut(whole, budget)
    some = limited.generate(wanted, SamplingParams(25, temperature=1.1, max_tokens=budget))
    assert summary(cut(some, budget)) == summary(expected)
    kept = sum(len(s.response_ids) for s in expected)
    assert kept <= budget and all(s.response_ids for s in expected)
    for s, before in zip(expected, whole, strict=True):
        length = len(s.response_ids)
        assert s.student_logprobs.shape == (length,)
        assert torch.equal(s.student_logprobs, before.student_logprobs[:length])
        was_cut = length < len(before.response_ids)
        assert s.finish_reason == ("length" if was_cut else before.finish_reason)
    if budget == 230:
        assert len({len(s.response_ids) for s in expected}) > 3, "short responses stay whole"
    sampled = sum(len(s.response_ids) for s in some)
    if slots == 0 and budget < 10**6:  # all run side by side: a step more at most
        assert sampled <= budget + len(wanted)
    assert sampled <= sum(len(s.response_ids) for s in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.max_tokens_per_step", "127"], "wanted 0, or at least 128"),
        (["--rollout.max_tokens_per_step", "-1"], ">= 0"),
    ],
)
def test_a_limit_below_one_token_each_is_refused(options: list[str], message: str) -> None:
    debug = ["--job.config_file", str(REPO / "train_configs" / "debug.toml")]
    with pytest.raises(ConfigError, match="max_tokens_per_step") as error:
        load_config([*debug, *options])
    assert message in str(error.value)
    load_config([*debug, "--rollout.max_tokens_per_step", "128"])
