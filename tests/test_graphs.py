"""CUDA graphs and the kernel that reads pages through a table, simulated on a CPU.

A step is recorded as a list of operations on the tensors that it used, as a CUDA graph is. When it
is replayed, it does the same to what these tensors then hold, without Python's part of the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_rollout import ARGS, EOS, prompts, requests, summary, tiny
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import opd_titan.rollout.generator as generator_module
from opd_titan.models.kernels import plain
from opd_titan.models.kernels.paged import TableAttention, choose_paged_attention
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.rollout import cut
from opd_titan.rollout.runner import LAG, Runner, bucket
from opd_titan.rollout.sampler import SamplingParams


class Graph:
    def __init__(self, play: Callable[[], None]) -> None:
        self.replay = play


def through_table(*_: Any) -> TableAttention:
    """Return attention by a kernel that reads pages through a table, as a GPU has."""

    def kernel(q_THK: Tensor, keys: Tensor, values: Tensor, pages: plain.PageTable) -> Tensor:
        if pages.max_queries > 1:
            assert pages.max_queries == int(pages.starts_N1.diff().max())
            return plain.paged_attention(q_THK, keys, values, pages)
        assert pages.starts_N1.shape == (q_THK.shape[0] + 1,)
        k, v = (x[pages.table_NM.long()].flatten(1, 2).transpose(1, 2) for x in (keys, values))
        seen_N11L = (torch.arange(k.shape[2]) < pages.used_N[:, None])[:, None, None]
        q = q_THK[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_N11L, enable_gqa=True)[
            :, :, 0
        ]

    return TableAttention("varlen", 64, kernel)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Capture steps, and list their numbers of rows; a replay does the whole step again."""
    sizes: list[int] = []

    def capture(runner: Runner, n: int) -> Graph:
        sizes.append(n)
        step = weakref.WeakMethod(runner._step)  # a graph does not hold its runner
        return Graph(lambda: step()(n))

    monkeypatch.setattr(Runner, "_warm_up", lambda runner, n: None)
    monkeypatch.setattr(Runner, "_capture", capture)
    monkeypatch.setattr(generator_module, "choose_paged_attention", through_table)
    return sizes


@pytest.fixture
def recorded(captured: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the operations of captured steps; a replay does only those."""

    def capture(runner: Runner, n: int) -> Graph:
        captured.append(n)
        return Graph(make_fx(lambda: runner._step(n))())

    monkeypatch.setattr(Runner, "_capture", capture)
    return captured


@pytest.mark.slow
def test_steps_played_again_sample_the_same(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different lengths, idle rows, changing pages, preemptions, and a runner that is kept.

    The host reads a stop token after it has launched the next step.
    """
    monkeypatch.setitem(LAG, "cpu", 1)
    model, params = tiny(), SamplingParams(20, temperature=1.2)
    graphs = Generator(model, EOS, 11, 64, page_size=4, max_pages=40)
    runners, buffers = set(), set()
    for stream in (1, 2):
        wanted = requests(prompts(), 2, (9, stream))
        samples = graphs.generate(wanted, params)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator_module, "choose_paged_attention", choose_paged_attention)
            expected = Generator(model, EOS).generate(wanted, params)
        assert summary(samples) == summary(expected)
        for a, b in zip(samples, expected, strict=True):
            torch.testing.assert_close(a.student_logprobs, b.student_logprobs)
        assert graphs.stats.preempted > 0
        runners.add(id(graphs._runner))
        buffers.add(graphs._runner.sampler.values.data_ptr())
    assert len(runners) == len(buffers) == 1 and graphs.num_bytes > 0
    assert len(recorded) == len(set(recorded)) > 2, "each size is recorded once for all rollouts"
    assert set(recorded) <= {1, 2, 4, 8, 11}
    graphs.release()
    assert graphs.num_bytes == 0


@pytest.mark.parametrize("max_tokens", [100, 260])
def test_a_limit_on_all_tokens_cuts_alike_when_stop_tokens_are_read_late(
    max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, params = requests(prompts(), 2), SamplingParams(20, max_tokens=max_tokens)
    found = []
    for lag in (0, 1):
        monkeypatch.setitem(LAG, "cpu", lag)
        samples = Generator(tiny(), EOS, 11, 64, page_size=4, max_pages=40).generate(wanted, params)
        found.append(summary(cut(samples, max_tokens)))
    assert found[0] == found[1] and "stop" in {reason for *_, reason in found[0]}


def test_a_capture_that_fails_is_one_warning(
    captured: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails at the second size, after steps of the first have been replayed."""
    capture = Runner._capture

    def fails(runner: Runner, n: int) -> Any:
        graph = capture(runner, n)
        if n < 8:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel ...")
        return graph

    monkeypatch.setattr(Runner, "_capture", fails)
    wanted, params = requests(prompts(), 2), SamplingParams(20, temperature=0.7)
    generator = Generator(tiny(), EOS, 11, 64, page_size=4)
    with caplog.at_level("WARNING", "opd_titan"):
        samples = generator.generate(wanted, params)
        assert summary(generator.generate(wanted, params)) == summary(samples)
    (warning,) = caplog.messages
    assert "not permitted when stream is capturing" in warning and "\n" not in warning
    monkeypatch.setattr(generator_module, "choose_paged_attention", choose_paged_attention)
    assert summary(samples) == summary(Generator(tiny(), EOS).generate(wanted, params))


def test_weights_that_changed_in_place_are_read_and_moved_ones_are_recorded_anew(
    recorded: list[int],
) -> None:
    model, params, wanted = tiny(), SamplingParams(6, temperature=0.0), requests(prompts([5, 9]), 1)
    graphs = Generator(model, EOS, page_size=4)
    before = summary(graphs.generate(wanted, params))
    runner = graphs._runner
    for p in model.parameters():
        p.data.neg_()
    after = summary(graphs.generate(wanted, params))
    assert after != before and graphs._runner is runner and len(recorded) == len(set(recorded))
    times = len(recorded)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(-p.detach(), requires_grad=False))
    graphs.head = Generator(model, EOS).head
    assert summary(graphs.generate(wanted, params)) == before
    assert graphs._runner is not runner and len(recorded) > times


def test_a_runner_is_made_anew_only_for_more(captured: list[int]) -> None:
    generator = Generator(tiny(), EOS, page_size=4)

    def runner_for(length: int, count: int, **options: Any) -> Runner:
        params = SamplingParams(5, **options)
        generator.generate(requests(prompts([length] * count), 1), params)
        return generator._runner

    first = runner_for(20, 6)
    assert generator.num_bytes > first.cache.num_bytes + 4 * 6 * ARGS.vocab_size
    assert runner_for(20, 6) is first and runner_for(3, 2) is first
    more = runner_for(20, 9)
    assert more is not first and more.slots == 9
    longer = runner_for(30, 9)
    assert longer is not more and runner_for(20, 9, top_k=3) is not longer


def test_the_last_cache_is_gone_before_the_next_is_sized(captured: list[int]) -> None:
    generator = Generator(tiny(), EOS, page_size=4)
    count, caches, alive = generator.count_slots_and_pages, [], []

    def counted(*args: Any) -> tuple[int, int]:
        alive.append([cache() for cache in caches])
        return count(*args)

    generator.count_slots_and_pages = counted
    for length in (5, 30):
        generator.generate(requests(prompts([length]), 1), SamplingParams(5))
        caches.append(weakref.ref(generator._runner.cache))
    assert alive == [[], [None]]


def test_a_runner_that_memory_kept_small_stays(
    captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_module, "free_bytes", lambda device: 60_000)
    generator, runners = Generator(tiny(), EOS, page_size=4), []
    for _ in range(2):
        generator.generate(requests(prompts(), 2), SamplingParams(5))
        runners.append(generator._runner)
    assert runners[0] is runners[1] and runners[0].slots < 24


def test_few_sizes_with_few_idle_rows() -> None:
    assert [bucket(n, 100) for n in (1, 2, 3, 5, 9, 16, 17, 33, 99, 100)] == [
        *(1, 2, 4, 8, 16, 16, 32, 48, 100, 100),
    ]
    for slots in (1, 7, 50, 256):
        sizes = {bucket(n, slots) for n in range(1, slots + 1)}
        assert all(n <= bucket(n, slots) <= slots for n in range(1, slots + 1))
        assert len(sizes) <= 5 + slots // 16
