"""The device to measure on: clocks, memory, kernels, and the rates that plain operators reach."""

from __future__ import annotations

import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Record, emit
from qwen3_shapes import MINIATURE, write_config
from torch import Tensor, nn
from torch.autograd import DeviceType

from opd_titan.config.resolve import ModelSpec
from opd_titan.distributed.tensor_parallel import local
from opd_titan.observability.peaks import Peaks, device_peaks, percent_of_peak
from opd_titan.training.sources import ModelShape, inspect_shape

GIB = 1024**3


@dataclass
class Setting:
    """A device, and how much to measure on it.

    Attributes:
        emit: gets each figure.
        miniature: tiny models, which a CPU runs in seconds.
        warmup, repeats: calls before a measurement, and calls that are measured.
    """

    emit: Callable[[Record], None] = emit
    miniature: bool = False
    warmup: int = 2
    repeats: int = 3
    device: torch.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def shape(self, size: str, **changes: object) -> ModelShape:
        """Return the shape of a released size, with these keys of its config.json changed."""
        changes = (MINIATURE if self.miniature else {}) | changes
        with tempfile.TemporaryDirectory() as folder:
            write_config(size, Path(folder), **changes)
            return inspect_shape(ModelSpec("student", folder, "student.hf_path"), 1)

    # ------------------------------------------------------------------ time

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(
        self, work: Callable[[], Any], *, inner: int = 1, repeats: int | None = None
    ) -> dict[str, float]:
        """Return the wall-clock seconds of one call: the first (it may compile), least, median.

        Args:
            inner: calls between two synchronisations, for work shorter than its launch.
        """
        times = []
        for n in range(self.warmup + (repeats or self.repeats)):
            calls = inner if n else 1
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            self.synchronize()
            times.append((time.perf_counter() - start) / calls)
        timed = times[self.warmup :]
        return {"first_s": times[0], "min_s": min(timed), "median_s": statistics.median(timed)}

    def device_seconds(self, work: Callable[[], Any], calls: int = 10) -> float:
        """Return the median seconds of one call; on CUDA without launches, from a CUDA graph."""
        if not self.on_cuda:
            return self.seconds(work)["median_s"]
        for _ in range(2):  # compile and tune before the capture
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        return self.seconds(graph.replay, inner=20)["median_s"] / calls

    def kernels(self, work: Callable[[], Any]) -> Record:
        """Return one call's seconds, and on CUDA those of the device by kind of kernel."""
        self.synchronize()
        with torch.profiler.profile() as profile:
            start = time.perf_counter()
            work()
            self.synchronize()
            wall = time.perf_counter() - start
        by_kind: dict[str, float] = {}
        for event in profile.key_averages():
            # Operators and annotations also have the time of the kernels below them.
            annotation = getattr(event, "is_user_annotation", False)
            if event.device_type == DeviceType.CUDA and not annotation:
                kind = kind_of(event.key)
                by_kind[kind] = by_kind.get(kind, 0.0) + event.self_device_time_total / 1e6
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=40))
        return {"wall_s": wall, "seconds_by_kind": by_kind}

    # ------------------------------------------------------------- rates, memory

    def rates(self, seconds: float, flops: float, tokens: int = 0) -> dict[str, float]:
        """Return FLOP/s, tokens/s and, where the device's peak is known, the share of it."""
        peaks = device_peaks(torch.cuda.get_device_name()) if self.on_cuda else Peaks()
        found = {"seconds": seconds, "tflops_per_s": flops / seconds / 1e12}
        if tokens:
            found |= {"tokens": tokens, "tokens_per_s": tokens / seconds}
        if peaks.flops:
            found["mfu_percent"] = percent_of_peak(flops, seconds, peaks.flops)
        return found

    def bandwidths(self) -> dict[str, float]:
        """Return bytes/s of a read (the best of several ways) and of a copy of a large tensor."""
        num_bytes = 4 * GIB if self.on_cuda else GIB // 16 if self.miniature else GIB
        x = torch.ones(num_bytes // 4, device=self.device)
        # A dot product and a copy go through two tensors of half the size.
        first, second = x.chunk(2)
        ways = (x.sum, x.amax, lambda: torch.dot(first, second), lambda: second.copy_(first))
        *reads, copy = (num_bytes / self.seconds(way, repeats=5)["min_s"] for way in ways)
        return {"read": max(*reads, copy), "copy": copy}

    def product_seconds(self, rows: int, inside: int, outside: int) -> tuple[float, float]:
        """Return the least seconds of a bf16 product [rows, inside] x [inside, outside].

        Returns:
            The seconds of the forward, and of both products of the backward.
        """
        x, y, w = (
            torch.randn(n, m, device=self.device, dtype=torch.bfloat16)
            for n, m in ((rows, inside), (rows, outside), (outside, inside))
        )
        products = (lambda: x @ w.t(), lambda: y @ w, lambda: y.t() @ x)
        times = [self.seconds(p, inner=4, repeats=5)["min_s"] for p in products]
        return times[0], times[1] + times[2]

    def reset_memory(self) -> None:
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> dict[str, float]:
        """Return the peak in GiB: the allocator's on CUDA, or the process's since its start."""
        if self.on_cuda:
            return {
                "peak_active_gib": torch.cuda.max_memory_allocated() / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        return {"peak_active_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, std: float) -> None:
    """Draw matrices from normal(0, std) on their own device, which is fast; set vectors to one."""
    device = local(next(model.parameters())).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        weight = local(parameter)
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, std, generator=generator)


_KINDS = (
    ("attention", r"flash|fmha|attention"),
    ("matmul", r"gemm|gemv|nvjet|xmma|cutlass|cublas|::mm|::addmm|::bmm|::linear|splitk"),
    ("compiled", r"triton|cpp_fused"),
    ("copies", r"memcpy|memset|copy|catarray|chunk_cat|split_with_sizes"),
    ("optimizer", r"adam|foreach|multi_tensor"),
)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next(
        (kind for kind, pattern in _KINDS if re.search(pattern, name)), "elementwise and reductions"
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| over |wanted|, as 2-norms in fp64."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
