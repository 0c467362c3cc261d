"""Memory and time of each activation checkpointing mode, eager and compiled, side by side.

    python benchmarks/activation_checkpoint.py --compile                         # CPU
    python benchmarks/activation_checkpoint.py --compile --model 1.7B --tokens 8192   # CUDA

One forward and backward of a Qwen3's layers (true shapes, random weights, no vocabulary head) over
a packed batch. All modes share one set of weights and take turns, so that ratios hold on a shared
machine: seconds are the least of the rounds. "kept" is what a layer's forward leaves for its
backward, "peak" the most that both passes of all layers allocate at once, gradients aside. On CUDA
the allocator tells both; on a CPU the profiler's record of every allocation.

T stands for packed tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opd_titan.models import transforms  # noqa: E402
from opd_titan.models.attention import PackedAttention  # noqa: E402
from opd_titan.models.qwen3.args import Qwen3Args  # noqa: E402
from opd_titan.models.qwen3.model import Qwen3Model  # noqa: E402

# Of their config.json: layers, width, query heads, width between the MLP's products.
SIZES = {
    "0.6B": (28, 1024, 16, 3072),
    "1.7B": (28, 2048, 16, 6144),
    "4B": (36, 2560, 32, 9728),
    "8B": (36, 4096, 32, 12288),
}
MODES = ("none", "selective", "full")


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    kept: int = 0
    peak: int = 0


def qwen3_args(name: str, layers: int) -> Qwen3Args:
    n_layers, dim, n_heads, ffn_dim = SIZES[name]
    return Qwen3Args(
        vocab_size=1024,
        dim=dim,
        n_layers=layers or n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied=True,
        max_seq_len=40960,
        init_std=0.02,
    )


def variant(base: Qwen3Model, mode: str, compile: bool) -> Qwen3Model:
    """The same weights, and the same gradients' storage, under other transforms."""
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


class Bench:
    def __init__(self, seq_lens: list[int], device: torch.device) -> None:
        self.seq_lens, self.device = seq_lens, device
        self.tokens_T = torch.randint(1024, (sum(seq_lens),), device=device)

    def forward(self, model: Qwen3Model) -> Tensor:
        attend = PackedAttention(self.seq_lens, self.device)
        return model(self.tokens_T, attend, lambda h_TD, _w: h_TD.float().square().mean())

    def seconds(self, model: Qwen3Model) -> float:
        self._wait()
        start = time.perf_counter()
        self.forward(model).backward()
        self._wait()
        return time.perf_counter() - start

    def memory(self, model: Qwen3Model) -> tuple[int, int]:
        """Bytes kept for the backward, and the peak of both passes."""
        if self.device.type == "cuda":
            return self._cuda_memory(model)
        kept, forward_peak, loss = _profiled(lambda: self.forward(model))
        _, backward_peak, _ = _profiled(loss.backward)
        return kept, max(forward_peak, kept + backward_peak)

    def _cuda_memory(self, model: Qwen3Model) -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self.forward(model)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _profiled(function) -> tuple[int, int, Tensor | None]:
    """Bytes allocated at the end and at most, and what the function returned."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return now, peak, result


def measure(a: argparse.Namespace) -> dict[tuple[bool, str], Result]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    base = Qwen3Model(qwen3_args(a.model, a.layers)).to(device, dtype)
    for p in base.parameters():
        p.grad = torch.zeros_like(p)
    sequences = max(1, a.tokens // a.sequence)
    bench = Bench([a.tokens // sequences] * sequences, device)
    keys = [
        (compile, mode) for compile in ((False, True) if a.compile else (False,)) for mode in MODES
    ]
    models = {key: variant(base, key[1], key[0]) for key in keys}
    results = {key: Result() for key in keys}
    outside = variant(base, "none", False)
    outside.layers = nn.ModuleList()
    rest, _ = bench.memory(outside)
    for key, model in models.items():
        bench.seconds(model)  # compiles, and fills the allocator
        results[key].kept, results[key].peak = bench.memory(model)
        results[key].kept -= rest
    for _ in range(a.rounds):
        for key, model in models.items():
            results[key].seconds.append(bench.seconds(model))
    return results


def report(a: argparse.Namespace, results: dict[tuple[bool, str], Result]) -> None:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    layers = a.layers or SIZES[a.model][0]
    load = os.getloadavg()[0]
    print(
        f"\nQwen3-{a.model}, {layers} layers, {a.tokens} tokens in sequences of {a.sequence}, "
        f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, load {load:.1f}\n"
    )
    print("| blocks | mode | kept / token and layer | ratio | peak | ratio | seconds | ratio |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    first = next(iter(results.values()))
    for (compile, mode), r in results.items():
        print(
            f"| {'compiled' if compile else 'eager'} | {mode} "
            f"| {r.kept / a.tokens / layers / 1024:.1f} KiB | {r.kept / first.kept:.2f} "
            f"| {r.peak / 2**20:.0f} MiB | {r.peak / first.peak:.2f} "
            f"| {min(r.seconds):.2f} | {min(r.seconds) / min(first.seconds):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="0.6B")
    parser.add_argument("--layers", type=int, help="all of them by default; on a CPU 2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also compiled")
    a = parser.parse_args()
    if a.layers is None:
        a.layers = 0 if torch.cuda.is_available() else 2
    report(a, measure(a))


if __name__ == "__main__":
    main()
