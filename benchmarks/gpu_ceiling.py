"""What plain products, copies and attention of the model's shapes reach alone; and the head.

Shapes: T tokens, R response tokens, D model width, V vocabulary, H query heads, G key/value heads,
K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_setting import GIB, Setting, fed_in, relative_error, responses
from torch import Tensor

import opd_titan.distill.head as head_module
from opd_titan.config import JobConfig
from opd_titan.distill.head import LossHead
from opd_titan.distill.update import UpdateRule
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import Distribution

INNER = 8  # calls between two synchronisations


def measure_device(s: Setting) -> None:
    """Measure a plain copy, a plain read and a plain product."""
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


def measure_ceiling(s: Setting, size: str) -> None:
    """Measure a model's products, forward and both backward ones, its attention, and the sum."""
    args = s.shape("student", size).args
    samples = s.samples(max(s.budgets), 1, args.vocab_size)
    lengths, rows = fed_in(samples), responses(samples)
    tokens = sum(lengths)
    heads, groups = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    products = (
        (1, args.dim, heads),  # wq
        (2, args.dim, groups),  # wk, wv
        (1, heads, args.dim),  # wo
        (2, args.dim, args.ffn_dim),  # w1, w3
        (1, args.ffn_dim, args.dim),  # w2
    )
    layers = [0.0, 0.0]
    for count, inside, outside in products:
        found = _product(s, tokens, inside, outside)
        layers = [x + args.n_layers * count * f for x, f in zip(layers, found, strict=True)]
    attention = _attention(s, args, lengths)
    # A chunk of the head has as many rows as its memory allows; the fastest height counts.
    own = max(1, head_module.CHUNK_BYTES[s.device.type] // (4 * args.vocab_size))
    heights = sorted({min(own, rows), min(1024, rows), min(4096, rows)})
    chunks = {n: _product(s, n, args.dim, args.vocab_size) for n in heights}
    head = min(([x * rows / n for x in found] for n, found in chunks.items()), key=sum)
    parts = {"layers_s": sum(layers), "attention_s": sum(attention), "head_s": sum(head)}
    flops = args.forward_flops(lengths, rows)
    forward = layers[0] + attention[0] + head[0]
    rates = s.rates(forward, flops, tokens)
    s.emit({"figure": "score ceiling", "seconds": forward, **rates})
    both = sum(parts.values())
    rates = s.rates(both, 3.0 * flops, tokens)
    s.emit({"figure": "update ceiling", "seconds": both, **parts, **rates})


def _product(s: Setting, tokens: int, inside: int, outside: int) -> tuple[float, float]:
    """Return the median seconds of Y = X W^T, and of dX = dY W and dW = dY^T X together."""
    x, w, y = (
        torch.randn(*shape, device=s.device, dtype=s.dtype)
        for shape in ((tokens, inside), (outside, inside), (tokens, outside))
    )
    forward = s.seconds(lambda: x @ w.t(), inner=INNER)["median_s"]
    to_input = s.seconds(lambda: y @ w, inner=INNER)["median_s"]
    to_weight = s.seconds(lambda: y.t() @ x, inner=INNER)["median_s"]
    flops, backward = 2.0 * tokens * inside * outside, to_input + to_weight
    rates = s.rates(forward + backward, 3.0 * flops)
    shape = f"{tokens} x {inside} x {outside}"
    s.emit({"figure": "products", "shape": shape, "forward_s": forward, **rates})
    return forward, backward


def _attention(s: Setting, args: Any, lengths: list[int]) -> tuple[float, float]:
    """Return the median seconds of the program's packed attention in all layers."""
    q, k, v = (
        torch.randn(sum(lengths), n, args.head_dim, device=s.device, dtype=s.dtype)
        for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    )
    attend = PackedAttention(lengths, s.device)

    @torch.no_grad()
    def forward() -> None:
        attend(q, k, v, 0)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, 0)
        torch.autograd.grad(out, leaves, out)

    there = s.seconds(forward, inner=INNER)["median_s"] * args.n_layers
    there_and_back = s.seconds(both, inner=INNER)["median_s"] * args.n_layers
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 4.0 * args.n_layers * args.n_heads * args.head_dim * pairs
    rates = s.rates(there_and_back, 3.0 * flops)
    s.emit({"figure": "attention", "forward_s": there, **rates})
    return there, there_and_back - there


def measure_head(s: Setting, size: str) -> None:
    """Measure the program's head alone with chunks of its own size and twice that."""
    args = s.shape("student", size).args
    rows = responses(s.samples(max(s.budgets), 1, args.vocab_size))
    hidden_RD = torch.randn(rows, args.dim, device=s.device, dtype=s.dtype)
    weight_VD = torch.randn(args.vocab_size, args.dim, device=s.device) * args.init_std
    weight_VD = weight_VD.to(s.dtype)
    targets_R = torch.randint(args.vocab_size, (rows,), device=s.device)
    teacher_R = torch.randn(rows, device=s.device) * 0.3 - 11.0
    c = JobConfig()
    rule = UpdateRule.of(c.distill, c.reference, c.training, Distribution())

    def both() -> Tensor:
        leaves = hidden_RD.detach().requires_grad_(), weight_VD.detach().requires_grad_()
        predict_R, scores = torch.arange(rows, device=s.device), TokenScores(teacher=teacher_R)
        loss, _ = LossHead(rule, predict_R, targets_R, scores, scale=1.0 / rows)(*leaves)
        return torch.autograd.grad(loss, leaves)[0]

    kind, flops = s.device.type, 6.0 * args.dim * args.vocab_size * rows
    own = head_module.CHUNK_BYTES[kind]
    # Tiny models need less than one chunk: theirs are cut down, so that there are several.
    sizes = (own // 256, own // 128) if s.miniature else (own, 2 * own)
    found = []
    for chunk in sizes:
        head_module.CHUNK_BYTES[kind] = chunk
        s.reset_memory()
        timed = s.seconds(both)
        rates, memory = s.rates(timed["median_s"], flops), s.peak_memory()
        s.emit({"figure": "loss_head", "chunk_bytes": chunk, **timed, **rates, **memory})
        found.append(both())
    head_module.CHUNK_BYTES[kind] = own
    error = relative_error(found[1], found[0])
    s.emit({"figure": "loss_head, same gradient", "relative_error": error, "ok": error < 0.01})
