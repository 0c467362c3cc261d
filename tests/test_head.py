"""The chunked head against plain autograd over full logits, and against what was sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from distributed_utils import lone_world
from tiny_student import (
    CPU,
    LargestTensor,
    all_responses,
    make_sample,
    naive_kept,
    naive_logprobs,
    random_samples,
    response_logits,
    tiny_qwen3,
)
from torch import Tensor

from opd_titan.data.types import Prompt, Sample
from opd_titan.distill import head
from opd_titan.distill.head import HeadStats, loss_head, score_head
from opd_titan.distill.objectives import Objective, ObjectiveSettings, policy_gradient, sft
from opd_titan.distill.packing import pack, pack_values, unpack_values
from opd_titan.distill.vocabulary import Rows, TokenScores
from opd_titan.distributed.world import Axis
from opd_titan.models.logits import Distribution, VocabHead, truncate_, whole_logits
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.sampler import sample
from opd_titan.rollout.scheduler import Request

WHOLE = Distribution()
TRUNCATED = [Distribution(1.0, 3, 1.0), Distribution(0.7, 0, 0.8), Distribution(1.3, 4, 0.6)]
DISTRIBUTIONS = [WHOLE, Distribution(0.5), Distribution(1.7), *TRUNCATED]
T, R, D, V = 23, 11, 8, 13
SCALE = 0.07


@pytest.fixture
def chunk_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make the head work in chunks of so many rows of a vocabulary."""

    def set_rows(rows: int, vocab: int = V) -> None:
        monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * vocab * 4})

    return set_rows


class Problem:
    """Random hidden states, weight, targets and scores; predicting positions with gaps."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden_TD = torch.randn(T, D, generator=g).to(dtype).requires_grad_()
        self.weight_VD = (0.6 * torch.randn(V, D, generator=g)).to(dtype).requires_grad_()
        self.predict_R = torch.randperm(T, generator=g)[:R].sort().values
        self.targets_R = torch.randint(V, (R,), generator=g)
        # Around log V, so that ratios fall on both sides of both edges of the clip.
        self.scores = TokenScores(*(torch.randn(3, R, generator=g) - 2.5))

    def loss(self, objective: Objective, dist: Distribution) -> tuple[Tensor, HeadStats]:
        return loss_head(
            self.hidden_TD,
            self.weight_VD,
            predict_R=self.predict_R,
            targets_R=self.targets_R,
            scores=self.scores,
            scale=SCALE,
            objective=objective,
            settings=SETTINGS,
            dist=dist,
        )

    def gradients(self, loss: Tensor, grad_output: float = 1.0) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(
            loss, (self.hidden_TD, self.weight_VD), torch.tensor(grad_output)
        )


SETTINGS = ObjectiveSettings(reference_coef=0.5, true_ratio=True)


def full_logprobs(p: Problem, dist: Distribution) -> Tensor:
    """Log-probs [R, V] by plain autograd; the sampled token is kept wherever it ranks."""
    logits_RV = (p.hidden_TD[p.predict_R] @ p.weight_VD.t()).float() / dist.temperature
    if dist.truncates:
        kept_RV = naive_kept(logits_RV, dist.top_k, dist.top_p)
        kept_RV[torch.arange(R), p.targets_R] = True
        logits_RV = logits_RV.masked_fill(~kept_RV, -1e9)
    return logits_RV.log_softmax(1)


def full_loss(p: Problem, objective: Objective, dist: Distribution) -> tuple[Tensor, ...]:
    """Loss, per-token log-probs and entropies."""
    logprobs_RV = full_logprobs(p, dist)
    logprob_R = logprobs_RV.gather(1, p.targets_R[:, None]).squeeze(1)
    loss = SCALE * objective(Rows(logprob_R, p.scores), SETTINGS).loss_C.sum()
    return loss, logprob_R.detach(), -(logprobs_RV.exp() * logprobs_RV).sum(1).detach()


close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("rows", [1, 3, R, 1000])
@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("objective", [policy_gradient, sft], ids=lambda f: f.__name__)
def test_loss_head_equals_plain_autograd(chunk_rows, objective, dist, rows: int) -> None:
    chunk_rows(rows)
    p = Problem()
    loss, stats = p.loss(objective, dist)
    true_loss, true_logprob_R, true_entropy_R = full_loss(p, objective, dist)
    close(loss, true_loss)
    close(stats.logprob_R, true_logprob_R)
    close(stats.entropy_R, true_entropy_R)
    for grad_output in (1.0, -0.37):
        loss, _ = p.loss(objective, dist)
        true_loss = full_loss(p, objective, dist)[0]
        grads, true_grads = (p.gradients(x, grad_output) for x in (loss, true_loss))
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert true_grad.norm() > 0.01
            close(grad, true_grad)
    result = objective(Rows(true_logprob_R, p.scores), SETTINGS)
    close(stats.loss_R, result.loss_C)
    close(stats.advantage_R, result.advantage_C)
    if objective is sft:
        assert stats.ratio_R is None and stats.clipped_R is None
        return
    close(stats.ratio_R, result.ratio_C)
    assert torch.equal(stats.clipped_R, result.clipped_C)
    if dist == WHOLE:
        assert 0 < stats.clipped_R.sum() < R  # the example shows both kinds


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
def test_score_head_is_log_softmax_gathered(chunk_rows, dist: Distribution, rows: int) -> None:
    chunk_rows(rows)
    p = Problem(1)
    with torch.no_grad():
        scored_R = score_head(p.hidden_TD, p.weight_VD, p.predict_R, p.targets_R, dist)
    assert scored_R.dtype == torch.float32
    close(scored_R, full_loss(p, sft, dist)[1])


def test_large_logits_do_not_overflow() -> None:
    p = Problem()
    with torch.no_grad():
        p.hidden_TD *= 300.0
    loss, stats = p.loss(sft, WHOLE)
    true_loss, true_logprob_R, true_entropy_R = full_loss(p, sft, WHOLE)
    torch.testing.assert_close(stats.logprob_R, true_logprob_R, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stats.entropy_R, true_entropy_R, rtol=1e-5, atol=1e-3)
    for grad, true_grad in zip(p.gradients(loss), p.gradients(true_loss), strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 1000])
def test_bf16_is_within_its_rounding(chunk_rows, rows: int) -> None:
    """As near to fp32 on the same rounded numbers as bf16 logits and autograd are."""
    chunk_rows(rows)
    p, truth = Problem(dtype=torch.bfloat16), Problem(dtype=torch.bfloat16)
    truth.hidden_TD = truth.hidden_TD.detach().float().requires_grad_()
    truth.weight_VD = truth.weight_VD.detach().float().requires_grad_()
    ours, plain, exact = (
        p.loss(sft, WHOLE)[0],
        full_loss(p, sft, WHOLE)[0],
        full_loss(truth, sft, WHOLE)[0],
    )
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= 1.5 * abs(plain - exact) + 1e-3 * abs(exact)
    triples = zip(p.gradients(ours), p.gradients(plain), truth.gradients(exact), strict=True)
    for grad, plain_grad, true_grad in triples:
        assert grad.dtype == torch.bfloat16
        error, plain_error = ((g.float() - true_grad).norm() for g in (grad, plain_grad))
        assert error <= 1.5 * plain_error
        assert error <= 0.01 * true_grad.norm()


# ---------------------------------------------------------------- a whole model


def packed_loss(model, samples: list[Sample], objective, dist: Distribution) -> Tensor:
    batch = pack(samples, lone_world())
    scores = TokenScores(
        pack_values([s.student_logprobs for s in samples], CPU),
        pack_values([s.teacher_logprobs for s in samples], CPU),
        pack_values([s.reference_logprobs for s in samples], CPU),
    )
    with_scores = partial(
        loss_head,
        predict_R=batch.predict_R,
        targets_R=batch.targets_R,
        scores=scores,
        scale=SCALE,
        objective=objective,
        settings=SETTINGS,
        dist=dist,
    )
    return model(batch.tokens_T, batch.attend, with_scores)[0]


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_gradients_of_a_whole_model(chunk_rows, tied: bool, rows: int) -> None:
    """Packed and chunked against one by one over full logits; a tied weight collects both uses."""
    chunk_rows(rows, 11)
    model = tiny_qwen3(tied=tied)
    samples = random_samples([(3, 5), (1, 2), (6, 9), (4, 1)])
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert ("lm_head.weight" in names) is not tied
    loss = packed_loss(model, samples, policy_gradient, Distribution(0.7))
    grads = torch.autograd.grad(loss, parameters)

    true_loss = torch.zeros(())
    for s in samples:
        logprob_R = naive_logprobs(model, s, 0.7)
        old_R = s.student_logprobs
        advantage_R = (s.teacher_logprobs - old_R) + 0.5 * (s.reference_logprobs - old_R)
        ratio_R = (logprob_R - old_R).exp()
        terms_R = torch.minimum(ratio_R * advantage_R, ratio_R.clamp(0.8, 1.2) * advantage_R)
        true_loss = true_loss - SCALE * terms_R.sum()
    close(loss, true_loss)
    for name, grad, true in zip(
        names, grads, torch.autograd.grad(true_loss, parameters), strict=True
    ):
        assert (grad - true).norm() <= 1e-4 * true.norm(), name


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dist", [WHOLE, Distribution(0.8, 50, 0.9)], ids=str)
def test_nothing_larger_than_one_chunk_of_logits_exists(chunk_rows, dist) -> None:
    vocab, tokens, rows = 600, 200, 7
    chunk_rows(rows, vocab)
    hidden_TD = torch.randn(tokens, D, requires_grad=True)
    weight_VD = torch.randn(vocab, D, requires_grad=True)
    predict_R, targets_R = torch.arange(90, tokens), torch.randint(vocab, (110,))
    chosen = dict(predict_R=predict_R, targets_R=targets_R, dist=dist)
    rest = dict(scores=TokenScores(), scale=1.0, objective=sft, settings=SETTINGS)
    with LargestTensor() as largest:
        loss, _ = loss_head(hidden_TD, weight_VD, **chosen, **rest)
        loss.backward()
        with torch.no_grad():
            score_head(hidden_TD, weight_VD, **chosen)
    assert largest.numel == max(rows * vocab, vocab * D)
    # The detector works, and the backward keeps no logits alive either.
    with LargestTensor() as naive:
        (hidden_TD[predict_R] @ weight_VD.t()).log_softmax(1).sum().backward()
    assert naive.numel == 110 * vocab


def test_only_positions_that_predict_a_response_token_are_projected(chunk_rows) -> None:
    chunk_rows(1000)
    p = Problem()
    with LargestTensor() as largest:
        p.loss(sft, WHOLE)
    assert largest.numel == R * V
    grad_TD, _ = p.gradients(p.loss(sft, WHOLE)[0])
    unused = torch.ones(T, dtype=torch.bool).index_fill(0, p.predict_R, False)
    assert (grad_TD[unused] == 0).all() and (grad_TD[~unused] != 0).any(1).all()


# ---------------------------------------------------------------- truncated distributions


def test_truncation_keeps_what_a_plain_loop_keeps() -> None:
    g = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(40, V, generator=g) * torch.rand(40, 1, generator=g) * 4
    logits_NV[:8] = logits_NV[:8].round()  # ties, which the lower token id wins
    logits_NV[8] = 0.0
    for top_k, top_p in product((0, 1, 3, V, V + 5), (0.05, 0.5, 0.83, 0.999, 1.0)):
        kept_NV = naive_kept(logits_NV, top_k, top_p)
        cut_NV = truncate_(logits_NV.clone(), top_k, top_p)
        assert torch.equal(cut_NV != -torch.inf, kept_NV), (top_k, top_p)
        assert torch.equal(cut_NV[kept_NV], logits_NV[kept_NV])
    assert truncate_(logits_NV, 0, 1.0) is logits_NV
    # A nucleus that reaches the mass exactly is complete; ties fall to the lower id.
    halves_NV = truncate_(torch.zeros(1, 4), 0, 0.5)
    assert halves_NV.tolist() == [[0.0, 0.0, -torch.inf, -torch.inf]]
    lowest_N = logits_NV.argmin(1)
    cut_NV = truncate_(logits_NV.clone(), 2, 0.3, keep_N=lowest_N)
    kept_NV = naive_kept(logits_NV, 2, 0.3).scatter(1, lowest_N[:, None], True)
    assert torch.equal(cut_NV != -torch.inf, kept_NV)


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
def test_sampled_log_probs_are_the_scored_ones(dist: Distribution) -> None:
    g = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(500, D, generator=g), torch.randn(V, D, generator=g)
    logits_NV = whole_logits(hidden_ND, VocabHead(weight_VD), dist)
    tokens_N, logprobs_N = sample(logits_NV, torch.rand(500, generator=g, dtype=torch.float64))
    close(logprobs_N, score_head(hidden_ND, weight_VD, torch.arange(500), tokens_N, dist))
    whole_N = score_head(
        hidden_ND, weight_VD, torch.arange(500), tokens_N, Distribution(dist.temperature)
    )
    gap = (logprobs_N - whole_N).max()
    assert gap > 0.1 if dist.truncates else gap < 1e-5


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
def test_rollout_log_probs_are_those_of_the_update(dist: Distribution) -> None:
    """Prefill, KV cache and sampler on one side; packing and the training head on the other."""
    model = tiny_qwen3()
    prompts = [Prompt(i, "", tuple(range(1, 2 + i))) for i in range(5)]
    requests = [Request(p, i, 100 * p.index + i) for p in prompts for i in range(4)]
    params = SamplingParams(12, dist.temperature, dist.top_p, dist.top_k)
    samples = Generator(model, {0}).generate(requests, params)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    batch = pack(samples, lone_world())
    chosen = dict(predict_R=batch.predict_R, targets_R=batch.targets_R, dist=dist)
    with torch.no_grad():
        scored_R = model(batch.tokens_T, batch.attend, partial(score_head, **chosen))
    rest = dict(scores=TokenScores(), scale=1.0, objective=sft, settings=SETTINGS)
    _, stats = model(batch.tokens_T, batch.attend, partial(loss_head, **chosen, **rest))
    rollout_R = torch.cat([s.student_logprobs for s in samples])
    torch.testing.assert_close(scored_R, rollout_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.logprob_R, rollout_R, rtol=1e-5, atol=1e-5)
    assert [len(x) for x in unpack_values(scored_R, samples)] == [
        len(s.response_ids) for s in samples
    ]


@pytest.mark.parametrize("dist", [WHOLE, *TRUNCATED], ids=str)
def test_expected_gradient_is_that_of_the_kl_to_the_sampled_distribution(dist) -> None:
    """Every response of a tiny model, weighted by the chance q that it is sampled.

    The truth is autograd on the sum over prefixes of P_q(prefix), detached, times KL(q || T), with
    q the student at the temperature, cut and renormalised, and T whole at the same temperature.
    """
    vocab, prompt = 5, (3, 1)
    model, teacher = tiny_qwen3(vocab, seed=1), tiny_qwen3(vocab, seed=2)
    settings = ObjectiveSettings()
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
        objective_head = partial(
            loss_head,
            predict_R=batch.predict_R,
            targets_R=batch.targets_R,
            scores=TokenScores(None, t_RV[range(len(ids)), ids], None),
            scale=reach[-1].item(),
            objective=policy_gradient,
            settings=settings,
            dist=dist,
        )
        loss = loss + model(batch.tokens_T, batch.attend, objective_head)[0]
    assert mass == pytest.approx(1.0, abs=1e-5)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    for grad, true in zip(grads, torch.autograd.grad(truth, parameters), strict=True):
        assert (grad - true).norm() <= 2e-4 * true.norm() + 1e-7


def test_a_chunk_that_truncates_has_room_for_the_whole_sorted_vocabulary() -> None:
    """Truncation gathers and sorts every column, whatever part of them a rank holds."""
    weight = torch.zeros(64, 2)
    whole, half = VocabHead(weight), VocabHead(weight[:32], Axis(0, 2))
    plain, cut = Distribution(), Distribution(top_p=0.9)

    def rows(of: VocabHead, distribution: Distribution) -> int:
        chunk = head._chunks(1 << 24, of, distribution)[0]
        return chunk.stop - chunk.start

    assert rows(half, plain) == 2 * rows(whole, plain)
    assert rows(half, cut) == rows(whole, cut) == rows(whole, plain) // 8
