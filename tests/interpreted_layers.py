"""The kernels between a layer's products, and over logits, in Triton's interpreter.

`test_kernels.py` runs this file in a process of its own: the interpreter is chosen before Triton is
imported. Shapes: see `opd_titan.models.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, product

import pytest
import torch
import triton
from test_head_kernels import WIDTHS, Chunk, check
from tiny_rollout import ARGS, CPU, tiny
from torch import Tensor

from opd_titan.models import kernels
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import CacheSlots, attention, head_logits, layers, logits, plain

TYPES = [torch.float16, torch.float32]
# Two steps of the type at 1, because a different rounding of exp may change the next rounding.
TOLERANCE = {torch.float16: 2e-3, torch.float32: 1e-6}
EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "F"), [(1, 7), (3, 1024), (5, 1500)])
def test_silu_mul(T: int, F: int, dtype: torch.dtype) -> None:
    both = torch.randn(T, 2 * F).mul_(3.0).to(dtype)
    both[0, 0], both[0, 1] = -100.0, 100.0  # exp(-x) is infinite, exp(x) would be
    gate_TF, up_TF = both.chunk(2, dim=1)
    out_TF = layers.silu_mul(gate_TF, up_TF)
    assert out_TF.is_contiguous()
    assert_close(out_TF, plain.silu_mul(gate_TF, up_TF))
    assert_close(layers.silu_mul(gate_TF.contiguous(), up_TF), plain.silu_mul(gate_TF, up_TF))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "D"), [(1, 64), (3, 1024), (5, 1000), (2, 5120)])
def test_add_norm(T: int, D: int, dtype: torch.dtype) -> None:
    x_TD, weight_D = torch.randn(T, D).to(dtype), torch.rand(D).to(dtype)
    y_TD = torch.randn(T, 2 * D).mul_(4.0).to(dtype)[:, :D]
    sum_TD, normed_TD = layers.add_norm(x_TD, y_TD, weight_D, EPS)
    expected = plain.add_norm(x_TD, y_TD, weight_D, EPS)
    assert torch.equal(sum_TD, expected[0])
    assert_close(normed_TD, expected[1])


class Heads:
    """The heads of T tokens, as views of one product, with weights and tables of angles."""

    def __init__(self, T: int, H: int, G: int, K: int, dtype: torch.dtype) -> None:
        heads = torch.randn(T, (H + 2 * G) * K).to(dtype).unflatten(1, (-1, K))
        self.q_THK, self.k_TGK, self.v_TGK = heads.split([H, G, G], dim=1)
        angles_T1K = torch.rand(T, 1, K // 2).mul_(100.0).repeat(1, 1, 2)
        weights = torch.rand(2, K).to(dtype)
        self.rest = (*weights, EPS, angles_T1K.cos(), angles_T1K.sin())

    @property
    def all(self) -> tuple:
        return (self.q_THK, self.k_TGK, self.v_TGK, *self.rest)

    def plain(self) -> tuple[Tensor, Tensor]:
        return plain.norm_rope(self.q_THK, self.k_TGK, *self.rest)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("T", "H", "G", "K"), [(1, 1, 1, 32), (5, 4, 2, 64), (3, 14, 2, 128), (2, 16, 1, 128)]
)
def test_norm_rope(T: int, H: int, G: int, K: int, dtype: torch.dtype) -> None:
    heads = Heads(T, H, G, K, dtype)
    got = layers.norm_rope(*heads.all, None, None, None, None)
    for x, expected in zip(got, heads.plain(), strict=True):
        assert x.is_contiguous()
        assert_close(x, expected)


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    operands: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of `function`'s results, computed by autograd in fp64."""
    leaves = [x.double().requires_grad_() for x in operands]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else [*results]
    return list(torch.autograd.grad(results, leaves, [g.double() for g in upstream]))


def assert_gradients(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for x, exact in zip(got, expected, strict=True):
        assert x.dtype == dtype and x.is_contiguous()
        # Relative to the largest element, because sums over tokens can cancel.
        error = (x.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error <= {torch.float16: 1e-3, torch.float32: 2e-6}[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "F"), [(1, 7), (5, 1500)])
def test_gradients_of_silu_mul(T: int, F: int, dtype: torch.dtype) -> None:
    both = torch.randn(T, 2 * F).mul_(3.0).to(dtype)
    both[0, 0], both[0, 1] = -100.0, 100.0
    operands, g_TF = both.chunk(2, dim=1), torch.randn(T, F).to(dtype)
    got = layers.silu_mul_backward(*operands, g_TF)
    assert_gradients(got, gradients(plain.silu_mul, operands, [g_TF]), dtype)


# More tokens than programs; fewer; one.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "D"), [(1, 64), (3, 1000), (11, 1024)])
@pytest.mark.parametrize("added", [False, True])
def test_gradients_of_norms(
    T: int, D: int, dtype: torch.dtype, added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SUMS", 4 * triton.next_power_of_2(D))
    x_TD, y_TD = torch.randn(2, T, D + 5).to(dtype)[..., :D]
    g_TD, g_total_TD = torch.randn(2, T, D).to(dtype)
    weight_D = torch.rand(D).to(dtype)
    if not added:
        assert_close(layers.norm(x_TD, weight_D, EPS), plain.norm(x_TD, weight_D, EPS))
        expected = gradients(lambda x, w: plain.norm(x, w, EPS), (x_TD, weight_D), [g_TD])
        got = layers.norm_backward(x_TD, weight_D, EPS, g_TD, None)
    else:
        total_TD = x_TD + y_TD
        d_x, d_y, d_weight = gradients(
            lambda x, y, w: plain.add_norm(x, y, w, EPS),
            (total_TD, torch.zeros_like(y_TD), weight_D),
            [g_total_TD, g_TD],
        )
        assert torch.equal(d_x, d_y)
        expected = [d_x, d_weight]
        got = layers.norm_backward(total_TD, weight_D, EPS, g_TD, g_total_TD)
    assert_gradients(got, expected, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("T", "H", "G", "K"), [(1, 1, 1, 32), (11, 4, 2, 64), (3, 14, 2, 128), (2, 16, 1, 128)]
)
def test_gradients_of_norm_rope(
    T: int, H: int, G: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SUMS", 4 * 2 * G * K)
    heads = Heads(T, H, G, K, dtype)
    q_weight_K, k_weight_K, eps, *tables = heads.rest
    upstream = [torch.randn(T, n, K).to(dtype) for n in (H, G)]

    def twin(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        first, second = plain.norm_rope(
            q.float(), k.float(), *(w.float() for w in weights), eps, *tables
        )
        return first.double(), second.double()

    operands = (heads.q_THK, heads.k_TGK, q_weight_K, k_weight_K)
    expected = gradients(twin, operands, upstream)
    got = layers.norm_rope_backward(*operands, eps, *tables, *upstream)
    assert_gradients(got, expected, dtype)


def test_fused_and_plain_models_have_equal_gradients(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(head_dim=32).requires_grad_()
    tokens_T, attend = torch.arange(9) % ARGS.vocab_size, PackedAttention([5, 4], CPU)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(kernels, "fused", lambda x, dtypes=(), fused=fused: fused)
        model.zero_grad()
        h_TD = model(tokens_T, attend)
        (h_TD * torch.linspace(-1.0, 1.0, h_TD.shape[1])).sum().backward()
        found.append([h_TD.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > len(model.layers) * 11
    for plain_x, fused_x in zip(*found, strict=True):
        torch.testing.assert_close(
            fused_x, plain_x, rtol=1e-4, atol=1e-5 * plain_x.abs().max().item()
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("S", [64, 128, 256])
def test_norm_rope_writes_into_its_slots_and_nowhere_else(S: int, dtype: torch.dtype) -> None:
    G, K = 2, 32
    heads = Heads(4, 4, G, K, dtype)
    for heads_first in (False, True):
        before = torch.randn(2, 3, *((G, S, K) if heads_first else (S, G, K))).to(dtype)
        expected, got = (
            x.transpose(2, 3) if heads_first else x for x in (before.clone(), before.clone())
        )
        page_T, offset_T = torch.tensor([2, 0, 2, 0]), torch.tensor([0, S - 1, S // 2, 5])
        q_THK, k_TGK = layers.norm_rope(*heads.all, *got, page_T, offset_T)
        plain.write(CacheSlots(*expected, page_T, offset_T), k_TGK, heads.v_TGK)
        assert torch.equal(got, expected)
        alone = layers.norm_rope(*heads.all, None, None, None, None)
        assert torch.equal(q_THK, alone[0]) and torch.equal(k_TGK, alone[1])


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_block_stats(vocab: int, temperature: float) -> None:
    logits_NV = torch.randn(3, vocab + 5).mul_(5.0)[:, :vocab]
    logits_NV[1, 128:400] = -torch.inf  # two blocks of nothing else, and a part of one
    logits_NV[2] = -torch.inf
    sums_NB, maxima_NB = logits.block_stats(logits_NV, temperature)
    expected = plain.block_stats(logits_NV, temperature)
    torch.testing.assert_close(sums_NB, expected[0], rtol=2e-6, atol=0.0)
    torch.testing.assert_close(maxima_NB, expected[1], rtol=2e-7, atol=0.0)
    assert sums_NB[2].eq(0.0).all() and maxima_NB[2].eq(-torch.inf).all()
    total_N = (sums_NB.double().log() + maxima_NB).logsumexp(dim=1)[:2]
    exact_N = (logits_NV.double() / temperature).logsumexp(dim=1)[:2]
    torch.testing.assert_close(total_N, exact_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 127, 129, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_inverted_blocks(vocab: int, temperature: float) -> None:
    n = 40
    logits_NV = torch.randn(n, vocab + 5).mul_(5.0)[:, :vocab]
    logits_NV[:, 128:400] = -torch.inf
    logits_NV[3] = -torch.inf
    logits_NV[3, vocab // 2] = -1e4  # the one token that there is
    u_N = torch.cat((torch.tensor([0.0, 1.0 - 2.0**-53]), torch.rand(n - 2))).double()
    blocks = plain.block_stats(logits_NV, temperature)
    highest_N, total_N = logits.block_totals(*blocks)
    expected = plain.block_totals(*blocks)
    assert torch.equal(highest_N, expected[0])
    torch.testing.assert_close(total_N, expected[1], rtol=1e-14, atol=0.0)
    rest = (highest_N, u_N * total_N, temperature)
    tokens_N, logs_N = logits.invert_blocks(logits_NV, *blocks, *rest)
    expected = plain.invert_blocks(logits_NV, *blocks, *rest)
    assert torch.equal(tokens_N, expected[0])
    torch.testing.assert_close(logs_N, expected[1], rtol=1e-6, atol=1e-6)
    exact_N = (logits_NV.double() / temperature).log_softmax(1).gather(1, tokens_N[:, None])
    torch.testing.assert_close(logs_N - total_N.log(), exact_N.squeeze(1), rtol=1e-5, atol=1e-5)
    assert tokens_N[3] == vocab // 2


def test_nonfinite_logits_give_a_valid_token() -> None:
    logits_NV = torch.randn(3, 200)
    logits_NV[0, 7], logits_NV[1] = torch.nan, -torch.inf
    logits_NV[2, 3] = torch.inf
    blocks = plain.block_stats(logits_NV, 1.0)
    highest_N, total_N = logits.block_totals(*blocks)
    tokens_N, _ = logits.invert_blocks(logits_NV, *blocks, highest_N, 0.9 * total_N, 1.0)
    assert ((tokens_N >= 0) & (tokens_N < 200)).all()


def test_uniforms_equal_the_twin_bit_for_bit() -> None:
    keys_N = torch.randint(-(2**63), 2**63 - 1, (300,))
    keys_N[:2] = torch.tensor([-(2**63), 2**63 - 1])
    positions_N = torch.arange(300)
    assert torch.equal(logits.uniforms(keys_N, positions_N), plain.uniforms(keys_N, positions_N))


def kept(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Return the kept tokens: likeliest first, ties by lower id, until the mass is reached."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[: top_k or None]
    weights = [math.exp(row[i] - row[order[0]]) for i in order]
    before = [0.0, *accumulate(weights)]
    target = top_p * before[-1] if top_p < 1.0 else math.inf
    return {i for i, mass in zip(order, before, strict=False) if mass < target}


@pytest.mark.parametrize(
    ("vocab", "top_k", "top_p"),
    [
        (1, 0, 0.5),
        (5, 4, 1.0),
        (5, 5000, 0.5),
        (130, 1, 1.0),
        (130, 50, 0.9),
        (130, 0, 1e-9),
        (2049, 4, 0.6),
        (3000, 50, 1.0),
        (3000, 0, 0.95),
    ],
)
def test_truncation_threshold(vocab: int, top_k: int, top_p: float) -> None:
    logits_NV = torch.randn(4, vocab + 3).mul_(3.0)[:, :vocab]
    logits_NV[1].round_()  # many ties, 0 and -0 among them
    logits_NV[2, 1::2] = -torch.inf
    logits_NV[3] = logits_NV[3].mul(1e-6).round().mul(0.0)  # all are 0 or -0
    for module in (logits, plain):
        threshold_N, ties_N = module.truncation_threshold(logits_NV, top_k, top_p)
        for row_V, threshold, ties in zip(logits_NV, threshold_N, ties_N, strict=True):
            tied_V = row_V == threshold
            kept_V = (row_V > threshold) | (tied_V & (tied_V.cumsum(0) <= ties))
            kept_V &= row_V > -torch.inf
            expected = {i for i in kept(row_V.tolist(), top_k, top_p) if row_V[i] > -torch.inf}
            wrong = expected ^ set(kept_V.nonzero()[:, 0].tolist())
            # Among thousands of equal logits, fp32 rounding may change which is the last.
            assert len(wrong) <= len(expected) // 1000, module


# The interpreter is slow.
@pytest.mark.parametrize(("v", "cut"), zip(WIDTHS, (False, True, False), strict=True))
def test_the_heads_passes(v: int, cut: bool) -> None:
    check(head_logits, Chunk(v, cut))


def test_the_heads_derivatives_in_half_precision() -> None:
    check(head_logits, Chunk(50, False), torch.float16)


def samples(dtype: torch.dtype) -> dict[str, list[tuple]]:
    """Return arguments of the operators.

    `norm_rope_backward` is left out: its weights' gradients share memory, which torch's check
    refuses.
    """
    heads, x_TD = Heads(3, 4, 2, 32, dtype), torch.randn(3, 64).to(dtype)
    cache = torch.randn(2, 2, 64, 2, 32).to(dtype)
    slots = torch.tensor([0, 1, 0]), torch.tensor([3, 0, 2])
    table, used = torch.zeros(3, 2, dtype=torch.int32), torch.tensor([1, 9, 64]).int()
    paged = (heads.q_THK, *cache, table, used)
    logits_NV, sums_NB, maxima_NB = torch.randn(3, 300), torch.rand(3, 3), torch.randn(3, 3)
    row_N, x_N = torch.tensor([0, 299, -1]), torch.randn(3)
    return {
        "silu_mul": [tuple(x_TD.chunk(2, dim=1))],
        "silu_mul_backward": [(*x_TD.chunk(2, dim=1), x_TD[:, 32:].contiguous())],
        "norm": [(x_TD, x_TD[0], EPS)],
        "norm_backward": [(x_TD, x_TD[0], EPS, x_TD, None), (x_TD, x_TD[0], EPS, x_TD, x_TD)],
        "add_norm": [(x_TD, x_TD * 2, x_TD[0], EPS)],
        "norm_rope": [(*heads.all, None, None, None, None), (*heads.all, *cache, *slots)],
        "paged_decode": [paged],
        "paged_prefill": [(*paged, torch.arange(4).int(), 1)],
        "block_stats": [(logits_NV, 0.5)],
        "block_totals": [(sums_NB, maxima_NB)],
        "invert_blocks": [(logits_NV, sums_NB, maxima_NB, maxima_NB[:, 0], x_N.double(), 0.5)],
        "uniforms": [(row_N, row_N)],
        "truncation_threshold": [(logits_NV, 7, 0.5)],
        "logit_stats": [(logits_NV, row_N, mean) for mean in (False, True)],
        "kl_stats": [(logits_NV, logits_NV * 2, row_N)],
        "softmax_grad": [(logits_NV, x_N, x_N, row_N, dtype)],
        "kl_grad": [(logits_NV, logits_NV * 2, x_N, x_N, dtype)],
    }


@pytest.fixture(scope="module")
def on_cpu() -> torch.library.Library:
    """The operators with their launchers on a CPU, where the package has none."""
    library = torch.library.Library("opd_titan", "IMPL")
    names = [*samples(torch.float32), "norm_rope_backward"]
    for name, module in product(names, (attention, head_logits, layers, logits)):
        if hasattr(module, name):
            library.impl(name, getattr(module, name), "CPU")
    return library


@pytest.mark.parametrize("name", samples(torch.float32))
def test_operators_do_what_their_schemas_say(name: str, on_cpu: torch.library.Library) -> None:
    """Compare what they write to and their shapes without data, by torch's own check."""
    for args in samples(torch.float16)[name]:
        operator = getattr(torch.ops.opd_titan, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
