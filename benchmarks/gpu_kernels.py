"""The Triton kernels beside their plain twins: errors, time, bandwidth.

A kernel's error is that of its result against the twin on the same operands in a wider type; it is
compared with the error of the twin in the kernel's own type. Without a GPU the kernels run in
Triton's interpreter, which needs TRITON_INTERPRET=1 (`gpu.py --miniature` sets it).

Shapes: T tokens, N sequences or rows, C rows of a chunk of logits, D model width, F MLP width, H
query heads, G key/value heads, K head size, P pages, S tokens of a page, M pages of the longest
sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from harness import Record
from setting import Setting, relative_error
from torch import Tensor

from opd_titan.models.kernels import attention as paged
from opd_titan.models.kernels import head_logits, head_plain, layers, logits, plain
from opd_titan.models.qwen3.model import rope_tables

EPS = 1e-6
PAGE_SIZE = 64


class Sizes(NamedTuple):
    """Sizes of the operands: those of the 8B, and tiny ones."""

    tokens: tuple[int, ...] = (256, 8192)
    width: int = 4096
    mlp: int = 12288
    heads: int = 32
    groups: int = 8
    head_size: int = 128
    vocab: int = 151936
    rows: int = 256  # of a decoding step
    chunk: int = 880  # rows of logits


SMALL = Sizes((5,), 96, 160, 4, 2, 32, 1000, 5, 5)


class Bench:
    """Measures kernels with operands of one type.

    Args:
        dtype: of what `normal` returns.
    """

    def __init__(self, s: Setting, dtype: torch.dtype) -> None:
        self.s, self.dtype, self.sizes = s, dtype, SMALL if s.miniature else Sizes()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.s.device).to(self.dtype)

    def compare(
        self,
        name: str,
        shape: str,
        operands: Sequence[Tensor],
        kernel: Callable[..., Any],
        twin: Callable[..., Any],
        num_bytes: int = 0,
        timed: Callable[..., Any] | None = None,
    ) -> None:
        """Emit the kernel's error and time. If it fails, the others are still measured.

        Args:
            operands: tensors that `twin` gets in a wider type too.
            num_bytes: that the kernel reads and writes at least; 0 where bytes do not limit it.
            timed: what is timed, where `kernel` does more than to call the kernel.
        """
        about = {"figure": "operator", "operator": name, "dtype": str(self.dtype)[6:]}
        try:
            found = self._errors(operands, kernel, twin)
            if self.s.on_cuda:
                work = timed or kernel
                seconds = self.s.device_seconds(lambda: work(*operands))
                found["ms"] = 1e3 * seconds
                found |= {"gb_per_s": num_bytes / seconds / 1e9} if num_bytes else {}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        self.s.emit({**about, "shape": shape, **found})

    def _errors(
        self, operands: Sequence[Tensor], kernel: Callable[..., Any], twin: Callable[..., Any]
    ) -> Record:
        wider = torch.float64 if operands[0].dtype == torch.float32 else torch.float32
        exact = _tensors(twin(*(x.to(wider) for x in operands)))
        rounded = _tensors(twin(*(x.clone() for x in operands)))  # some overwrite their operands
        found = _tensors(kernel(*operands))
        errors, twins = (
            [relative_error(a, c) for a, c in zip(results, exact, strict=True)]
            for results in (found, rounded)
        )
        # The same roundings in another order; a wrong kernel is off by orders of magnitude.
        ok = all(a <= 3.0 * b + 1e-4 for a, b in zip(errors, twins, strict=True))
        return {"relative_error": max(errors), "twin_error": max(twins), "ok": ok}


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _gradients(
    twin: Callable[..., Any], operands: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of `twin` with respect to its operands, computed by autograd."""
    leaves = [x.detach().requires_grad_() for x in operands]
    return torch.autograd.grad(_tensors(twin(*leaves)), leaves, upstream)


def _half(s: Setting) -> torch.dtype:
    return torch.bfloat16 if s.on_cuda else torch.float16  # the interpreter has no bf16


def measure_layers(s: Setting) -> None:
    """Measure the kernels between a layer's products, forward and backward, in bf16 and fp16."""
    for dtype in (torch.bfloat16, torch.float16) if s.on_cuda else (torch.float16,):
        bench = Bench(s, dtype)
        for tokens in bench.sizes.tokens:
            _measure_forward(bench, tokens)
        _measure_backward(bench, max(bench.sizes.tokens))


def _measure_forward(bench: Bench, T: int) -> None:
    size, normal = bench.sizes, bench.normal
    D, H, G, K = size.width, size.heads, size.groups, size.head_size
    gate_TF, up_TF = normal(T, 2 * size.mlp).chunk(2, dim=1)
    shape, pair = f"{T} x {size.mlp}", (gate_TF, up_TF)
    bench.compare("silu_mul", shape, pair, layers.silu_mul, plain.silu_mul, 3 * gate_TF.nbytes)
    x_TD, y_TD, weight_D = normal(T, D), normal(T, D), normal(D)
    bench.compare(
        "add_norm",
        f"{T} x {D}",
        (x_TD, y_TD, weight_D),
        lambda *xs: layers.add_norm(*xs, EPS),
        lambda *xs: plain.add_norm(*xs, EPS),
        4 * x_TD.nbytes,
    )
    # Norm and rotation of queries and keys, with keys and values written to the cache.
    joined = normal(T, (H + 2 * G) * K).unflatten(1, (-1, K))
    rope = rope_tables(torch.arange(T, device=bench.s.device), K, 1e6)
    pages = -(-T // PAGE_SIZE)
    caches = [joined.new_zeros(pages, PAGE_SIZE, G, K) for _ in "kv"]
    place_T = torch.randperm(pages * PAGE_SIZE, device=bench.s.device)[:T]
    slots = (*caches, place_T // PAGE_SIZE, place_T % PAGE_SIZE)

    def kernel(*xs: Tensor) -> tuple[Tensor, ...]:
        written = layers.norm_rope(*xs, EPS, *rope, *slots)
        return *written, *(x.flatten(0, 1)[place_T] for x in caches)

    def twin(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k = plain.norm_rope(q, k, *weights, EPS, *rope)
        return q, k, k, v

    bench.compare(
        "norm_rope",
        f"{T} x {H} + 2 x {G} heads of {K}",
        (*joined.split([H, G, G], dim=1), normal(K), normal(K)),
        kernel,
        twin,
        2 * joined.nbytes,  # keys are written twice, values once
        lambda *xs: layers.norm_rope(*xs, EPS, *rope, *slots),
    )


def _measure_backward(bench: Bench, T: int) -> None:
    size, normal = bench.sizes, bench.normal
    D, H, G, K = size.width, size.heads, size.groups, size.head_size
    operands = normal(T, size.mlp), normal(T, size.mlp), normal(T, size.mlp)
    bench.compare(
        "silu_mul_backward",
        f"{T} x {size.mlp}",
        operands,
        layers.silu_mul_backward,
        lambda gate, up, g: _gradients(plain.silu_mul, (gate, up), (g,)),
        5 * operands[0].nbytes,
    )

    def norm_gradients(x: Tensor, weight: Tensor, g: Tensor, g_total: Tensor) -> tuple[Tensor, ...]:
        """The backward of `add_norm`, which saves x + y and adds the gradient of that sum."""

        def twin(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), plain.norm(x, weight, EPS)

        return _gradients(twin, (x, weight), (g_total, g))

    for width in (D // 2, D):
        x_TD, g_TD, g_total_TD = (normal(T, width) for _ in range(3))
        bench.compare(
            "norm_backward",
            f"{T} x {width}",
            (x_TD, normal(width), g_TD, g_total_TD),
            lambda x, weight, g, g_total: layers.norm_backward(x, weight, EPS, g, g_total),
            norm_gradients,
            4 * x_TD.nbytes,
        )
    rope = rope_tables(torch.arange(T, device=bench.s.device), K, 1e6)
    heads, upstream = ([normal(T, n, K) for n in (H, G)] for _ in range(2))
    bench.compare(
        "norm_rope_backward",
        f"{T} x {H} + {G} heads of {K}",
        (*heads, normal(K), normal(K), *upstream),
        lambda *xs: layers.norm_rope_backward(*xs[:4], EPS, *rope, *xs[4:]),
        lambda *xs: _gradients(lambda *ys: plain.norm_rope(*ys, EPS, *rope), xs[:4], xs[4:]),
        3 * sum(x.nbytes for x in heads),
    )


# ------------------------------------------------------------- paged attention


class Pages(NamedTuple):
    """Queries, and the pages that they attend to, scattered over a cache."""

    q_THK: Tensor
    keys_PSGK: Tensor
    values_PSGK: Tensor
    table_NM: Tensor
    used_N: Tensor

    @classmethod
    def random(cls, bench: Bench, used: Sequence[int], queries: int) -> Pages:
        """Return pages of sequences with these numbers of tokens."""
        size, device = bench.sizes, bench.s.device
        width = -(-max(used) // PAGE_SIZE)
        count = len(used) * width
        q_THK = bench.normal(queries, size.heads, size.head_size)
        cache = (bench.normal(count, PAGE_SIZE, size.groups, size.head_size) for _ in "kv")
        table = torch.randperm(count, device=device).view(len(used), width).int()
        return cls(q_THK, *cache, table, torch.tensor(used, dtype=torch.int32, device=device))

    def first(self, n: int) -> Pages:
        """Return the first n sequences, of one query each."""
        short = {"q_THK": self.q_THK[:n], "table_NM": self.table_NM[:n], "used_N": self.used_N[:n]}
        return self._replace(**short)

    def twin(self, starts: Sequence[int]) -> Callable[..., Tensor]:
        starts_N1 = torch.tensor(starts, dtype=torch.int32, device=self.q_THK.device)
        longest = max(b - a for a, b in pairwise(starts))
        table = plain.PageTable(self.table_NM, self.used_N, starts_N1, longest)
        return lambda q, keys, values: plain.paged_attention(q, keys, values, table)


def measure_attention(s: Setting) -> None:
    """Measure paged attention in decoding and in prefills, in bf16 and fp16."""
    for dtype in (torch.bfloat16, torch.float16) if s.on_cuda else (torch.float16,):
        bench = Bench(s, dtype)
        cases = [(1, 1000), (64, 1000), (256, 1000), (16, 8000)]
        for n, context in [(3, 70), (2, 600)] if s.miniature else cases:
            used = [max(1, context - 64 + 37 * i % 128) for i in range(n)]
            pages, shape = Pages.random(bench, used, n), f"{n} x {context} tokens"
            few = pages.first(4)  # the twin goes through sequences one by one
            token = pages.keys_PSGK[0, 0].nbytes
            bench.compare(
                "paged_decode",
                shape,
                few[:3],
                lambda *_, pages=pages: paged.paged_decode(*pages)[:4],
                few.twin(range(few.used_N.numel() + 1)),
                2 * pages.q_THK.nbytes + 2 * token * sum(used),
            )
            _check_independence(s, pages, shape)
        _measure_prefill(bench)


def _measure_prefill(bench: Bench) -> None:
    """Measure the last queries of sequences that begin in the cache, and whole sequences."""
    small = bench.s.miniature
    lengths = ((70, 9), (65, 65)) if small else ((4096, 1024), (1000, 1000), (8192, 17))
    starts = [*accumulate((queries for _, queries in lengths), initial=0)]
    pages = Pages.random(bench, [used for used, _ in lengths], starts[-1])
    starts_N1 = torch.tensor(starts, dtype=torch.int32, device=bench.s.device)
    longest = max(queries for _, queries in lengths)
    bench.compare(
        "paged_prefill",
        f"used and queries {lengths}",
        pages[:3],
        lambda *_: paged.paged_prefill(*pages, starts_N1, longest),
        pages.twin(starts),
    )


def _check_independence(s: Setting, pages: Pages, shape: str) -> None:
    """Check that a sequence's result has the same bits alone, among others, in a wider table."""
    together = paged.paged_decode(*pages)
    wider = pages._replace(table_NM=torch.nn.functional.pad(pages.table_NM, (0, 33)))
    figures = {
        "alone": torch.equal(together[:1], paged.paged_decode(*pages.first(1))),
        "wider_table": torch.equal(together, paged.paged_decode(*wider)),
        "twice": torch.equal(together, paged.paged_decode(*pages)),
    }
    s.emit({"figure": "independence", "shape": shape, **figures, "ok": all(figures.values())})


# ------------------------------------------------------------- over logits, in fp32


def measure_logits(s: Setting) -> None:
    """Measure the passes of the sampler and of the loss over logits."""
    bench, half = Bench(s, torch.float32), _half(s)
    size, normal = bench.sizes, bench.normal
    C, V = size.chunk, size.vocab
    logits_NV = 4.0 * normal(size.rows, V)
    logits_NV[1, : V // 2] = -torch.inf

    def finite(stats: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sums_NB, maxima_NB = stats  # 0 and -inf for blocks of nothing but -inf
        return sums_NB, maxima_NB.clamp(min=-1e3)

    bench.compare(
        "block_stats",
        f"{size.rows} x {V}",
        (logits_NV,),
        lambda x: finite(logits.block_stats(x, 0.7)),
        lambda x: finite(plain.block_stats(x, 0.7)),
        logits_NV.nbytes,
        lambda x: logits.block_stats(x, 0.7),
    )
    student_CV, teacher_CV = 4.0 * normal(C, V), 4.0 * normal(C, V)
    row_C, g_C = V - 1 - torch.arange(C, device=s.device), normal(C)
    lse_C, kl_6C = student_CV.logsumexp(dim=1), head_plain.kl_stats(student_CV, teacher_CV, row_C)
    kl_rows = kl_6C[1].contiguous(), kl_6C[5].contiguous()
    num_bytes, both = student_CV.nbytes, (student_CV, teacher_CV)

    def to(x: Tensor) -> torch.dtype:
        """Gradients are in half precision, and the exact ones in fp64."""
        return torch.float64 if x.dtype == torch.float64 else half

    # By name: operands, the kernel's and the twin's function of them, bytes.
    cases: dict[str, tuple[tuple[Tensor, ...], Callable[[Any], Callable[..., Any]], int]] = {
        "logit_stats": (
            (student_CV,),
            lambda module: lambda x: module.logit_stats(x, row_C, True).unbind(),
            num_bytes,
        ),
        "softmax_grad": (
            (student_CV, lse_C, g_C),
            lambda module: lambda x, lse, g: module.softmax_grad(x, lse, g, row_C, to(x)),
            num_bytes * 3 // 2,
        ),
        "kl_stats": (
            both,
            lambda module: lambda *xs: module.kl_stats(*xs, row_C).unbind(),
            2 * num_bytes,
        ),
        "kl_grad": (
            (*both, *kl_rows),
            lambda module: lambda *xs: module.kl_grad(*xs, to(xs[0])),
            num_bytes * 5 // 2,
        ),
    }
    for name, (operands, of, moved) in cases.items():
        bench.compare(name, f"{C} x {V}", operands, of(head_logits), of(head_plain), moved)
