"""The chunked head against plain autograd over full logits, and against what was sampled.

Two defects of the prototype (design.md, section 3) would fail here: scoring the full distribution
of samples from a truncated one, and tensors of log-probs [batch, time, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from distributed_utils import lone_world
from tiny_head import (
    BASELINES,
    CASES,
    DIVERGENCES,
    REF,
    SAMPLED,
    SCALE,
    TRUNCATED,
    WHOLE,
    Case,
    Problem,
    R,
    T,
    V,
    assert_close,
    each_case,
    set_chunk_rows,
)
from tiny_student import (
    LargestTensor,
    all_responses,
    make_sample,
    naive_kept,
    response_logits,
    tiny_qwen3,
)
from torch.autograd.profiler import profile

from opd_titan.data.types import Prompt
from opd_titan.distill import head as head_module
from opd_titan.distill.head import (
    PROBE_EVERY,
    FrozenHeads,
    LossHead,
    LossRule,
    hidden_head,
    probed,
    score_head,
)
from opd_titan.distill.objectives import ObjectiveSettings, policy_gradient, sft
from opd_titan.distill.packing import pack, unpack_values
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.world import Axis
from opd_titan.models.kernels import head_plain
from opd_titan.models.logits import Distribution, VocabHead, truncate_, whole_logits
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.sampler import sample
from opd_titan.rollout.scheduler import Request

# ---------------------------------------------------------------- loss and gradients

# Rows per chunk: one, some (with a shorter last chunk), all.
DISTS = [(WHOLE, 1), (WHOLE, 1000), (Distribution(0.5), 4)]
SAMPLED_FROM = [*SAMPLED, *BASELINES]
LOSSES = [
    *product(CASES, DISTS),
    *product(SAMPLED_FROM, [(dist, 24) for dist in TRUNCATED]),  # truncation makes that 3 rows
]


@pytest.mark.parametrize(("case", "chunked"), LOSSES, ids=lambda x: str(x))
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, case: Case, chunked: tuple[Distribution, int]
) -> None:
    dist, rows = chunked
    set_chunk_rows(monkeypatch, case, rows)
    m = Problem(dist)
    s_RV, (plain_R, advantage_R) = m.student_logprobs(), m.plain_loss(case)
    loss, stats = m.loss(case)
    assert_close(loss, SCALE * plain_R.sum())
    assert_close(stats.loss_R, plain_R)
    assert_close(stats.logprob_R, m.pick(s_RV))
    assert_close(stats.entropy_R, -(s_RV.exp() * s_RV).sum(1))
    if advantage_R is not None:
        assert_close(stats.advantage_R, advantage_R)
    if case.name == "policy_gradient":
        old_R = m.rollout_R if case.how.true_ratio else m.pick(s_RV).float()
        ratio_R = (stats.logprob_R - old_R).exp()
        assert_close(stats.ratio_R, ratio_R.detach())
        high, low = ratio_R > 1 + case.how.clip_high, ratio_R < 1 - case.how.clip_low
        assert torch.equal(stats.clipped_R, torch.where(advantage_R > 0, high, low))
        if case in SAMPLED:
            assert 0 < stats.clipped_R.sum() < R
    else:
        assert stats.ratio_R is stats.clipped_R is None
    true_grads = m.gradients(SCALE * plain_R.sum(), -0.37)
    for mine, true in zip(m.gradients(loss, -0.37), true_grads, strict=True):
        assert true.norm() > 1e-3
        assert_close(mine, true)
    check_frozen(m, case, stats)


def check_frozen(m: Problem, case: Case, stats: Any) -> None:
    """Check that the log-probs of frozen models are returned, and only if they are needed."""
    for role, needed in (("teacher", case.exact), ("reference", case.exact and case.has_reference)):
        found_R = getattr(stats, f"{role}_R")
        assert (found_R is not None) is needed
        if needed:
            assert_close(found_R, m.pick(m.frozen_logprobs(role)))
    assert bool(stats.probe) is case.exact


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dist", [WHOLE, Distribution(0.5), *TRUNCATED], ids=str)
def test_score_head_is_log_softmax_gathered(
    monkeypatch: pytest.MonkeyPatch, dist: Distribution, rows: int
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": rows * V * 4})
    m = Problem(dist)
    scored_R = score_head(m.hidden_TD, m.weight_VD, **m.where())
    assert scored_R.dtype == torch.float32 and not scored_R.requires_grad
    assert_close(scored_R, m.pick(m.student_logprobs()))
    kept_RD = hidden_head(m.hidden_TD, m.weight_VD, m.predict_R)
    assert torch.equal(kept_RD, m.hidden_TD[m.predict_R])


@each_case
def test_bf16_is_within_its_rounding(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """The error relative to fp64 is not larger than that of bf16 logits and autograd."""
    set_chunk_rows(monkeypatch, case, 8)
    m = Problem(dtype=torch.bfloat16)
    loss, stats = m.loss(case)
    assert loss.dtype == torch.float32
    exact_R, plain_R = (m.plain_loss(case, t)[0] for t in (torch.float64, torch.bfloat16))
    error, plain_error = ((x - exact_R).norm() for x in (stats.loss_R, plain_R))
    assert error <= 2 * plain_error + 2e-3 * exact_R.norm()
    exact, plain = (SCALE * x_R.sum() for x_R in (exact_R, plain_R))
    triples = zip(m.gradients(loss), m.gradients(plain), m.gradients(exact), strict=True)
    for mine, plain_grad, true in triples:
        assert mine.dtype == torch.bfloat16
        error, plain_error = ((g.float() - true.float()).norm() for g in (mine, plain_grad))
        assert error <= 2 * plain_error + 4e-3 * true.float().norm()
        assert error <= 0.04 * true.float().norm()


@each_case
def test_large_logits_do_not_overflow(case: Case) -> None:
    m = Problem()
    with torch.no_grad():
        m.hidden_TD *= 100.0
        for hidden, _ in m.frozen.values():
            hidden *= 100.0
        m.rollout_R = m.pick(m.student_logprobs()).float() + 0.05
    plain_R, _ = m.plain_loss(case)
    loss, stats = m.loss(case)
    bounded = case.name == "jsd" or case.how.reward_power or case.how.log_ratio_clamp
    assert plain_R.abs().max() > (0.5 if bounded else 30.0)
    assert_close(stats.loss_R, plain_R, rtol=1e-4, atol=2e-3)
    for mine, true in zip(m.gradients(loss), m.gradients(SCALE * plain_R.sum()), strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= 1e-3 * true.norm() + 1e-4


@pytest.mark.parametrize("sizes", [(13, 16), (16, 13)], ids=lambda s: f"student {s[0]} of {s[1]}")
@each_case
def test_only_token_ids_of_all_models_take_part(case: Case, sizes: tuple[int, int]) -> None:
    m = Problem(vocab=sizes[0], teacher_vocab=sizes[1])
    assert m.student_logprobs().shape == m.frozen_logprobs("teacher").shape == (R, 13)
    plain_R, _ = m.plain_loss(case)
    loss, stats = m.loss(case)
    assert_close(stats.loss_R, plain_R)
    true_grads = m.gradients(SCALE * plain_R.sum())
    for mine, true in zip(m.gradients(loss), true_grads, strict=True):
        assert_close(mine, true)
    scored_R = score_head(m.hidden_TD, m.weight_VD, **m.where())
    assert_close(scored_R, m.pick(m.student_logprobs()))


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize(("length", "start"), [(1, 0), (8, 5), (64, 0), (100, 123_456), (512, 5)])
def test_the_probe_sees_every_position_of_equal_responses_alike(length: int, start: int) -> None:
    """A stride of 8 would probe the first token of all responses, or of none."""
    count = 3_000
    place = probed(start, start + count * length)
    assert len(place) == pytest.approx(count * length / PROBE_EVERY, rel=1e-3, abs=2)
    seen = torch.bincount(place % length, minlength=length)
    assert seen.min() > 0.7 * count / PROBE_EVERY and seen.max() < 1.3 * count / PROBE_EVERY


def by_loops(m: Problem) -> dict[str, list[float]]:
    """Return the values of the probed tokens, by loops over the vocabulary."""
    found: dict[str, list[float]] = {}
    s_RV, t_RV = m.student_logprobs().detach(), m.frozen_logprobs("teacher")
    for i in probed(0, R).tolist():
        s, t = s_RV[i].tolist(), t_RV[i].tolist()
        ranked = [sorted(range(V), key=lambda v: -x[v]) for x in (s, t)]  # noqa: B023
        p, q = s_RV[i].exp().tolist(), t_RV[i].exp().tolist()
        values = {
            "kl/reverse": sum(p[v] * (s[v] - t[v]) for v in range(V)),
            "kl/forward": sum(q[v] * (t[v] - s[v]) for v in range(V)),
            "policy/teacher_entropy": -sum(q[v] * t[v] for v in range(V)),
            "policy/top_k_overlap": len(set(ranked[0][:16]) & set(ranked[1][:16])) / 16,
            "policy/top_1_agreement": float(ranked[0][0] == ranked[1][0]),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 16, 1000])
def test_the_probe_sees_the_same_tokens_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    case = Case("reverse_kl", REF)
    set_chunk_rows(monkeypatch, case, rows)
    m = Problem(Distribution(0.8))
    with torch.no_grad():  # student and teacher agree in part
        (hidden, head), D = m.frozen["teacher"], m.weight_VD.shape[1]
        hidden[:, :D], head[:, :D] = m.hidden_TD[m.predict_R], m.weight_VD
        head[:, D:] *= 0.3
        hidden[:5] *= -1.0
    expected = by_loops(m)
    assert 0 < sum(expected["policy/top_1_agreement"]) < len(probed(0, R))
    assert 1 < sum(expected["policy/top_k_overlap"]) < 3
    _, stats = m.loss(case)
    assert stats.probe.keys() == expected.keys()
    for name, values in expected.items():
        assert stats.probe[name].tolist() == pytest.approx(values, rel=2e-5, abs=2e-6), name


def test_a_rank_without_a_probed_token_has_the_same_names() -> None:
    """Ranks sum the probe by name. A rank with few response tokens may probe none."""
    m, case = Problem(), Case("reverse_kl")
    _, stats = m.loss(case)
    m.targets_R, m.predict_R, m.rollout_R = m.targets_R[:4], m.predict_R[:4], m.rollout_R[:4]
    m.frozen = {role: (hidden[:4], head) for role, (hidden, head) in m.frozen.items()}
    start = next(n for n in range(1000) if not probed(n, n + 4).numel())
    _, few = m.loss(case, probe_from=start)
    assert few.probe.keys() == stats.probe.keys()
    assert all(value_N.numel() == 0 for value_N in few.probe.values())


# ---------------------------------------------------------------- memory


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Return the most bytes that the allocator held at a time, with operators' temporaries."""
    with profile(profile_memory=True) as record:
        fn()
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


# The cases of each kind with the most tensors.
LARGEST = [SAMPLED[0], BASELINES[0], BASELINES[3]] + [c for c in DIVERGENCES if c.has_reference]


@pytest.mark.parametrize("case", LARGEST, ids=str)
def test_the_loss_head_holds_three_chunks_at_a_time(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """The gradient of the head's weight is not counted."""
    vocab, rows, width, tokens = 2000, 30, 4, 130
    budget = rows * vocab * 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": budget})
    monkeypatch.setattr(head_plain, "_BLOCK_BYTES", {"cpu": 4 * vocab})
    hidden_RD = torch.randn(tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocab, width, requires_grad=True)
    scores, frozen = TokenScores(*torch.randn(3, tokens).sub(8.0)), FrozenHeads()
    if case.exact:
        scores.teacher_hidden = scores.reference_hidden = torch.randn(tokens, width)
        other = VocabHead(torch.randn(vocab, width))
        frozen = FrozenHeads(other, other if case.has_reference else None)

    def step() -> None:
        rule, index_R = LossRule(case.objective, case.how, WHOLE), torch.arange(tokens)
        head = LossHead(rule, index_R, index_R, scores, 1.0, frozen)
        loss, _ = head(hidden_RD, weight_VD)
        loss.backward()

    peak = peak_bytes(step) - weight_VD.nbytes
    # The probe also copies an eighth of the rows.
    assert budget < peak < 3.75 * budget, peak / budget


@pytest.mark.parametrize("dist", [WHOLE, Distribution(0.8, 50, 0.9)], ids=str)
def test_no_tensor_is_larger_than_one_chunk_of_logits(
    monkeypatch: pytest.MonkeyPatch, dist: Distribution
) -> None:
    vocab, tokens, rows, width = 600, 200, 7, 8
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": rows * vocab * 4})
    hidden_TD = torch.randn(tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocab, width, requires_grad=True)
    predict_R, targets_R = torch.arange(90, tokens), torch.randint(vocab, (110,))
    rule = LossRule(sft, ObjectiveSettings(), dist)
    with LargestTensor() as largest:
        loss, _ = LossHead(rule, predict_R, targets_R, TokenScores(), 1.0)(hidden_TD, weight_VD)
        loss.backward()
        score_head(hidden_TD, weight_VD, predict_R, targets_R, dist)
    assert largest.numel == max(rows * vocab, vocab * width)
    # The detector finds full log-probs.
    with LargestTensor() as naive:
        (hidden_TD[predict_R] @ weight_VD.t()).log_softmax(1).sum().backward()
    assert naive.numel == 110 * vocab


def test_only_positions_that_predict_a_response_token_are_projected() -> None:
    m = Problem()
    with LargestTensor() as largest:
        loss, _ = m.loss(Case("sft"))
    assert largest.numel == R * V
    grad_TD, _ = m.gradients(loss)
    unused = torch.ones(T, dtype=torch.bool).index_fill(0, m.predict_R, False)
    assert (grad_TD[unused] == 0).all() and (grad_TD[~unused] != 0).any(1).all()


def test_a_chunk_that_truncates_has_room_for_the_whole_sorted_vocabulary() -> None:
    """Truncation gathers and sorts all columns, including those of other ranks."""
    weight = torch.zeros(64, 2)
    whole, half = VocabHead(weight), VocabHead(weight[:32], Axis(0, 2))
    plain, cut = Distribution(), Distribution(top_p=0.9)

    def rows(head: VocabHead, distribution: Distribution) -> int:
        chunk = head_module._chunks(1 << 24, head, distribution)[0]
        return chunk.stop - chunk.start

    assert rows(half, plain) == 2 * rows(whole, plain)
    assert rows(half, cut) == rows(whole, cut) == rows(whole, plain) // 8


# ---------------------------------------------------------------- sampled and scored


def test_truncation_keeps_what_a_plain_loop_keeps() -> None:
    g = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(40, 13, generator=g) * torch.rand(40, 1, generator=g) * 4
    logits_NV[:8] = logits_NV[:8].round()  # of equal logits the lower token id is kept
    logits_NV[8] = 0.0
    for top_k, top_p in product((0, 1, 3, 13, 18), (0.05, 0.5, 0.83, 0.999, 1.0)):
        kept_NV = naive_kept(logits_NV, top_k, top_p)
        cut_NV = truncate_(logits_NV.clone(), top_k, top_p)
        assert torch.equal(cut_NV != -torch.inf, kept_NV), (top_k, top_p)
        assert torch.equal(cut_NV[kept_NV], logits_NV[kept_NV])
    assert truncate_(logits_NV, 0, 1.0) is logits_NV
    # A nucleus that reaches the mass exactly is complete.
    halves_NV = truncate_(torch.zeros(1, 4), 0, 0.5)
    assert halves_NV.tolist() == [[0.0, 0.0, -torch.inf, -torch.inf]]
    lowest_N = logits_NV.argmin(1)
    cut_NV = truncate_(logits_NV.clone(), 2, 0.3, keep_N=lowest_N)
    kept_NV = naive_kept(logits_NV, 2, 0.3).scatter(1, lowest_N[:, None], True)
    assert torch.equal(cut_NV != -torch.inf, kept_NV)


DISTRIBUTIONS = [WHOLE, Distribution(1.7), *TRUNCATED]
by_distribution = pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)


@by_distribution
def test_sampled_log_probs_are_the_scored_ones(dist: Distribution) -> None:
    g = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(500, 8, generator=g), torch.randn(13, 8, generator=g)
    logits_NV = whole_logits(hidden_ND, VocabHead(weight_VD), dist)
    tokens_N, logprobs_N = sample(logits_NV, torch.rand(500, generator=g, dtype=torch.float64))
    where = hidden_ND, weight_VD, torch.arange(500), tokens_N
    assert_close(logprobs_N, score_head(*where, dist))
    gap = (logprobs_N - score_head(*where, Distribution(dist.temperature))).max()
    assert gap > 0.1 if dist.truncates else gap < 1e-5


@by_distribution
def test_rollout_log_probs_are_those_of_the_update(dist: Distribution) -> None:
    """Compare prefill, KV cache and sampler with packing and the training head."""
    model = tiny_qwen3()
    prompts = [Prompt(i, "", tuple(range(1, 2 + i))) for i in range(5)]
    requests = [Request(p, i, 100 * p.index + i) for p in prompts for i in range(4)]
    params = SamplingParams(12, dist.temperature, dist.top_p, dist.top_k)
    samples = Generator(model, {0}).generate(requests, params)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    batch = pack(samples, lone_world())
    where = batch.predict_R, batch.targets_R
    with torch.no_grad():
        head = partial(score_head, predict_R=where[0], targets_R=where[1], dist=dist)
        scored_R = model(batch.tokens_T, batch.attend, head)
    head = LossHead(LossRule(sft, ObjectiveSettings(), dist), *where, TokenScores(), 1.0)
    _, stats = model(batch.tokens_T, batch.attend, head)
    rollout_R = torch.cat([s.student_logprobs for s in samples])
    torch.testing.assert_close(scored_R, rollout_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.logprob_R, rollout_R, rtol=1e-5, atol=1e-5)
    lengths = [len(s.response_ids) for s in samples]
    assert [len(x) for x in unpack_values(scored_R, samples)] == lengths


@pytest.mark.parametrize("dist", [WHOLE, *TRUNCATED[:2]], ids=str)
def test_expected_gradient_is_that_of_the_kl_to_the_sampled_distribution(dist) -> None:
    """Every response of a tiny model, weighted by the probability q that it is sampled.

    The truth is autograd on the sum over prefixes of P_q(prefix), a constant, times KL(q || T). q
    is the student at the temperature, truncated and renormalized; T is the whole teacher at the
    same temperature.
    """
    vocab, prompt = 5, (3, 1)
    model, teacher = tiny_qwen3(vocab, seed=1), tiny_qwen3(vocab, seed=2)
    rule = LossRule(policy_gradient, ObjectiveSettings(), dist)
    loss, truth, mass = torch.zeros(()), torch.zeros(()), 0.0
    seen: set[tuple[int, ...]] = set()
    for ids in all_responses(vocab, stop=0, max_new_tokens=2):
        s = make_sample(prompt, ids)
        logits_RV = response_logits(model, s) / dist.temperature
        with torch.no_grad():
            t_RV = (response_logits(teacher, s) / dist.temperature).log_softmax(1)
        kept_RV = naive_kept(logits_RV, dist.top_k, dist.top_p)
        q_RV = logits_RV.masked_fill(~kept_RV, -torch.inf).softmax(1)
        reach = torch.cat([torch.ones(1), q_RV[range(len(ids)), ids].detach().cumprod(0)])
        for i in range(len(ids)):
            if ids[:i] not in seen:
                seen.add(ids[:i])
                q, t = q_RV[i][kept_RV[i]], t_RV[i][kept_RV[i]]
                truth = truth + reach[i] * (q * (q.log() - t)).sum()
        if reach[-1] == 0.0:
            continue  # never sampled
        mass += reach[-1].item()
        batch = pack([s], lone_world())
        scores = TokenScores(teacher=t_RV[range(len(ids)), ids])
        head = LossHead(rule, batch.predict_R, batch.targets_R, scores, scale=reach[-1].item())
        loss = loss + model(batch.tokens_T, batch.attend, head)[0]
    assert mass == pytest.approx(1.0, abs=1e-5)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads, true_grads = (torch.autograd.grad(x, parameters) for x in (loss, truth))
    for name, grad, true in zip(names, grads, true_grads, strict=True):
        assert (grad - true).norm() <= 2e-4 * true.norm() + 1e-7, name
