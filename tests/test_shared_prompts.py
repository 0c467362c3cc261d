"""A prompt that several responses share is computed once, and the results stay the same.

They are compared with those of the same samples with a prompt of their own each. Shapes: T packed
tokens, R response tokens, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from distributed_utils import lone_world
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_student import CPU, make_sample, naive_logprobs, one_process_group, tiny_qwen3
from torch import Tensor

from opd_titan.data.types import Sample
from opd_titan.distill.head import score_head
from opd_titan.distill.packing import (
    PackedBatch,
    balance,
    cost,
    fill_microbatches,
    pack,
    place,
    plan_minibatches,
    unpack_values,
)
from opd_titan.distributed.world import ALONE, Axis, World
from opd_titan.models import attention, transforms
from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import Distribution
from opd_titan.observability.step_scalars import packed_flops

# (prompt, responses of its group): one token or several, alone or not, an empty share of a piece.
GROUPS = [(3, (5, 1, 9)), (1, (1, 1)), (6, (19,)), (14, (1, 30, 2, 2)), (2, (7, 4))]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_process_group():
        yield


def grouped(groups: list[tuple[int, tuple[int, ...]]], seed: int = 0) -> list[Sample]:
    """Return the samples of groups, one of each group in turn."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(11, (n,), generator=generator).tolist()

    prompts = [ids(p) for p, _ in groups]
    most = max(len(responses) for _, responses in groups)
    return [
        make_sample(prompts[g], ids(responses[n]), g)
        for n in range(most)
        for g, (_, responses) in enumerate(groups)
        if n < len(responses)
    ]


def apart(samples: list[Sample]) -> list[Sample]:
    """Return the same samples, each with a prompt of its own."""
    return [replace(s, prompt=replace(s.prompt, index=i)) for i, s in enumerate(samples)]


def processed(samples: list[Sample]) -> int:
    """Return the tokens that go through the layers if each prompt does once."""
    prompts = {s.prompt.index: len(s.prompt.token_ids) for s in samples}
    return sum(prompts.values()) + sum(len(s.response_ids) - 1 for s in samples)


# ------------------------------------------------------------------- the same numbers


def results(model: torch.nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    """Return log-probs, a loss that weights each token, and the gradients of all parameters."""
    batch = pack(samples, lone_world())

    def head(h_TD: Tensor, w_VD: Tensor) -> Tensor:
        logprobs_RV = (h_TD[batch.predict_R] @ w_VD.t()).log_softmax(1)
        return logprobs_RV.gather(1, batch.targets_R[:, None]).squeeze(1)

    model.zero_grad()
    logprob_R = model(batch.tokens_T, batch.attend, head)
    loss = (logprob_R * torch.linspace(0.5, 2.0, len(logprob_R), dtype=logprob_R.dtype)).sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "loss": loss.detach(), "log-probs": logprob_R.detach()}


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys() and len(found) > 15
    for name, value in truth.items():
        difference = (found[name] - value).abs().max() / value.abs().max()
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float64, "none"), (torch.float64, "selective"), (torch.float64, "full")]
    + [(torch.float32, "none")],
    ids=str,
)
def test_sharing_changes_no_number(dtype: torch.dtype, mode: str) -> None:
    # The rotary embedding rounds to fp32 whatever the dtype.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    samples = grouped(GROUPS)
    truth = results(tiny_qwen3().to(dtype), apart(samples))
    model = tiny_qwen3().to(dtype)
    transforms.apply_activation_checkpointing(model.layers, mode)
    found = results(model, samples)
    names = {n.replace("_checkpoint_wrapped_module.", ""): v for n, v in found.items()}
    assert_same(names, truth, tolerance)
    reference_R = torch.cat([naive_logprobs(tiny_qwen3().to(dtype), s) for s in samples])
    torch.testing.assert_close(found["log-probs"], reference_R, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.long
def test_sharing_changes_no_number_when_compiled() -> None:
    import torch._dynamo

    samples = grouped(GROUPS)
    truth = results(tiny_qwen3(), apart(samples))
    model = tiny_qwen3()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        transforms.apply_compile(model.layers)
        assert_same(results(model, samples), truth, 2e-5)
    torch._dynamo.reset()


def lower_right(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, **options):
    """Compute what `varlen_attn` does: its causal mask is aligned with the last key."""
    assert options == {"window_size": (-1, 0), "enable_gqa": True}
    outs = []
    for i in range(len(cu_q) - 1):
        q_i, k_i, v_i = (
            x[cu[i] : cu[i + 1]].transpose(0, 1) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        k_i, v_i = (x.repeat_interleave(len(q_i) // len(k_i), 0) for x in (k_i, v_i))
        n, m = q_i.shape[1], k_i.shape[1]
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        scores = q_i @ k_i.transpose(1, 2) / q.shape[2] ** 0.5
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(2) @ v_i).transpose(0, 1))
    return torch.cat(outs)


def test_the_packed_kernel_is_given_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = grouped(GROUPS)
    truth = results(tiny_qwen3().double(), apart(samples))
    monkeypatch.setattr(PackedAttention, "_has_packed_kernel", staticmethod(lambda q: True))
    options = frozenset({"window_size", "enable_gqa"})
    monkeypatch.setattr(attention, "varlen_attn", lambda: (lower_right, options))
    assert_same(results(tiny_qwen3().double(), samples), truth, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_packed_kernel_of_the_device() -> None:
    """Its causal mask is aligned with the last key, forward and backward."""
    batch = pack(grouped(GROUPS), World(torch.device("cuda"), None, ALONE, ALONE))
    sizes = [(len(batch.tokens_T), heads, 64) for heads in (8, 4, 4)]
    leaves = [torch.randn(s, device="cuda").bfloat16().requires_grad_(True) for s in sizes]
    found = batch.attend(*leaves, 0)
    weight = torch.randn_like(found)
    exact = [x.detach().double().requires_grad_(True) for x in leaves]
    truth = batch.attend(*exact, 0)
    assert batch.attend._has_packed_kernel(leaves[0]) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol=2e-2)
    mine = torch.autograd.grad(found, leaves, weight)
    for a, b in zip(mine, torch.autograd.grad(truth, exact, weight.double()), strict=True):
        assert (a.double() - b).norm() < 2e-2 * b.norm()


# ------------------------------------------------------------------------------ packing

groups_of_samples = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=5)),
    min_size=1,
    max_size=8,
).map(lambda groups: [(p, tuple(r)) for p, r in groups])


@settings(deadline=None)
@given(groups_of_samples, st.integers(1, 4))
def test_every_prompt_is_packed_once(groups: list[Any], ranks: int) -> None:
    samples = grouped(groups)
    world = World(CPU, None, ALONE, Axis(0, ranks))
    batch = pack(samples, world)
    tokens = processed(samples)
    assert len(batch.tokens_T) == tokens + -tokens % ranks == len(batch.attend.positions_T)
    assert packed_flops(samples, lambda lengths, _: sum(lengths), 0) == tokens
    assert batch.targets_R.tolist() == [t for s in samples for t in s.response_ids]
    predicted = unpack_values(batch.predict_R, samples)
    for s, rows in zip(samples, predicted, strict=True):
        inputs = [s.prompt.token_ids[-1], *s.response_ids[:-1]]
        assert batch.tokens_T[rows].tolist() == inputs
        first = len(s.prompt.token_ids) - 1
        assert batch.attend.positions_T[rows].tolist() == list(range(first, first + len(rows)))


def test_a_prompt_is_its_row_and_its_tokens() -> None:
    def tokens(*samples: Sample) -> int:
        return len(pack(samples, lone_world()).tokens_T)

    first = make_sample([1, 2, 3], [4, 5], index=7)
    assert tokens(first, make_sample([1, 2, 3], [6], index=7)) == 3 + 1
    assert tokens(first, make_sample([1, 2, 9], [6], index=7)) == 4 + 3
    assert tokens(first, make_sample([1, 2, 3], [6], index=8)) == 4 + 3


@torch.no_grad()
def test_scores_of_a_group() -> None:
    model, samples = tiny_qwen3(), grouped(GROUPS)
    batch: PackedBatch = pack(samples, lone_world())
    head = partial(
        score_head, predict_R=batch.predict_R, targets_R=batch.targets_R, dist=Distribution(0.9)
    )
    for mine, s in zip(
        unpack_values(model(batch.tokens_T, batch.attend, head), samples), samples, strict=True
    ):
        torch.testing.assert_close(mine, naive_logprobs(model, s, 0.9), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=300))
def test_attention_is_hardly_padded(lengths: list[int]) -> None:
    shapes, pad_N, _ = PackedAttention(lengths, CPU)._padding
    assert sum(b * s for b, s in shapes) == len(pad_N)
    assert len(pad_N) <= sum(lengths) * (1 + attention._PADDED_SHARE) + 32 * len(shapes)


# ----------------------------------------------------------------- ranks, micro-batches


@settings(deadline=None, max_examples=200)
@given(groups_of_samples, st.integers(1, 6), st.integers(1, 90))
def test_placing_properties(groups: list[Any], ranks: int, budget: int) -> None:
    samples = sorted(grouped(groups), key=lambda s: s.prompt.index)
    members = place(samples, ranks)
    assert sorted(i for m in members for i in m) == list(range(len(samples)))
    assert all(m == sorted(m) for m in members) and len(members) == ranks
    # Never worse than placing single samples, even if those know nothing of their prompts.
    single = balance([cost([s]) for s in samples], ranks)
    busiest = max(cost([samples[i] for i in m]) for m in members)
    assert busiest <= max(cost([samples[i] for i in m]) for m in single)
    bins = fill_microbatches(samples, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(samples)))
    for b in bins:
        assert b and b == sorted(b)
        chosen = [samples[i] for i in b]
        assert cost(chosen) <= budget or len(b) == 1
        assert processed(chosen) <= cost(chosen) <= sum(s.num_tokens for s in chosen)


def test_groups_stay_together_where_that_balances() -> None:
    samples = grouped([(100, (150,) * 8)] * 16)
    for ranks in (1, 2, 4, 8, 16):
        plan = [plan_minibatches(samples, 1, 1 << 20, Axis(r, ranks))[0] for r in range(ranks)]
        prompts = [{s.prompt.index for s in p.microbatches[0]} for p in plan]
        assert sum(map(len, prompts)) == 16 and set().union(*prompts) == set(range(16))
