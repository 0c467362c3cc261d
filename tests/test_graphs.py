"""What is said of CUDA graphs and of the kernel that reads pages, held to on a CPU.

A step is recorded as a list of operations on the very tensors that it used, which is what a CUDA
graph is: played again it does the same to whatever is then in them, and nothing of Python's part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_rollout import ARGS, EOS, prompts, requests, summary, tiny
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import opd_titan.rollout.generator as generator_module
import opd_titan.rollout.kv_cache as kv_cache_module
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.runner import Runner, bucket
from opd_titan.rollout.sampler import SamplingParams


def read_through_table(
    q_NHK: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: Tensor,
    block_table: Tensor,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch says of `varlen_attn` with pages, for one query a sequence, or one sequence."""
    n, page_size = seqused_k.numel(), keys.shape[1]
    assert keys.shape[2:] == values.shape[2:] == (ARGS.n_kv_heads, ARGS.head_dim)
    assert keys.is_contiguous() and block_table.dtype == cu_q.dtype == torch.int32
    assert cu_q.shape == cu_k.shape == (n + 1,) and block_table.shape[0] == n
    k, v = (x[block_table.long()].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    if window_size == (-1, 0):
        assert n == 1 and (max_q, max_k) == (q_NHK.shape[0], int(seqused_k))
        seen = torch.ones(max_q, max_k, dtype=torch.bool).tril(max_k - max_q)
        q, k, v = q_NHK.transpose(0, 1)[None], k[:, :, :max_k], v[:, :, :max_k]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1)
    assert window_size == (-1, -1)
    assert (max_q, max_k, n) == (1, block_table.shape[1] * page_size, q_NHK.shape[0])
    seen = torch.arange(max_k) < seqused_k[:, None]
    out = F.scaled_dot_product_attention(
        q_NHK[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=True
    )
    return out[:, :, 0]


class Recorded:
    def __init__(self, runner: Runner, n: int) -> None:
        state = (runner.token_B, runner.position_B, runner.count_B, runner.done_B)
        kept = [tensor.clone() for tensor in state]
        self.play = make_fx(lambda: runner._step(n))()
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)

    def replay(self) -> None:
        self.play()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps are recorded; what is listed are their numbers of rows."""
    sizes: list[int] = []

    def capture(runner: Runner, n: int) -> Recorded:
        sizes.append(n)
        return Recorded(runner, n)

    def kernel(dtype: torch.dtype, device: torch.device, page_size: int) -> Callable[..., Tensor]:
        return read_through_table

    monkeypatch.setattr(Runner, "_capture", capture)
    monkeypatch.setattr(kv_cache_module, "paged_varlen_attn", kernel)
    yield sizes


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_steps_played_again_sample_the_same(recorded: list[int], temperature: float) -> None:
    """Ragged ends, idle rows, pages that come and go, preemptions, and a runner that stays."""
    model, params = tiny(), SamplingParams(20, temperature=temperature)
    graphs = Generator(model, EOS, 11, 64, page_size=4, max_pages=40)
    runners, buffers = set(), set()
    for stream in (1, 2, 3):
        wanted = requests(prompts(), 2, (9, stream))
        samples = graphs.generate(wanted, params)
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(kv_cache_module, "paged_varlen_attn", lambda *_: None)
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


def test_a_runner_is_made_anew_only_for_more(recorded: list[int]) -> None:
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


def test_the_last_cache_is_gone_before_the_next_is_sized(recorded: list[int]) -> None:
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
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
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
