"""Memory and time of each activation checkpointing mode on a CPU, eager and compiled, in turns.

    python benchmarks/activation_checkpoint.py --rounds 4

One forward and backward of some layers of a Qwen3 (true shapes, random weights, no vocabulary head)
over a packed batch. All modes share one set of weights. "kept" is what a layer's forward leaves for
its backward; "peak" is the most that both passes of all layers allocate at once, gradients aside;
both are from the profiler's record of every allocation. Seconds are the least of the rounds.

T stands for packed tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import alternate, emit, machine, table
from qwen3_shapes import NAMES, write_config
from torch import Tensor, nn

from opd_titan.config.resolve import ModelSpec
from opd_titan.models import transforms
from opd_titan.models.attention import PackedAttention
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.training.sources import inspect_shape

VOCAB = 1024
MODES = ("none", "selective", "full")


def variant(base: Qwen3Model, mode: str, compile: bool) -> Qwen3Model:
    """Return a model with the same weights and gradients, but other transforms."""
    with torch.device("meta"):
        model = Qwen3Model(base.args)
    model.load_state_dict(base.state_dict(), assign=True)
    model.tie_weights()
    for p, shared in zip(model.parameters(), base.parameters(), strict=True):
        p.grad = shared.grad
    transforms.apply_activation_checkpointing(model.layers, mode)
    if compile:
        transforms.apply_compile(model.layers)
    return model


class NoLayer(nn.Module):
    """Stands for the layers where what lies outside of them is measured."""

    def forward(self, h_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return h_TD, torch.zeros(())


def forward(model: Qwen3Model, tokens_T: Tensor, seq_lens: list[int]) -> Tensor:
    attend = PackedAttention(seq_lens, tokens_T.device)
    return model(tokens_T, attend, lambda h_TD, _weight: h_TD.float().square().mean())


def seconds(model: Qwen3Model, *batch: Any) -> float:
    start = time.perf_counter()
    forward(model, *batch).backward()
    return time.perf_counter() - start


def memory(model: Qwen3Model, *batch: Any) -> tuple[int, int]:
    """Return the bytes kept for the backward, and the peak of both passes."""
    kept, forward_peak, loss = profiled(partial(forward, model, *batch))
    _, backward_peak, _ = profiled(loss.backward)
    return kept, max(forward_peak, kept + backward_peak)


def profiled(function: Any) -> tuple[int, int, Any]:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default="0.6B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="no compiled layers")
    a = parser.parse_args()
    emit(machine())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_config(a.model, Path(folder), vocab_size=VOCAB, num_hidden_layers=a.layers)
        base = Qwen3Model(inspect_shape(ModelSpec("student", folder, "student.hf_path"), 1).args)
    for p in base.parameters():
        p.grad = torch.zeros_like(p)
    batch = torch.randint(VOCAB, (a.tokens,)), [a.sequence] * (a.tokens // a.sequence)
    outside = variant(base, "none", False)
    outside.layers = nn.ModuleList([NoLayer()])
    rest, _ = memory(outside, *batch)
    models = {
        f"{'compiled' if compile else 'eager'}, {mode}": variant(base, mode, compile)
        for compile in ((False,) if a.eager else (False, True))
        for mode in MODES
    }
    sizes = {}
    for name, model in models.items():
        seconds(model, *batch)  # compiles, and fills the allocator
        kept, peak = memory(model, *batch)
        sizes[name] = kept - rest, peak
    times = alternate({n: partial(seconds, m, *batch) for n, m in models.items()}, a.rounds)
    found = [(n, *sizes[n], min(times[n])) for n in models]
    _, first_kept, first_peak, first_time = found[0]
    rows = [
        {
            "layers": name,
            "kept / token and layer, KiB": kept / a.tokens / a.layers / 1024,
            "kept, ratio": kept / first_kept,
            "peak, MiB": peak / 2**20,
            "peak, ratio": peak / first_peak,
            "forward + backward, s": least,
            "time, ratio": least / first_time,
        }
        for name, kept, peak, least in found
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
