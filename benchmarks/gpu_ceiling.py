"""What plain matrix products and attention of the model's shapes reach alone, and the head.

Shapes: T tokens, R response tokens, D model width, V vocabulary, H query heads, G key/value heads,
K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_phases import recipe, rule
from gpu_setting import Setting, fed_in, relative_error, responses
from torch import Tensor

import opd_titan.distill.head as head_module
from opd_titan.distill.head import loss_head, score_head
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import Distribution

MIB = 1024**2
INNER = 8  # calls between two synchronisations


def measure_ceiling(s: Setting, size: str) -> None:
    """Products of a layer and of the head, forward and both backward ones; attention; the sum."""
    args = s.shape("student", size).args
    samples = s.samples(max(s.budgets), 1, args.vocab_size)
    lengths, rows = fed_in(samples), responses(samples)
    tokens = sum(lengths)
    heads, groups = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layer = {
        "wq": (args.dim, heads),
        "wk, wv (each)": (args.dim, groups),
        "wo": (heads, args.dim),
        "w1, w3 (each)": (args.dim, args.ffn_dim),
        "w2": (args.ffn_dim, args.dim),
    }
    total = {"forward_s": 0.0, "backward_s": 0.0}
    for name, (inside, outside) in layer.items():
        found = _products(s, tokens, inside, outside)
        s.emit({"figure": name, "shape": f"{tokens} x {inside} x {outside}", **found})
        for key in total:
            total[key] += found[key] * (2 if "each" in name else 1) * args.n_layers
    s.emit({"figure": "all layers' products", **total})
    attention = _attention(s, args, lengths)
    head = _best_head(s, args, rows)
    forward = total["forward_s"] + attention["forward_s"] + head["forward_s"]
    both = forward + total["backward_s"] + attention["backward_s"] + head["backward_s"]
    flops = args.forward_flops(lengths, rows)
    parts = {
        "tokens": tokens,
        "layers_s": sum(total.values()),
        "attention_s": attention["forward_s"] + attention["backward_s"],
        "head_s": head["forward_s"] + head["backward_s"],
    }
    s.emit({"figure": "score ceiling", "seconds": forward, **s.rates(forward, flops, tokens)})
    rates = s.rates(both, 3.0 * flops, tokens)
    s.emit({"figure": "update ceiling", "seconds": both, **parts, **rates})


def _products(s: Setting, tokens: int, inside: int, outside: int) -> dict[str, float]:
    """Y = X W^T, dX = dY W and dW = dY^T X, median seconds."""
    x, w, y = (
        torch.randn(*shape, device=s.device, dtype=s.dtype)
        for shape in ((tokens, inside), (outside, inside), (tokens, outside))
    )
    forward = s.seconds(lambda: x @ w.t(), inner=INNER)["median_s"]
    to_input = s.seconds(lambda: y @ w, inner=INNER)["median_s"]
    to_weight = s.seconds(lambda: y.t() @ x, inner=INNER)["median_s"]
    flops = 2.0 * tokens * inside * outside
    found = {"forward_s": forward, "backward_s": to_input + to_weight}
    return {**found, **s.rates(forward + to_input + to_weight, 3.0 * flops)}


def _attention(s: Setting, args: Any, lengths: list[int]) -> dict[str, float]:
    """The program's own packed attention, of all layers, median seconds."""
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

    ahead = s.seconds(forward, inner=INNER)["median_s"] * args.n_layers
    there_and_back = s.seconds(both, inner=INNER)["median_s"] * args.n_layers
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 4.0 * args.n_layers * args.n_heads * args.head_dim * pairs
    found = {"forward_s": ahead, "backward_s": there_and_back - ahead}
    packed = {"packed_kernel": PackedAttention._has_packed_kernel(q)}
    s.emit({"figure": "attention", **found, **packed, **s.rates(there_and_back, 3.0 * flops)})
    return found


def _best_head(s: Setting, args: Any, rows: int) -> dict[str, float]:
    """The head's three products on chunks of several heights; the fastest, for all rows."""
    own = max(1, head_module.CHUNK_BYTES[s.device.type] // (4 * args.vocab_size))
    best: dict[str, float] = {}
    for height in sorted({min(own, rows), min(1024, rows), min(4096, rows)}):
        found = _products(s, height, args.dim, args.vocab_size)
        whole = {key: found[key] * rows / height for key in ("forward_s", "backward_s")}
        rate = s.rates(sum(whole.values()), 6.0 * args.dim * args.vocab_size * rows)
        s.emit({"figure": "head's products", "rows": height, **whole, **rate})
        if not best or sum(whole.values()) < sum(best.values()):
            best = whole
    return best


def measure_head(s: Setting, size: str) -> None:
    """The program's head alone, with chunks of several sizes, against fp32 on its first rows."""
    args, config = s.shape("student", size).args, recipe(False)
    rows = responses(s.samples(max(s.budgets), 1, args.vocab_size))
    hidden_RD = torch.randn(rows, args.dim, device=s.device, dtype=s.dtype)
    weight_VD = torch.randn(args.vocab_size, args.dim, device=s.device) * args.init_std
    weight_VD = weight_VD.to(s.dtype)
    targets_R = torch.randint(args.vocab_size, (rows,), device=s.device)
    teacher_R = torch.randn(rows, device=s.device) * 0.3 - 11.0
    index_R = torch.arange(rows, device=s.device)
    r = rule(config)

    def both() -> Tensor:
        leaves = hidden_RD.detach().requires_grad_(), weight_VD.detach().requires_grad_()
        loss, _ = loss_head(
            *leaves,
            predict_R=index_R,
            targets_R=targets_R,
            scores=TokenScores(teacher=teacher_R),
            scale=1.0 / rows,
            objective=r.objective,
            settings=r.settings,
            dist=r.dist,
        )
        return torch.autograd.grad(loss, leaves)[0]

    def forward() -> Tensor:
        return score_head(hidden_RD, weight_VD, index_R, targets_R, Distribution())

    kind, flops, reference = s.device.type, 2.0 * args.dim * args.vocab_size * rows, None
    own = head_module.CHUNK_BYTES[kind]
    sizes = (own // 8, own, 2 * own) if not s.miniature else (own // 256, own)
    for chunk in sizes:
        head_module.CHUNK_BYTES[kind] = chunk
        how = {"chunk_mib": chunk / MIB, "rows": chunk // (4 * args.vocab_size)}
        s.reset_memory()
        for name, work, share in (("loss_head", both, 3.0), ("score_head", forward, 1.0)):
            timed = s.seconds(work)
            rates = s.rates(timed["median_s"], share * flops)
            s.emit({"figure": name, **how, **timed, **rates, **s.peak_memory()})
        found = both()
        reference = found if reference is None else reference
        s.emit(
            {"figure": "same gradient", **how, "relative_error": relative_error(found, reference)}
        )
    head_module.CHUNK_BYTES[kind] = own
    s.emit({"figure": "loss_head kernels", **how, **s.kernels(both)})
