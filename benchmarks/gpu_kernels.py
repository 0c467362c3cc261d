"""The Triton kernels beside their plain twins: errors, time, bandwidth.

A kernel's error is that of its result against the twin on the same operands in a wider type; it is
compared with the error of the twin in the kernel's own type. Without a GPU the kernels run in
Triton's interpreter, which needs TRITON_INTERPRET=1 (`gpu.py --miniature` sets it).

Shapes: T tokens, N sequences or rows, C rows of a chunk of logits, D model width, F MLP width, H
query heads, G key/value heads, K head size, P pages, S tokens of a page, M pages of the longest
sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from gpu_setting import Setting, relative_error
from harness import Record
from torch import Tensor

from opd_titan.models.kernels import attention as paged
from opd_titan.models.kernels import head_logits, head_plain, layers, logits, plain
from opd_titan.models.logits import truncate_
from opd_titan.models.qwen3.model import rope_tables

EPS = 1e-6
PAGE_SIZE = 64


class Sizes(NamedTuple):
    """Of the model that the operands are made for: the 8B, and a tiny one."""

    tokens: tuple[int, ...]
    width: int
    mlp: int
    heads: int
    groups: int
    head_size: int
    vocab: int
    rows: int  # of a decoding step
    chunk: int  # rows of logits


LARGE = Sizes((256, 8192), 4096, 12288, 32, 8, 128, 151936, 256, 880)
SMALL = Sizes((5,), 96, 160, 4, 2, 32, 1000, 5, 5)


class Case(NamedTuple):
    """One call of a kernel.

    Attributes:
        operands: tensors that `twin` gets in a wider type too.
        run: calls the kernel.
        twin: the same in plain PyTorch.
        num_bytes: that it reads and writes at least; 0 where bytes are not what limits it.
        timed: what is timed, where `run` does more than to call the kernel.
    """

    name: str
    shape: str
    operands: tuple[Tensor, ...]
    run: Callable[..., Any]
    twin: Callable[..., Any]
    num_bytes: int = 0
    timed: Callable[..., Any] | None = None


def measure_operators(s: Setting, group: str) -> None:
    """Measure the kernels of a group, in bf16 and fp16 or, over logits, in fp32.

    One that fails does not keep the others from running.
    """
    dtypes = [torch.bfloat16, torch.float16] if s.on_cuda else [torch.float16]  # as interpreted
    for dtype in dtypes if group != "logits" else [torch.float32]:
        for case in CASES[group](s, dtype):
            how = {"figure": "operator", "operator": case.name, "dtype": str(dtype)[6:]}
            try:
                s.emit({**how, "shape": case.shape, **_measure(s, case)})
            except Exception as error:
                s.emit({**how, "error": f"{type(error).__name__}: {str(error)[:500]}"})


def _measure(s: Setting, case: Case) -> Record:
    wider = torch.float64 if case.operands[0].dtype == torch.float32 else torch.float32
    exact = _tensors(case.twin(*(x.to(wider) for x in case.operands)))
    # Some twins overwrite their operands.
    twin = _tensors(case.twin(*(x.clone() for x in case.operands)))
    found = _tensors(case.run(*case.operands))
    errors = [relative_error(a, c) for a, c in zip(found, exact, strict=True)]
    twins = [relative_error(b, c) for b, c in zip(twin, exact, strict=True)]
    # The same roundings in another order; a wrong kernel is off by orders of magnitude.
    good = all(a <= 3.0 * b + 1e-4 for a, b in zip(errors, twins, strict=True))
    figures: Record = {"relative_error": max(errors), "twin_error": max(twins), "ok": good}
    if s.on_cuda:
        work = case.timed or case.run
        seconds = s.device_seconds(lambda: work(*case.operands))
        figures["ms"] = 1e3 * seconds
        if case.num_bytes:
            figures["gb_per_s"] = case.num_bytes / seconds / 1e9
    return figures


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def sizes_of(s: Setting) -> Sizes:
    return SMALL if s.miniature else LARGE


# ------------------------------------------------------- between a layer's products


def _layer_cases(s: Setting, dtype: torch.dtype) -> Iterator[Case]:
    size, most = sizes_of(s), max(sizes_of(s).tokens)
    D, H, G, K = size.width, size.heads, size.groups, size.head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=s.device).to(dtype)

    for T in size.tokens:
        gate_TF, up_TF = normal(T, 2 * size.mlp).chunk(2, dim=1)
        shape, num_bytes = f"{T} x {size.mlp}", 3 * gate_TF.nbytes
        pair = (gate_TF, up_TF)
        yield Case("silu_mul", shape, pair, layers.silu_mul, plain.silu_mul, num_bytes)
        x_TD, y_TD, weight_D = normal(T, D), normal(T, D), normal(D)
        yield Case(
            "add_norm",
            f"{T} x {D}",
            (x_TD, y_TD, weight_D),
            lambda *xs: layers.add_norm(*xs, EPS),
            lambda *xs: plain.add_norm(*xs, EPS),
            4 * x_TD.nbytes,
        )
        yield _norm_rope(s, T, normal)
    operands = normal(most, size.mlp), normal(most, size.mlp), normal(most, size.mlp)
    yield Case(
        "silu_mul_backward",
        f"{most} x {size.mlp}",
        operands,
        layers.silu_mul_backward,
        lambda gate, up, g: _gradients(plain.silu_mul, (gate, up), (g,)),
        5 * operands[0].nbytes,
    )
    for width in (D // 2, D):
        x_TD, g_TD, g_total_TD = (normal(most, width) for _ in range(3))
        yield Case(
            "norm_backward",
            f"{most} x {width}",
            (x_TD, normal(width), g_TD, g_total_TD),
            lambda x, weight, g, g_total: layers.norm_backward(x, weight, EPS, g, g_total),
            _norm_gradients,
            4 * x_TD.nbytes,
        )
    rope = rope_tables(torch.arange(most, device=s.device), K, 1e6)
    heads = [normal(most, n, K) for n in (H, G)]
    upstream = [normal(most, n, K) for n in (H, G)]
    yield Case(
        "norm_rope_backward",
        f"{most} x {H} + {G} heads of {K}",
        (*heads, normal(K), normal(K), *upstream),
        lambda *xs: layers.norm_rope_backward(*xs[:4], EPS, *rope, *xs[4:]),
        lambda *xs: _gradients(lambda *ys: plain.norm_rope(*ys, EPS, *rope), xs[:4], xs[4:]),
        3 * sum(x.nbytes for x in heads),
    )


def _gradients(
    twin: Callable[..., Any], operands: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of `twin` with respect to its operands, computed by autograd."""
    leaves = [x.detach().requires_grad_() for x in operands]
    return torch.autograd.grad(_tensors(twin(*leaves)), leaves, upstream)


def _norm_gradients(
    x_TD: Tensor, weight_D: Tensor, g_TD: Tensor, g_total_TD: Tensor
) -> tuple[Tensor, ...]:
    """The backward of `add_norm`, which saves x + y and adds the gradient of that sum."""

    def twin(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), plain.norm(x, weight, EPS)

    return _gradients(twin, (x_TD, weight_D), (g_total_TD, g_TD))


def _norm_rope(s: Setting, T: int, normal: Callable[..., Tensor]) -> Case:
    """Norm and rotation of queries and keys, with keys and values written to the cache."""
    size = sizes_of(s)
    H, G, K = size.heads, size.groups, size.head_size
    joined = normal(T, (H + 2 * G) * K).unflatten(1, (-1, K))
    rope = rope_tables(torch.arange(T, device=s.device), K, 1e6)
    pages = -(-T // PAGE_SIZE)
    caches = [joined.new_zeros(pages, PAGE_SIZE, G, K) for _ in "kv"]
    place_T = torch.randperm(pages * PAGE_SIZE, device=s.device)[:T]

    def timed(*xs: Tensor) -> tuple[Tensor, Tensor]:
        return layers.norm_rope(*xs, EPS, *rope, *caches, place_T // PAGE_SIZE, place_T % PAGE_SIZE)

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        q, k = timed(*xs)
        written = (x.flatten(0, 1)[place_T] for x in caches)
        return q, k, *written, torch.stack([x.ne(0).sum() for x in caches])

    def twin(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k = plain.norm_rope(q, k, *weights, EPS, *rope)
        # The caches hold nothing but these.
        written = torch.stack([x.to(joined.dtype).ne(0).sum() for x in (k, v)])
        return q, k, k, v, written

    operands = (*joined.split([H, G, G], dim=1), normal(K), normal(K))
    shape = f"{T} x {H} + 2 x {G} heads of {K}"
    # Keys are written twice, values once.
    return Case("norm_rope", shape, operands, run, twin, 2 * joined.nbytes, timed)


# ------------------------------------------------------------- paged attention


class Pages(NamedTuple):
    """Queries, and the pages that they attend to, scattered over a cache."""

    q_THK: Tensor
    keys_PSGK: Tensor
    values_PSGK: Tensor
    table_NM: Tensor
    used_N: Tensor

    @property
    def num_bytes(self) -> int:
        token = self.keys_PSGK[0, 0].nbytes
        return 2 * self.q_THK.nbytes + 2 * token * int(self.used_N.sum())

    def first(self, n: int) -> Pages:
        """Return the first n sequences, of one query each."""
        return self._replace(
            q_THK=self.q_THK[:n], table_NM=self.table_NM[:n], used_N=self.used_N[:n]
        )


def _pages(s: Setting, used: Sequence[int], queries: int, heads: int, dtype: Any) -> Pages:
    size = sizes_of(s)
    width = -(-max(used) // PAGE_SIZE)
    count = len(used) * width
    shapes = (queries, heads), (count, PAGE_SIZE, size.groups), (count, PAGE_SIZE, size.groups)
    tensors = (torch.randn(*n, size.head_size, device=s.device).to(dtype) for n in shapes)
    table = torch.randperm(count, device=s.device).view(len(used), width).int()
    return Pages(*tensors, table, torch.tensor(used, dtype=torch.int32, device=s.device))


def _decoding(s: Setting, dtype: torch.dtype) -> dict[str, Pages]:
    """Return, by name, sequences of about as many tokens with one query each."""
    cases = [(1, 16, 1000), (64, 16, 1000), (256, 16, 1000), (64, 32, 1000), (16, 32, 8000)]
    found = {}
    for n, heads, context in [(3, 4, 70), (2, 4, 600)] if s.miniature else cases:
        used = [max(1, context - 64 + 37 * i % 128) for i in range(n)]
        found[f"{n} x {heads} heads, {context} tokens"] = _pages(s, used, n, heads, dtype)
    return found


def _twin(pages: Pages, starts: Sequence[int]) -> Callable[..., Tensor]:
    starts_N1 = torch.tensor(starts, dtype=torch.int32, device=pages.q_THK.device)
    longest = max(b - a for a, b in pairwise(starts))
    table = plain.PageTable(pages.table_NM, pages.used_N, starts_N1, longest)
    return lambda q, keys, values: plain.paged_attention(q, keys, values, table)


def _attention_cases(s: Setting, dtype: torch.dtype) -> Iterator[Case]:
    for name, pages in _decoding(s, dtype).items():
        few = pages.first(4)  # the twin goes through sequences one by one
        n = few.used_N.numel()
        yield Case(
            "paged_decode",
            name,
            few[:3],
            lambda *_, pages=pages, n=n: paged.paged_decode(*pages)[:n],
            _twin(few, range(n + 1)),
            pages.num_bytes,
        )
    # The last queries of sequences that begin in the cache, and whole ones.
    lengths = ((70, 9), (65, 65)) if s.miniature else ((4096, 1024), (1000, 1000), (8192, 17))
    starts = [*accumulate((queries for _, queries in lengths), initial=0)]
    pages = _pages(s, [used for used, _ in lengths], starts[-1], sizes_of(s).heads, dtype)
    starts_N1 = torch.tensor(starts, dtype=torch.int32, device=s.device)
    longest = max(queries for _, queries in lengths)
    yield Case(
        "paged_prefill",
        f"used and queries {lengths}",
        pages[:3],
        lambda *_: paged.paged_prefill(*pages, starts_N1, longest),
        _twin(pages, starts),
    )


def check_independence(s: Setting) -> None:
    """A sequence's attention has the same bits alone, among others, and with a wider table."""
    for name, pages in _decoding(s, torch.bfloat16 if s.on_cuda else torch.float16).items():
        together = paged.paged_decode(*pages)
        wider = torch.nn.functional.pad(pages.table_NM, (0, 33))
        figures = {
            "alone": torch.equal(together[:1], paged.paged_decode(*pages.first(1))),
            "wider_table": torch.equal(
                together, paged.paged_decode(*pages._replace(table_NM=wider))
            ),
            "twice": torch.equal(together, paged.paged_decode(*pages)),
        }
        s.emit({"figure": "independence", "shape": name, **figures, "ok": all(figures.values())})


def measure_splits(s: Setting) -> None:
    """Measure decode attention by the length of a split."""
    own = paged._SPLIT
    for name, pages in _decoding(s, torch.bfloat16 if s.on_cuda else torch.float16).items():
        found = {}
        for split in (128, 256, 512):
            paged._SPLIT = split
            seconds = s.device_seconds(lambda pages=pages: paged.paged_decode(*pages))
            found[f"ms_{split}"] = 1e3 * seconds
        paged._SPLIT = own
        s.emit({"figure": "split lengths", "shape": name, "own": own, **found})


# ------------------------------------------------------------- over logits, in fp32


def _logit_cases(s: Setting, dtype: torch.dtype) -> Iterator[Case]:
    size, half = sizes_of(s), torch.bfloat16 if s.on_cuda else torch.float16
    C, V = size.chunk, size.vocab
    logits_NV = _logits(s, size.rows)

    def finite(stats: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sums_NB, maxima_NB = stats  # 0 and -inf for blocks of nothing but -inf
        return sums_NB, maxima_NB.clamp(min=-1e3)

    yield Case(
        "block_stats",
        f"{size.rows} x {V}",
        (logits_NV,),
        lambda x: finite(logits.block_stats(x, 0.7)),
        lambda x: finite(plain.block_stats(x, 0.7)),
        logits_NV.nbytes,
        lambda x: logits.block_stats(x, 0.7),
    )
    student_CV, teacher_CV = _logits(s, C), 4.0 * torch.randn(C, V, device=s.device)
    row_C, g_C = V - 1 - torch.arange(C, device=s.device), torch.randn(C, device=s.device)
    lse_C, kl_6C = student_CV.logsumexp(dim=1), head_plain.kl_stats(student_CV, teacher_CV, row_C)
    shape, num_bytes = f"{C} x {V}", student_CV.nbytes

    def to(x: Tensor) -> torch.dtype:
        """Gradients are in half precision, and the exact ones in fp64."""
        return torch.float64 if x.dtype == torch.float64 else half

    yield Case(
        "logit_stats",
        shape,
        (student_CV,),
        lambda x: head_logits.logit_stats(x, row_C, True).unbind(),
        lambda x: head_plain.logit_stats(x, row_C, True).unbind(),
        num_bytes,
    )
    yield Case(
        "softmax_grad",
        shape,
        (student_CV, lse_C, g_C),
        lambda x, lse, g: head_logits.softmax_grad(x, lse, g, row_C, half),
        lambda x, lse, g: head_plain.softmax_grad(x, lse, g, row_C, to(x)),
        num_bytes * 3 // 2,
    )
    yield Case(
        "kl_stats",
        shape,
        (student_CV, teacher_CV),
        lambda *xs: head_logits.kl_stats(*xs, row_C).unbind(),
        lambda *xs: head_plain.kl_stats(*xs, row_C).unbind(),
        2 * num_bytes,
    )
    yield Case(
        "kl_grad",
        shape,
        (student_CV, teacher_CV, kl_6C[1].contiguous(), kl_6C[5].contiguous()),
        lambda *xs: head_logits.kl_grad(*xs, half),
        lambda *xs: head_plain.kl_grad(*xs, to(xs[0])),
        num_bytes * 5 // 2,
    )


def _logits(s: Setting, rows: int) -> Tensor:
    logits_NV = 4.0 * torch.randn(rows, sizes_of(s).vocab, device=s.device)
    logits_NV[1, : logits_NV.shape[1] // 2] = -torch.inf
    return logits_NV


@torch.no_grad()  # as where the kernels are taken
def check_truncation(s: Setting) -> None:
    """Compare the tokens that top-k and top-p keep on the device with fp64 on a CPU."""
    logits_NV = _logits(s, sizes_of(s).rows)
    ties_NV = logits_NV.mul(8).round().div(8)  # ties fall to the lower token id
    for top_k, top_p in ((50, 1.0), (0, 0.9), (50, 0.9)):
        # fp64, because fp32 sums over 152k probabilities can drop a tied token at the threshold.
        wanted_NV = truncate_(ties_NV[:32].cpu().double(), top_k, top_p).float()
        found_NV = truncate_(ties_NV.clone(), top_k, top_p)[:32].cpu()
        same = (found_NV == wanted_NV).all(dim=1).double().mean().item()
        seconds = s.seconds(lambda k=top_k, p=top_p: truncate_(ties_NV.clone(), k, p))
        figures = {"top_k": top_k, "top_p": top_p, "rows_equal": same}
        figures["ms"] = 1e3 * seconds["median_s"]
        s.emit({"figure": "truncation", **figures, "ok": same >= 0.95})


def check_draw(s: Setting) -> None:
    """Compare tokens drawn by the kernels with those of the plain twin."""
    logits_NV = _logits(s, sizes_of(s).rows)
    u_N = torch.rand(logits_NV.shape[0], dtype=torch.float64, device=s.device)
    blocks = plain.block_stats(logits_NV, 0.7)

    def draw(module: Any) -> tuple[Tensor, Tensor]:
        highest_N, total_N = module.block_totals(*blocks)
        target_N = u_N * total_N
        tokens_N, logs_N = module.invert_blocks(logits_NV, *blocks, highest_N, target_N, 0.7)
        return tokens_N, logs_N - total_N.log()

    tokens_N, logs_N = draw(logits)
    wanted_N, _ = draw(plain)
    exact_NV = (logits_NV.double() / 0.7).log_softmax(1)
    error_N = (logs_N - exact_NV.gather(1, tokens_N[:, None]).squeeze(1)).abs()
    same, error = (tokens_N == wanted_N).double().mean().item(), error_N.max().item()
    figures = {"tokens_equal": same, "logprob_error_max": error}
    figures["ms"] = 1e3 * s.device_seconds(lambda: draw(logits))
    # A target near a boundary may give the next token, because sums are ordered differently.
    s.emit({"figure": "draw", **figures, "ok": same >= 0.98 and error < 1e-4})


CASES: dict[str, Callable[[Setting, torch.dtype], Iterator[Case]]] = {
    "layers": _layer_cases,
    "attention": _attention_cases,
    "logits": _logit_cases,
}
