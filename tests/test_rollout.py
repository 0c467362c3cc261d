"""The generator against cache-free forwards and transformers; its weights; several ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from tiny_rollout import (
    ARGS,
    CPU,
    EOS,
    FAMILY,
    LENGTHS,
    Script,
    follow,
    held,
    prompts,
    requests,
    sharded,
    summary,
    tiny,
)
from torch import Tensor

import opd_titan.rollout.generator as generator_module
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.world import World, build_world, init_world
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import can_pack, uniforms
from opd_titan.models.logits import truncate_
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.memory import _host_bytes
from opd_titan.rollout.rollout import sample_responses
from opd_titan.rollout.scheduler import Request
from opd_titan.training.self_check import probe

# ------------------------------------------------- the same, without a cache


def slow_logprobs(model: Qwen3Model, ids: list[int], params: SamplingParams) -> Tensor:
    """Return float64 log-probs of the next token, from a forward over the whole sequence so far."""
    hidden_TD = model(torch.tensor(ids), PackedAttention([len(ids)], CPU))
    logits = (hidden_TD[-1:] @ model.lm_head.weight.T).double() / (params.temperature or 1.0)
    return truncate_(logits, params.top_k, params.top_p)[0].log_softmax(0)


@torch.no_grad()
def slow_answer(
    model: Qwen3Model, request: Request, params: SamplingParams, eos: set[int]
) -> tuple[list[int], list[float], str]:
    ids, logprobs = list(request.prompt.token_ids), []
    for n in range(params.max_new_tokens):
        logprobs_V = slow_logprobs(model, ids, params)
        if params.temperature == 0.0:
            token = int(logprobs_V.argmax())
        else:
            u = uniforms(torch.tensor([request.key]), torch.tensor([n]))
            cumulative = logprobs_V.exp().cumsum(0)
            token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
        ids.append(token)
        logprobs.append(float(logprobs_V[token]))
        if token in eos and not params.ignore_eos:
            return ids[-n - 1 :], logprobs, "stop"
    return ids[len(request.prompt.token_ids) :], logprobs, "length"


def check_against_slow(
    model: Qwen3Model, wanted: list[Request], params: SamplingParams, samples: list[Sample]
) -> None:
    assert len(samples) == len(wanted)
    for request, sample in zip(wanted, samples, strict=True):
        assert (sample.prompt, sample.sample_index) == (request.prompt, request.sample_index)
        ids, logprobs, reason = slow_answer(model, request, params, EOS)
        assert (sample.response_ids, sample.finish_reason) == (ids, reason)
        values = sample.student_logprobs
        assert values.dtype == torch.float32 and values.device == CPU
        assert values.shape == (len(ids),)
        assert (values.double() - torch.tensor(logprobs).double()).abs().max() <= 1e-5


GREEDY = SamplingParams(max_new_tokens=14, temperature=0.0)


@pytest.mark.parametrize(("slots", "budget"), [(1, 1), (3, 45), (0, 1), (0, 8192)])
def test_greedy_equals_the_cache_free_forward(slots: int, budget: int) -> None:
    model, wanted = tiny(), requests(prompts(), 2)
    samples = Generator(model, EOS, slots, budget).generate(wanted, GREEDY)
    check_against_slow(model, wanted, GREEDY, samples)
    assert {s.finish_reason for s in samples} == {"stop", "length"}, "the test lost its teeth"


@pytest.mark.parametrize(("kv_heads", "tied"), [(1, False), (4, True)])
def test_greedy_at_other_gqa_ratios(kv_heads: int, tied: bool) -> None:
    model, wanted = tiny(2, n_kv_heads=kv_heads, tied=tied, n_layers=3), requests(prompts(), 1)
    samples = Generator(model, EOS, 5, 60).generate(wanted, GREEDY)
    check_against_slow(model, wanted, GREEDY, samples)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12),
        SamplingParams(12, temperature=0.6),
        SamplingParams(12, top_k=7),
        SamplingParams(12, temperature=1.3, top_p=0.8),
        SamplingParams(12, top_p=0.9, top_k=20),
        SamplingParams(12, ignore_eos=True),
    ],
    ids=str,
)
def test_sampling_equals_the_cache_free_forward(params: SamplingParams) -> None:
    model, wanted = tiny(), requests(prompts(), 2)
    samples = Generator(model, EOS, 6, 50).generate(wanted, params)
    check_against_slow(model, wanted, params, samples)
    if params.ignore_eos:
        assert {len(s.response_ids) for s in samples} == {12}
        assert any(set(s.response_ids[:-1]) & EOS for s in samples)


def test_samples_do_not_depend_on_the_layout() -> None:
    model, params = tiny(), SamplingParams(20, temperature=1.2)
    wanted = requests(prompts(), 4)
    whole = summary(Generator(model, EOS).generate(wanted, params))
    assert len({tuple(ids) for _, _, ids, _ in whole}) > 40, "samples of a group must differ"
    for slots, budget in [(1, 8192), (2, 1), (5, 30), (13, 100)]:
        assert summary(Generator(model, EOS, slots, budget).generate(wanted, params)) == whole
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = Generator(model, EOS, 7, 64).generate([wanted[i] for i in order], params)
    assert summary(shuffled) == [whole[i] for i in order]
    alone = Generator(model, EOS).generate(wanted[5:6], params)
    assert summary(alone) == whole[5:6]


def test_too_little_memory_means_fewer_slots_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = tiny(), requests(prompts(), 1)
    expected = summary(Generator(model, EOS).generate(wanted, GREEDY))
    per_page = 2 * 2 * 2 * 8 * 4 * 10  # K and V, layers, heads, head size, bytes, tokens
    per_slot = 4 * 3 * model.args.vocab_size  # logits and what sampling makes of them
    three = 3 * (per_slot + 3 * per_page)  # half of the 6 pages of 54 tokens each
    everything = (len(wanted), 6 * len(wanted))
    for free, counts in [(0, (1, 6)), (4 * three // 3, (3, 9)), (1 << 40, everything)]:
        monkeypatch.setattr(generator_module, "free_bytes", lambda device, free=free: free)
        generator = Generator(model, EOS, page_size=10)
        assert generator.count_slots_and_pages(len(wanted), 6, GREEDY) == counts
        assert summary(generator.generate(wanted, GREEDY)) == expected


@pytest.mark.parametrize(("page_size", "temperature"), [(1, 1.1), (3, 0.0), (16, 1.1)])
def test_a_preempted_sequence_continues_with_the_same_result(
    page_size: int, temperature: float
) -> None:
    """With the pages of one sequence, all sequences but the oldest are preempted now and then."""
    params = SamplingParams(14, temperature)
    model, wanted = tiny(), requests(prompts(), 3)
    expected = Generator(model, EOS).generate(wanted, params)
    least = -(-(40 + 14 - 1) // page_size)
    preempted = []
    for pages in (least, least + 2, 3 * least):
        generator = Generator(model, EOS, 5, 30, page_size=page_size, max_pages=pages)
        samples = generator.generate(wanted, params)
        assert summary(samples) == summary(expected)
        for a, b in zip(samples, expected, strict=True):
            torch.testing.assert_close(a.student_logprobs, b.student_logprobs)
        preempted.append(generator.stats.preempted)
    assert preempted[0] > 2, "the test lost its teeth"


def test_each_request_may_have_a_limit_of_its_own() -> None:
    model, params = tiny(), SamplingParams(20, ignore_eos=True)
    limits = [1 + (7 * i) % 20 for i in range(12)]
    wanted = [
        replace(r, max_new_tokens=limit)
        for r, limit in zip(requests(prompts(), 1), limits, strict=True)
    ]
    samples = Generator(model, EOS, 4).generate(wanted, params)
    assert [len(s.response_ids) for s in samples] == limits
    whole = Generator(model, EOS).generate(requests(prompts(), 1), params)
    for short, long in zip(samples, whole, strict=True):
        assert short.response_ids == long.response_ids[: len(short.response_ids)]


def test_free_memory_is_the_containers_where_it_is_less(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    mib = 1 << 20
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert _host_bytes(tmp_path) == physical // 2  # the system says nothing
    write("proc/meminfo", "MemTotal:  2048000 kB\nMemAvailable:  1024000 kB\n")
    assert _host_bytes(tmp_path) == 1000 * mib
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", f"{300 * mib}\n")
    write("sys/fs/cgroup/memory.stat", f"anon {100 * mib}\nfile {200 * mib}\ninactive_file 0\n")
    assert _host_bytes(tmp_path) == 1000 * mib
    write("sys/fs/cgroup/memory.max", f"{500 * mib}\n")
    assert _host_bytes(tmp_path) == 200 * mib
    # Files that were read, such as the weights, are not lost to the rollout.
    write("sys/fs/cgroup/memory.stat", f"active_file {50 * mib}\ninactive_file {150 * mib}\n")
    assert _host_bytes(tmp_path) == 350 * mib
    write("sys/fs/cgroup/memory.max", f"{5000 * mib}\n")
    assert _host_bytes(tmp_path) == 1000 * mib


def test_the_model_is_left_as_it_was() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    Generator(model, EOS).generate(requests(prompts(), 1), GREEDY)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_transformers_generate(tied: bool) -> None:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    theirs = Qwen3ForCausalLM(config).eval()
    ours = FAMILY.build(FAMILY.args_from_hf_config(config.to_dict(), "config.json"))
    ours.requires_grad_(False)
    for hf, native in FAMILY.hf_to_native(2, tied).items():
        ours.get_parameter(native).copy_(theirs.get_parameter(hf).detach())
    wanted, limit = requests(prompts(), 1), 16
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(EOS), pad_token_id=0
    )
    samples = Generator(ours, EOS, 5).generate(wanted, SamplingParams(limit, 0.0))
    for request, sample in zip(wanted, samples, strict=True):
        ids = torch.tensor([request.prompt.token_ids])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert sample.response_ids == out[0, ids.shape[1] :].tolist()
    assert {s.finish_reason for s in samples} == {"stop", "length"}


# ------------------------------------------------------------ where responses end


def count_down(ends: Sequence[int], eos: set[int], limit: int, **options: Any) -> list[Sample]:
    some = [Prompt(i, "", (99, end)) for i, end in enumerate(ends)]
    params = SamplingParams(limit, **options)
    return Generator(Script(), eos, 3).generate(requests(some, 1), params)


@pytest.mark.parametrize(
    ("last", "eos", "limit", "expected", "reason"),
    [
        (5, {0}, 9, [4, 3, 2, 1, 0], "stop"),
        (1, {0}, 9, [0], "stop"),  # the end as very first token
        (1, {0}, 1, [0], "stop"),
        (5, {0}, 5, [4, 3, 2, 1, 0], "stop"),  # the end exactly at the limit
        (5, {0}, 4, [4, 3, 2, 1], "length"),
        (5, {0}, 1, [4], "length"),
        (7, {0, 3, 50}, 9, [6, 5, 4, 3], "stop"),  # whichever of them comes first
        (7, {6, 0}, 9, [6], "stop"),
        (3, {60}, 6, [2, 1, 0, 0, 0, 0], "length"),
        (3, set(), 4, [2, 1, 0, 0], "length"),
        (4, {4}, 3, [3, 2, 1], "length"),  # the end within the prompt ends nothing
    ],
)
def test_where_a_response_ends(
    last: int, eos: set[int], limit: int, expected: list[int], reason: str
) -> None:
    for sample in count_down([last, 30, last], eos, limit)[::2]:
        assert (sample.response_ids, sample.finish_reason) == (expected, reason)
        assert len(sample.student_logprobs) == len(expected)


def test_ignore_eos_goes_on_to_the_limit() -> None:
    for sample in count_down([3, 1, 8], {0}, 6, ignore_eos=True):
        assert len(sample.response_ids) == 6 and sample.finish_reason == "length"
    assert count_down([3], {0}, 3, ignore_eos=True)[0].finish_reason == "length"


def test_no_requests_no_samples() -> None:
    assert Generator(Script(), {0}).generate([], SamplingParams(5)) == []


def test_progress_counts_every_token() -> None:
    some = [Prompt(i, "", (i + 1,)) for i in range(20)]
    seen: list[int] = []
    generator = Generator(Script(), {0}, 4)
    samples = generator.generate(requests(some, 2), SamplingParams(12), seen.append)
    assert sum(seen) == sum(len(s.response_ids) for s in samples) == 2 * (78 + 8 * 12)


def test_a_step_has_no_idle_rows() -> None:
    """The last tokens of one long response among short ones are decoded alone."""
    some = [Prompt(i, "", (n,)) for i, n in enumerate([3, 3, 50, 3, 3, 3])]
    model = Script()
    samples = Generator(model, {0}).generate(requests(some, 1), SamplingParams(60))
    assert model.decoded == [6] * 3 + [1] * 47
    assert samples[2].response_ids == list(range(49, -1, -1))


# ---------------------------------------------------------- the generator's weights


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return a world of one process."""
    init_world(60)
    yield build_world(CPU)
    dist.destroy_process_group()


def train_a_step(model: Qwen3Model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    hidden = model(torch.arange(20), PackedAttention([13, 7], CPU), lambda h, w: (h @ w.T).cos())
    hidden.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
def test_fp32_weights_are_the_training_weights(world: World, tied: bool) -> None:
    source = sharded(world, tied=tied)
    weights = follow(source)
    generator, wanted = Generator(weights.model, EOS), requests(prompts(), 1)
    assert (weights.model.lm_head.weight is weights.model.tok_embeddings.weight) == tied
    before = summary(generator.generate(wanted, GREEDY))
    for sync in (False, True):
        train_a_step(source)
        if sync:
            weights.sync()
        for name, p in source.named_parameters():
            mine = weights.model.get_parameter(name)
            assert mine.data_ptr() == p.to_local().data_ptr() and torch.equal(mine, p.to_local())
            assert not mine.requires_grad
        after = summary(generator.generate(wanted, GREEDY))
        assert after != before
        plain = tiny(tied=tied)
        for name, p in source.named_parameters():
            plain.get_parameter(name).copy_(p.detach().full_tensor())
        assert after == summary(Generator(plain, EOS).generate(wanted, GREEDY))
        before = after


@pytest.mark.parametrize(("tied", "pack"), [(False, False), (True, True)])
def test_bf16_weights_are_copies_that_sync_refreshes(world: World, tied: bool, pack: bool) -> None:
    source = sharded(world, torch.bfloat16, tied=tied)
    weights = follow(source, torch.bfloat16, pack)
    generator = Generator(weights.model, EOS)
    stale = {name: held(weights, name).clone() for name, _ in source.named_parameters()}
    assert stale.keys() == {name for name, _ in weights.model.named_parameters()}
    packed = [m for m in weights.model.modules() if getattr(m, "packed", None) is not None]
    assert len(packed) == (7 * ARGS.n_layers if pack and can_pack(torch.bfloat16, CPU) else 0)
    for name, p in source.named_parameters():
        assert torch.equal(stale[name], p.to_local().bfloat16())
        with torch.no_grad():
            p.to_local().add_(1.0)
        assert torch.equal(held(weights, name), stale[name])
    weights.mark_stale()
    weights.sync()
    for name, p in source.named_parameters():
        assert torch.equal(held(weights, name), p.to_local().bfloat16()), name
    head = weights.model.lm_head.weight
    assert (head is weights.model.tok_embeddings.weight) == tied
    assert generator.head.weight_vD.data_ptr() == head.data_ptr()
    samples = generator.generate(requests(prompts(), 1), SamplingParams(5))
    assert samples[0].student_logprobs.dtype == torch.float32
    weights.release()
    assert all(getattr(m, "packed", None) is None for m in weights.model.modules())


def test_packed_weights_give_the_same_log_probs(world: World) -> None:
    """They equal those of plain weights up to bf16 rounding, before and after an update."""
    source = sharded(world, torch.bfloat16)
    both = [follow(source, torch.bfloat16, pack) for pack in (False, True)]
    wanted = requests(prompts(), 2)
    for _ in range(2):
        plain, packed = (Generator(w.model, EOS).generate(wanted, GREEDY) for w in both)
        pairs = zip(plain, packed, strict=True)
        same = [(a, b) for a, b in pairs if a.response_ids == b.response_ids]
        assert len(same) >= 18, "bf16 turns few greedy choices"
        for a, b in same:
            torch.testing.assert_close(a.student_logprobs, b.student_logprobs, rtol=0, atol=0.1)
        with torch.no_grad():
            for p in source.parameters():
                p.to_local().mul_(1.2)
        for weights in both:
            weights.mark_stale()
            weights.sync()


# --------------------------------------------------------------------- several ranks


def gathered_weights_are_whole(dtype: torch.dtype, tied: bool) -> list[bool]:
    """Each rank scales its own shard. The expected weights come from a plain model, cut by hand."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source, plain = sharded(build_world(CPU), dtype, tied=tied), tiny(tied=tied)
    weights = follow(source, dtype)
    with torch.no_grad():
        for p in source.parameters():
            p.to_local().mul_(1.5 + rank)
    weights.mark_stale()
    weights.sync()
    same = []
    for name, p in plain.named_parameters():
        parts = [part * (1.5 + r) for r, part in enumerate(p.chunk(ranks))]
        same.append(torch.equal(held(weights, name), torch.cat(parts).to(dtype)))
    return same


def sample_some() -> list[list[tuple[Any, ...]]]:
    """Twelve prompts, then fewer than there are ranks."""
    generator, out, dp = Generator(tiny(), EOS, 4, 40), [], build_world(CPU).dp
    for lengths in (LENGTHS, [9, 4], [5]):
        samples = sample_responses(generator, prompts(lengths), 3, SamplingParams(10), (42, 7), dp)
        logprobs = [s.student_logprobs.tolist() for s in samples]
        out.append(list(zip(summary(samples), logprobs, strict=True)))
    return out


def on_two_ranks() -> dict[str, Any]:
    """Run all that needs two ranks in one spawn, because processes start slowly."""
    kinds = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
    world = build_world(CPU)
    source = sharded(world)
    # One prompt: the second rank has no micro-batch of its own.
    generator, one = Generator(follow(source).model, EOS), prompts([6])
    return {
        "whole": [gathered_weights_are_whole(*kind) for kind in kinds],
        "samples": sample_some(),
        "probe": probe(source, generator, one, SamplingParams(8), 0, world),
    }


def check_samples(got: list[list[tuple[Any, ...]]], expected: list[list[tuple[Any, ...]]]) -> None:
    for mine, truth in zip(got, expected, strict=True):
        assert [entry for entry, _ in mine] == [entry for entry, _ in truth]
        for (_, values), (_, logprobs) in zip(mine, truth, strict=True):
            assert values == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_any_number_of_ranks_gives_the_same_samples_and_weights() -> None:
    truth = sample_some()
    indices = [p.index for p in prompts() for _ in range(3)]
    assert [entry[0][:2] for entry in truth[0]] == list(zip(indices, [0, 1, 2] * 12, strict=True))
    for result in run_distributed(on_two_ranks, 2):
        check_samples(result["samples"], truth)
        assert all(all(whole) and len(whole) > 20 for whole in result["whole"])
        assert abs(result["probe"]["kl"]) <= 1e-6 and 0 < result["probe"]["gap"] <= 1e-4
    for samples in run_distributed(sample_some, 3):
        check_samples(samples, truth)
