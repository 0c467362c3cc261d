"""Our operators beside their plain twins, and the ceilings of the card that all else is held to.

An operator's error is that of its half-precision result against the twin on the same numbers in
fp32, and stands beside the error of the twin itself in half precision. Without a GPU the kernels
run in Triton's interpreter.

Shapes: T tokens, N sequences or rows, D model width, F MLP width, H query heads, G key/value
heads, K head size, P pages, S tokens of a page, M pages of the longest sequence, V vocabulary.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from gpu_setting import GIB, Setting, relative_error
from torch import Tensor

from opd_titan.models.kernels import plain
from opd_titan.models.qwen3.model import rope_tables

HALF = (torch.bfloat16, torch.float16)
PAGE_SIZE = 64
PACKAGE = "opd_titan.models.kernels"


class Sizes(NamedTuple):
    """Of the model whose operands are made: those of the 8B, and tiny ones."""

    tokens: tuple[int, ...]
    width: int
    mlp: int
    heads: int
    groups: int
    head_size: int
    vocab: int


LARGE = Sizes((256, 8192), 4096, 12288, 32, 8, 128, 151936)
SMALL = Sizes((5,), 96, 160, 4, 2, 32, 1000)


class Check(NamedTuple):
    """One call of an operator.

    Attributes:
        run: the operator.
        twin: the same in plain PyTorch.
        exact: the same on the operands in fp32.
        num_bytes: that it reads and writes at least; 0 where bytes are not what it waits for.
        timed: what is timed, where `run` does more than to call the operator.
    """

    shape: str
    run: Callable[[], Any]
    twin: Callable[[], Any]
    exact: Callable[[], Any]
    num_bytes: int = 0
    timed: Callable[[], Any] | None = None


Make = Callable[[Setting, torch.dtype], list[Check]]


def measure_ceilings(s: Setting) -> None:
    """What a plain copy, a plain read and a plain product reach."""
    num_bytes = GIB if s.on_cuda else GIB // 64
    x = torch.ones(num_bytes // 4, device=s.device)
    y = torch.empty_like(x)
    n = 8192 if s.on_cuda else 256
    a, b = (torch.randn(n, n, device=s.device, dtype=torch.bfloat16) for _ in range(2))
    figures = {
        "copy_gb_per_s": 2 * num_bytes / s.device_seconds(lambda: y.copy_(x)) / 1e9,
        "read_gb_per_s": num_bytes / s.device_seconds(x.sum) / 1e9,
        **s.rates(s.device_seconds(lambda: a @ b), 2.0 * n**3),
    }
    s.emit({"figure": "ceilings", **figures})


# ------------------------------------------------------------------- operators


def launcher(s: Setting, module: str, name: str) -> Callable[..., Any]:
    """The operator where there is a GPU, else what launches its kernel, interpreted."""
    if not s.on_cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    loaded = importlib.import_module(f"{PACKAGE}.{module}")
    return getattr(torch.ops.opd_titan if s.on_cuda else loaded, name)


def measure_operators(s: Setting, makes: dict[str, Make], half: bool = True) -> None:
    """Each operator in each type; one that fails hides none.

    Args:
        half: in half precision, where bf16 products are wrong in the interpreter; else in fp32.
    """
    dtypes = (torch.float32,) if not half else HALF if s.on_cuda else HALF[1:]
    for name, make in makes.items():
        for dtype in dtypes:
            how = {"figure": "operator", "operator": name, "dtype": str(dtype)[6:]}
            try:
                for check in make(s, dtype):
                    s.emit({**how, **_measure(s, check)})
            except Exception as error:
                why = f"{type(error).__name__}: {str(error)[:500]}"
                s.emit({**how, "error": why, "ok": False})


def _measure(s: Setting, check: Check) -> dict[str, Any]:
    found, twin, exact = (_tensors(f()) for f in (check.run, check.twin, check.exact))
    errors = [relative_error(a, c) for a, c in zip(found, exact, strict=True)]
    twins = [relative_error(b, c) for b, c in zip(twin, exact, strict=True)]
    figures: dict[str, Any] = {
        "shape": check.shape,
        "relative_error": max(errors),
        "twin_error": max(twins),
        # The same roundings in another order; a wrong kernel is off by orders of magnitude.
        "ok": all(a <= 3.0 * b + 1e-4 for a, b in zip(errors, twins, strict=True)),
    }
    if s.on_cuda:
        seconds = s.device_seconds(check.timed or check.run)
        figures["ms"] = 1e3 * seconds
        if check.num_bytes:
            figures["gb_per_s"] = check.num_bytes / seconds / 1e9
    return figures


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def sizes_of(s: Setting) -> Sizes:
    return SMALL if s.miniature else LARGE


def _normal(s: Setting, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=s.device).to(dtype)


def _silu_mul(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, size = launcher(s, "layers", "silu_mul"), sizes_of(s)

    def check(T: int) -> Check:
        gate_TF, up_TF = _normal(s, T, 2 * size.mlp, dtype=dtype).chunk(2, dim=1)
        return Check(
            f"{T} x {size.mlp}",
            lambda: run(gate_TF, up_TF),
            lambda: plain.silu_mul(gate_TF, up_TF),
            lambda: plain.silu_mul(gate_TF.float(), up_TF.float()),
            3 * gate_TF.nbytes,
        )

    return [check(T) for T in size.tokens]


def _gradients(
    twin: Callable[..., Any], operands: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of `twin` with respect to its operands, computed by autograd."""
    leaves = [x.detach().requires_grad_() for x in operands]
    return torch.autograd.grad(_tensors(twin(*leaves)), leaves, upstream)


def _backward(
    shape: str,
    run: Callable[[], Any],
    twin: Callable[..., Any],
    operands: Sequence[Tensor],
    upstream: Sequence[Tensor],
    num_bytes: int,
) -> Check:
    exact = [x.float() for x in operands], [g.float() for g in upstream]
    return Check(
        shape,
        run,
        lambda: _gradients(twin, operands, upstream),
        lambda: _gradients(twin, *exact),
        num_bytes,
    )


def _silu_mul_backward(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, size = launcher(s, "layers", "silu_mul_backward"), sizes_of(s)
    T = max(size.tokens)
    gate_TF, up_TF, g_TF = (_normal(s, T, size.mlp, dtype=dtype) for _ in range(3))
    operands, shape, num_bytes = (gate_TF, up_TF), f"{T} x {size.mlp}", 5 * gate_TF.nbytes
    work = partial(run, *operands, g_TF)
    return [_backward(shape, work, plain.silu_mul, operands, [g_TF], num_bytes)]


def _norm_backward(s: Setting, dtype: torch.dtype) -> list[Check]:
    """Check the backward of `add_norm`, which saves x + y and adds the gradient of that sum."""
    run, size = launcher(s, "layers", "norm_backward"), sizes_of(s)

    def check(D: int) -> Check:
        T = max(size.tokens)
        x_TD, g_total_TD, g_TD = (_normal(s, T, D, dtype=dtype) for _ in range(3))
        weight_D = _normal(s, D, dtype=dtype)

        def twin(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), plain.norm(x, weight, 1e-6)

        work = partial(run, x_TD, weight_D, 1e-6, g_TD, g_total_TD)
        operands, upstream = (x_TD, weight_D), [g_total_TD, g_TD]
        return _backward(f"{T} x {D}", work, twin, operands, upstream, 4 * x_TD.nbytes)

    return [check(D) for D in (size.width // 2, size.width)]


def _norm_rope_backward(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, size = launcher(s, "layers", "norm_rope_backward"), sizes_of(s)
    T, H, G, K = max(size.tokens), size.heads, size.groups, size.head_size
    rope = rope_tables(torch.arange(T, device=s.device), K, 1e6)
    heads = [_normal(s, T, n, K, dtype=dtype) for n in (H, G)]
    upstream = [_normal(s, T, n, K, dtype=dtype) for n in (H, G)]
    operands = (*heads, *(_normal(s, K, dtype=dtype) for _ in range(2)))
    work = partial(run, *operands, 1e-6, *rope, *upstream)
    num_bytes = 3 * sum(x.nbytes for x in heads)

    def twin(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return plain.norm_rope(*operands, 1e-6, *rope)

    shape = f"{T} x {H} + {G} heads of {K}"
    return [_backward(shape, work, twin, operands, upstream, num_bytes)]


def _add_norm(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, size = launcher(s, "layers", "add_norm"), sizes_of(s)

    def check(T: int) -> Check:
        x_TD, y_TD = (_normal(s, T, size.width, dtype=dtype) for _ in range(2))
        weight_D = _normal(s, size.width, dtype=dtype)
        exact = x_TD.float(), y_TD.float(), weight_D.float(), 1e-6
        return Check(
            f"{T} x {size.width}",
            lambda: run(x_TD, y_TD, weight_D, 1e-6),
            lambda: plain.add_norm(x_TD, y_TD, weight_D, 1e-6),
            lambda: plain.add_norm(*exact),
            4 * x_TD.nbytes,
        )

    return [check(T) for T in size.tokens]


def _norm_rope(s: Setting, dtype: torch.dtype) -> list[Check]:
    run, size = launcher(s, "layers", "norm_rope"), sizes_of(s)
    H, G, K = size.heads, size.groups, size.head_size

    def check(T: int) -> Check:
        joined = _normal(s, T, (H + 2 * G) * K, dtype=dtype).unflatten(1, (-1, K))
        q_THK, k_TGK, v_TGK = joined.split([H, G, G], dim=1)
        weights = [_normal(s, K, dtype=dtype) for _ in range(2)]
        rope = rope_tables(torch.arange(T, device=s.device), K, 1e6)
        pages = -(-T // PAGE_SIZE)
        keys, values = (
            torch.zeros(pages, PAGE_SIZE, G, K, device=s.device, dtype=dtype) for _ in "kv"
        )
        place_T = torch.randperm(pages * PAGE_SIZE, device=s.device)[:T]
        where = keys, values, place_T // PAGE_SIZE, place_T % PAGE_SIZE

        def operator() -> tuple[Tensor, Tensor]:
            return run(q_THK, k_TGK, v_TGK, *weights, 1e-6, *rope, *where)

        def with_cache() -> tuple[Tensor, ...]:
            q, k = operator()
            written = (x.flatten(0, 1)[place_T] for x in (keys, values))
            return q, k, *written, torch.stack([x.ne(0).sum() for x in (keys, values)])

        def twin(q: Tensor, k: Tensor, v: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
            q, k = plain.norm_rope(q, k, *w, 1e-6, *rope)
            # The caches hold nothing but these.
            return q, k, k, v, torch.stack([x.to(dtype).ne(0).sum() for x in (k, v)])

        operands = [q_THK, k_TGK, v_TGK, *weights]
        exact = [x.float() for x in operands]
        return Check(
            f"{T} x {H} + 2 x {G} heads of {K}",
            with_cache,
            lambda: twin(*operands),
            lambda: twin(*exact),
            2 * joined.nbytes,  # keys are written twice, values once
            operator,
        )

    return [check(T) for T in size.tokens]


# ------------------------------------------------------------- paged attention


class _Pages(NamedTuple):
    """Queries and the pages that they attend to, scattered over a cache."""

    q_THK: Tensor
    keys_PSGK: Tensor
    values_PSGK: Tensor
    table_NM: Tensor
    used_N: Tensor

    @property
    def num_bytes(self) -> int:
        token = self.keys_PSGK[0, 0].nbytes
        return 2 * self.q_THK.nbytes + 2 * token * int(self.used_N.sum())

    @property
    def exact(self) -> _Pages:
        q, keys, values, *rest = self
        return _Pages(q.float(), keys.float(), values.float(), *rest)

    def first(self, n: int) -> _Pages:
        """The first n sequences, of one query each."""
        return self._replace(
            q_THK=self.q_THK[:n], table_NM=self.table_NM[:n], used_N=self.used_N[:n]
        )

    def attend(self, starts: Sequence[int]) -> Tensor:
        starts_N1 = torch.tensor(starts, dtype=torch.int32, device=self.q_THK.device)
        return plain.paged_attention(*self, starts_N1)


def _pages(s: Setting, used: Sequence[int], queries: int, heads: int, dtype: Any) -> _Pages:
    size = sizes_of(s)
    width = -(-max(used) // PAGE_SIZE)
    count = len(used) * width
    shape = (count, PAGE_SIZE, size.groups, size.head_size)
    q = _normal(s, queries, heads, size.head_size, dtype=dtype)
    keys, values = (_normal(s, *shape, dtype=dtype) for _ in "kv")
    table = torch.randperm(count, device=s.device).view(len(used), width).int()
    return _Pages(q, keys, values, table, torch.tensor(used, dtype=torch.int32, device=s.device))


def _decode_cases(s: Setting, dtype: torch.dtype) -> dict[str, _Pages]:
    """By name: one query for each of so many sequences of around so many tokens."""
    if s.miniature:
        cases = [(3, 4, 70), (2, 4, 600)]
    else:
        cases = [(1, 16, 1000), (64, 16, 1000), (256, 16, 1000), (64, 32, 1000), (16, 32, 8000)]
    found = {}
    for n, heads, context in cases:
        used = [max(1, context - 64 + 37 * i % 128) for i in range(n)]
        name = f"{n} x {heads} heads, {context} tokens"
        found[name] = _pages(s, used, n, heads, dtype)
    return found


def _paged_decode(s: Setting, dtype: torch.dtype) -> list[Check]:
    run = launcher(s, "attention", "paged_decode")
    checks = []
    for name, pages in _decode_cases(s, dtype).items():
        few = pages.first(4)  # the twin goes through sequences one by one
        starts = range(few.used_N.numel() + 1)
        checks.append(
            Check(
                name,
                lambda p=pages: run(*p)[:4],
                lambda p=few, starts=starts: p.attend(starts),
                lambda p=few, starts=starts: p.exact.attend(starts),
                pages.num_bytes,
            )
        )
    return checks


def _paged_prefill(s: Setting, dtype: torch.dtype) -> list[Check]:
    """The last queries of sequences that begin in the cache, and a whole one."""
    run, size = launcher(s, "attention", "paged_prefill"), sizes_of(s)
    lengths = ((70, 9), (65, 65)) if s.miniature else ((4096, 1024), (1000, 1000), (8192, 17))
    starts = [*accumulate((queries for _, queries in lengths), initial=0)]
    pages = _pages(s, [used for used, _ in lengths], starts[-1], size.heads, dtype)
    starts_N1 = torch.tensor(starts, dtype=torch.int32, device=s.device)
    longest = max(queries for _, queries in lengths)
    return [
        Check(
            f"used and queries {lengths}",
            lambda: run(*pages, starts_N1, longest),
            lambda: pages.attend(starts),
            lambda: pages.exact.attend(starts),
        )
    ]


def check_independence(s: Setting) -> None:
    """A sequence's attention: the same bits alone, among others, and through a wider table."""
    run = launcher(s, "attention", "paged_decode")
    for name, pages in _decode_cases(s, HALF[0] if s.on_cuda else HALF[1]).items():
        together = run(*pages)
        alone = run(*pages.first(1))
        wider = torch.nn.functional.pad(pages.table_NM, (0, 33))
        padded = run(*pages._replace(table_NM=wider))
        figures = {
            "alone": torch.equal(together[:1], alone),
            "wider_table": torch.equal(together, padded),
            "twice": torch.equal(together, run(*pages)),
        }
        title = {"figure": "independence", "shape": name}
        s.emit({**title, **figures, "ok": all(figures.values())})


def measure_splits(s: Setting) -> None:
    """Milliseconds of decode attention by the length of a split."""
    run = launcher(s, "attention", "paged_decode")
    attention = importlib.import_module(f"{PACKAGE}.attention")
    own = attention._SPLIT
    for name, pages in _decode_cases(s, HALF[0] if s.on_cuda else HALF[1]).items():
        found = {}
        for split in (128, 256, 512):
            attention._SPLIT = split
            seconds = s.device_seconds(lambda p=pages: run(*p))
            found[f"ms_{split}"] = 1e3 * seconds
            found[f"gb_per_s_{split}"] = pages.num_bytes / seconds / 1e9
        s.emit({"figure": "split lengths", "shape": name, "own": own, **found})
    attention._SPLIT = own


LAYERS: dict[str, Make] = {
    "silu_mul": _silu_mul,
    "add_norm": _add_norm,
    "norm_rope": _norm_rope,
    "silu_mul_backward": _silu_mul_backward,
    "norm_backward": _norm_backward,
    "norm_rope_backward": _norm_rope_backward,
}
ATTENTION: dict[str, Make] = {"paged_decode": _paged_decode, "paged_prefill": _paged_prefill}
