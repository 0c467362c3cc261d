"""The generator against cache-free forwards and transformers, and its weights.

`test_two_ranks` samples on several ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_rollout import (
    ARGS,
    CPU,
    EOS,
    FAMILY,
    Script,
    follow,
    held,
    prompts,
    requests,
    sharded,
    summary,
    tiny,
)

import opd_titan.rollout.generator as generator_module
from opd_titan.data.types import Prompt
from opd_titan.distributed.world import World, build_world, init_world
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import can_pack, uniforms
from opd_titan.models.logits import truncate_
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.memory import _host_bytes
from opd_titan.rollout.scheduler import Request

# ------------------------------------------------- the same, without a cache


@torch.no_grad()
def slow_answer(
    model: Qwen3Model, request: Request, params: SamplingParams
) -> tuple[list[int], list[float], str]:
    """Return tokens, log-probs and finish reason, with a forward over all tokens at each step."""
    prompt, ids, logprobs = request.prompt.token_ids, [], []
    for n in range(params.max_new_tokens):
        attend = PackedAttention([len(prompt) + n], CPU)
        hidden_TD = model(torch.tensor([*prompt, *ids]), attend)
        logits_1V = (hidden_TD[-1:] @ model.lm_head.weight.T).double() / (params.temperature or 1.0)
        logprobs_V = truncate_(logits_1V, params.top_k, params.top_p)[0].log_softmax(0)
        if params.temperature == 0.0:
            token = int(logprobs_V.argmax())
        else:
            u = uniforms(torch.tensor([request.key]), torch.tensor([n]))
            cumulative = logprobs_V.exp().cumsum(0)
            token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
        ids.append(token)
        logprobs.append(float(logprobs_V[token]))
        if token in EOS and not params.ignore_eos:
            return ids, logprobs, "stop"
    return ids, logprobs, "length"


GREEDY = SamplingParams(14, temperature=0.0)


@pytest.mark.parametrize(
    ("params", "slots", "budget"),
    [
        (GREEDY, 1, 1),
        (GREEDY, 3, 45),
        (SamplingParams(12, temperature=0.6), 6, 50),
        (SamplingParams(12, temperature=1.3, top_p=0.9, top_k=20), 6, 50),
        (SamplingParams(12, ignore_eos=True), 0, 8192),
    ],
    ids=str,
)
def test_samples_equal_the_cache_free_forward(
    params: SamplingParams, slots: int, budget: int
) -> None:
    model, wanted = tiny(), requests(prompts(), 2)
    samples = Generator(model, EOS, slots, budget).generate(wanted, params)
    for request, sample in zip(wanted, samples, strict=True):
        assert (sample.prompt, sample.sample_index) == (request.prompt, request.sample_index)
        ids, logprobs, reason = slow_answer(model, request, params)
        assert (sample.response_ids, sample.finish_reason) == (ids, reason)
        values = sample.student_logprobs
        assert values.dtype == torch.float32
        torch.testing.assert_close(
            values.double(), torch.tensor(logprobs).double(), rtol=0, atol=1e-5
        )
    reasons = {"length"} if params.ignore_eos else {"stop", "length"}
    assert {s.finish_reason for s in samples} == reasons


def test_samples_do_not_depend_on_the_layout() -> None:
    model, params = tiny(), SamplingParams(14, temperature=1.2)
    wanted = requests(prompts(), 2)
    whole = summary(Generator(model, EOS).generate(wanted, params))
    assert len({tuple(ids) for _, _, ids, _ in whole}) > 20, "samples of a group must differ"
    for slots, budget in [(2, 1), (13, 100)]:
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


@pytest.mark.parametrize(("page_size", "temperature"), [(3, 0.0), (16, 1.1)])
def test_a_preempted_sequence_continues_with_the_same_result(
    page_size: int, temperature: float
) -> None:
    """With the pages of one sequence, all sequences but the oldest are preempted now and then."""
    params = SamplingParams(14, temperature)
    model, wanted = tiny(), requests(prompts(), 3)
    expected = Generator(model, EOS).generate(wanted, params)
    least = -(-(40 + 14 - 1) // page_size)
    preempted = []
    for pages in (least, 3 * least):
        generator = Generator(model, EOS, 5, 30, page_size=page_size, max_pages=pages)
        samples = generator.generate(wanted, params)
        assert summary(samples) == summary(expected)
        for a, b in zip(samples, expected, strict=True):
            torch.testing.assert_close(a.student_logprobs, b.student_logprobs)
        preempted.append(generator.stats.preempted)
    assert preempted[0] > 2


def test_free_memory_is_the_containers_where_it_is_less(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert _host_bytes(tmp_path) == physical // 2  # the system says nothing
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 2048000 kB\nMemAvailable: 1024000 kB\n")
    assert _host_bytes(tmp_path) == 1000 << 20
    (group / "memory.current").write_text(f"{300 << 20}\n")
    # Files that were read, such as the weights, are not lost to the rollout.
    (group / "memory.stat").write_text(f"anon {150 << 20}\ninactive_file {150 << 20}\n")
    for limit, free in [("max", 1000), (f"{500 << 20}", 350), (f"{5000 << 20}", 1000)]:
        (group / "memory.max").write_text(limit)
        assert _host_bytes(tmp_path) == free << 20


@pytest.mark.parametrize(("kv_heads", "tied"), [(1, True), (2, False), (4, True)])
def test_greedy_equals_transformers_generate(kv_heads: int, tied: bool) -> None:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
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


@pytest.mark.parametrize(
    ("last", "eos", "limit", "expected", "reason"),
    [
        (1, {0}, 1, [0], "stop"),  # the stop token is the first one, and at the limit
        (5, {0}, 4, [4, 3, 2, 1], "length"),
        (7, {0, 3, 50}, 9, [6, 5, 4, 3], "stop"),  # the first of several stop tokens
        (3, set(), 4, [2, 1, 0, 0], "length"),
        (4, {4}, 3, [3, 2, 1], "length"),  # a stop token in the prompt ends nothing
    ],
)
def test_where_a_response_ends(
    last: int, eos: set[int], limit: int, expected: list[int], reason: str
) -> None:
    some = [Prompt(i, "", (99, end)) for i, end in enumerate([last, 30, last])]
    samples = Generator(Script(), eos, 3).generate(requests(some, 1), SamplingParams(limit))
    for sample in samples[::2]:
        assert (sample.response_ids, sample.finish_reason) == (expected, reason)
        assert len(sample.student_logprobs) == len(expected)


def test_a_stop_token_that_is_ignored_is_no_stop() -> None:
    params = SamplingParams(3, ignore_eos=True)
    (sample,) = Generator(Script(), {0}).generate(requests([Prompt(0, "", (3,))], 1), params)
    assert (sample.response_ids, sample.finish_reason) == ([2, 1, 0], "length")


def test_every_token_is_reported_and_no_step_has_idle_rows() -> None:
    """The last tokens of one long response among short ones are decoded alone."""
    some = [Prompt(i, "", (n,)) for i, n in enumerate([3, 3, 50, 3, 3, 3])]
    model, seen = Script(), []
    generator = Generator(model, {0})
    samples = generator.generate(requests(some, 1), SamplingParams(60), seen.append)
    assert model.decoded == [6] * 3 + [1] * 47
    assert samples[2].response_ids == list(range(49, -1, -1))
    assert sum(seen) == sum(len(s.response_ids) for s in samples)
    assert generator.generate([], SamplingParams(60)) == []


# ---------------------------------------------------------- the generator's weights


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return the world of one process."""
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
    before = summary(generator.generate(wanted, GREEDY))
    train_a_step(source)  # and no sync
    after = summary(generator.generate(wanted, GREEDY))
    plain = tiny(tied=tied)
    for name, p in source.named_parameters():
        plain.get_parameter(name).copy_(p.detach().full_tensor())
        mine = weights.model.get_parameter(name)
        assert mine.data_ptr() == p.to_local().data_ptr() and not mine.requires_grad
    assert before != after == summary(Generator(plain, EOS).generate(wanted, GREEDY))


@pytest.mark.parametrize(("tied", "pack"), [(False, False), (True, True)])
def test_bf16_weights_are_copies_that_sync_refreshes(world: World, tied: bool, pack: bool) -> None:
    source = sharded(world, torch.bfloat16, tied=tied)
    weights = follow(source, torch.bfloat16, pack)
    packed = [m for m in weights.model.modules() if getattr(m, "packed", None) is not None]
    assert len(packed) == (7 * ARGS.n_layers if pack and can_pack(torch.bfloat16, CPU) else 0)
    for name, p in source.named_parameters():
        stale = p.to_local().bfloat16()
        with torch.no_grad():
            p.to_local().add_(1.0)
        assert torch.equal(held(weights, name), stale)
    weights.mark_stale()
    weights.sync()
    for name, p in source.named_parameters():
        assert torch.equal(held(weights, name), p.to_local().bfloat16()), name
    head = weights.model.lm_head.weight
    assert (head is weights.model.tok_embeddings.weight) == tied
    assert Generator(weights.model, EOS).head.weight_vD.data_ptr() == head.data_ptr()
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
