"""What do the modes of activation checkpointing save and cost, in eager and in compiled layers?

    python benchmarks/activation_checkpoint.py --rounds 4

One forward and backward of some layers of a Qwen3 (true shapes, random weights, no vocabulary head)
over a packed batch. The modes share one set of weights and alternate. "kept" is what a layer's
forward leaves for its backward; "peak" is the most that both passes allocate at once, gradients of
weights aside; both are from the profiler's record of allocations. Seconds are the least of the
rounds. Ratios are to the first row.

Shapes: T packed tokens, D model width.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Record, alternate, emit, machine, parser, table
from qwen3_shapes import NAMES, write_config
from torch import Tensor, nn

from opd_titan.config.resolve import ModelSpec
from opd_titan.models import transforms
from opd_titan.models.attention import PackedAttention
from opd_titan.models.qwen3.model import Block, rope_tables
from opd_titan.training.sources import inspect_shape

MODES = ("none", "selective", "full")


def transformed(base: nn.ModuleList, args: Any, mode: str, compile: bool) -> nn.ModuleList:
    """Return layers with the same weights and gradients, with other transforms."""
    with torch.device("meta"):
        layers = nn.ModuleList(Block(args, i) for i in range(len(base)))
    layers.load_state_dict(base.state_dict(), assign=True)
    for p, shared in zip(layers.parameters(), base.parameters(), strict=True):
        p.grad = shared.grad
    transforms.apply_activation_checkpointing(layers, mode)
    if compile:
        transforms.apply_compile(layers)
    return layers


def forward(layers: nn.ModuleList, args: Any, x_TD: Tensor, lengths: list[int]) -> Tensor:
    attend = PackedAttention(lengths, x_TD.device)
    rope = rope_tables(attend.positions_T, args.head_dim, args.rope_theta)
    # Allocated here, as the embedding does in the model.
    x_TD, added_TD = x_TD * 1.0, None
    for layer in layers:
        x_TD, added_TD = layer(x_TD, added_TD, rope, attend)
    return (x_TD + added_TD).sum()


def measure_seconds(loss: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def measure_bytes(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the bytes kept for the backward, and the peak of both passes."""
    kept, forward_peak, result = profiled(loss)
    _, backward_peak, _ = profiled(result.backward)
    return kept, max(forward_peak, kept + backward_peak)


def profiled(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """Return the bytes allocated at the end and at most, and the function's result."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return now, peak, result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=NAMES, default="0.6B")
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--sequence", type=int, default=512, help="tokens of each sequence")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--eager", action="store_true", help="no compiled layers")
    a = arguments.parse_args()
    emit(machine())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_config(a.model, Path(folder))
        args = inspect_shape(ModelSpec("student", folder, "student.hf_path"), 1).args
    base = nn.ModuleList(Block(args, i) for i in range(a.layers))
    for p in base.parameters():
        p.grad = torch.zeros_like(p)
    x_TD = torch.randn(a.tokens, args.dim, requires_grad=True)
    batch = x_TD, [a.sequence] * (a.tokens // a.sequence)
    losses = {
        f"{'compiled' if compile else 'eager'}, {mode}": partial(
            forward, transformed(base, args, mode, compile), args, *batch
        )
        for compile in ((False,) if a.eager else (False, True))
        for mode in MODES
    }
    sizes = {}
    for name, loss in losses.items():
        measure_seconds(loss)  # compiles, and fills the allocator
        sizes[name] = measure_bytes(loss)
    seconds = alternate({n: partial(measure_seconds, loss) for n, loss in losses.items()}, a.rounds)
    rows: list[Record] = []
    for name, (kept, peak) in sizes.items():
        row: Record = {
            "layers": name,
            "kept / token and layer, KiB": kept / a.tokens / a.layers / 1024,
        }
        row |= {"peak, MiB": peak / 2**20, "forward + backward, s": min(seconds[name])}
        first = rows[0] if rows else row
        rows.append(row | {f"{k}, ratio": row[k] / first[k] for k in [*row][1:]})
    print(table(rows))


if __name__ == "__main__":
    main()
