"""What every part of `gpu.py` shares: models of true shapes, samples, clocks, memory, kernels."""

from __future__ import annotations

import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from qwen3_shapes import write_config
from torch import Tensor, nn
from torch.autograd import DeviceType

from opd_titan.config import JobConfig
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World, build_world, init_world
from opd_titan.observability.peaks import Peaks, device_peaks, percent_of_peak
from opd_titan.training.models import (
    ModelShape,
    allocate,
    compute_dtype,
    inspect_shape,
    parallel_model,
)

GIB = 1024**3
Emit = Callable[[dict[str, Any]], None]


@dataclass
class Setting:
    """How large and how often; picklable, so that a case can run in a process of its own.

    Attributes:
        prompt, sequence: tokens of each sequence's prompt, and of all of it.
        budgets: tokens of a micro-batch.
        microbatches: numbers of micro-batches per update; scoring uses the largest.
        step_sequences, step_new_tokens: of the whole step.
    """

    miniature: bool
    warmup: int = 2
    repeats: int = 3
    prompt: int = 128
    sequence: int = 1024
    budgets: tuple[int, ...] = (4096, 8192)
    microbatches: tuple[int, ...] = (2, 8)
    step_sequences: int = 32
    step_new_tokens: int = 1024
    step_repeats: int = 2
    emit: Emit = field(default=print, repr=False)

    @classmethod
    def small(cls, **values: Any) -> Setting:
        """The same for a CPU in seconds."""
        sizes: dict[str, Any] = {"prompt": 16, "sequence": 64, "step_sequences": 4}
        sizes |= {"budgets": (128, 256), "microbatches": (2,)}
        often = {"warmup": 1, "repeats": 1, "step_repeats": 1}
        return cls(miniature=True, step_new_tokens=24, **sizes, **{**often, **values})

    @cached_property
    def world(self) -> World:
        """Of one process, joined in the one that measures, and nowhere else."""
        return build_world(init_world(300))

    @property
    def device(self) -> torch.device:
        return self.world.device

    @cached_property
    def on_cuda(self) -> bool:
        return torch.cuda.is_available()  # which takes long enough to be seen in what is timed

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(JobConfig(), self.device)

    @property
    def peaks(self) -> Peaks:
        return device_peaks(torch.cuda.get_device_name()) if self.on_cuda else Peaks()

    # -------------------------------------------------------------- building

    def shape(self, role: str, size: str) -> ModelShape:
        with tempfile.TemporaryDirectory() as folder:
            write_config(size, Path(folder), miniature=self.miniature)
            return inspect_shape(role, folder, 1)

    def model(
        self, shape: ModelShape, config: JobConfig, seed: int = 0, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Built and spread by the program, with weights drawn where they lie (in no time)."""
        model = parallel_model(shape, self.world, config, dtype or self.dtype)
        allocate(model, self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                weight = local(parameter)
                if weight.dim() == 1:
                    weight.fill_(1.0)
                else:
                    weight.normal_(0.0, shape.args.init_std, generator=generator)
        return model

    def prompts(self, count: int, vocab: int) -> list[Prompt]:
        ids = torch.randint(vocab, (count, self.prompt)).tolist()
        return [Prompt(i, "", tuple(row)) for i, row in enumerate(ids)]

    def samples(self, budget: int, count: int, vocab: int) -> list[Sample]:
        """`count` micro-batches' worth of sequences, with scores as if they had been scored."""
        number, response = count * (budget // self.sequence), self.sequence - self.prompt
        samples = []
        for prompt in self.prompts(number, vocab):
            ids = torch.randint(vocab, (response,)).tolist()
            student, teacher = (torch.randn(2, response) * 0.3 - 11.0).unbind()
            samples.append(Sample(prompt, 0, ids, "length", student, teacher))
        return samples

    # ------------------------------------------------------------- measuring

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(
        self, work: Callable[[], Any], *, inner: int = 1, repeats: int | None = None
    ) -> dict[str, float]:
        """Wall-clock seconds of one call: first (it may compile), min and median of the repeats.

        Args:
            inner: calls between two synchronisations, for work shorter than a launch is long.
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
        return {
            "first_s": times[0],
            "min_s": min(timed),
            "median_s": statistics.median(timed),
            "repeats": len(timed),
        }

    def device_seconds(self, work: Callable[[], Any], calls: int = 10) -> float:
        """Median seconds of one call; on CUDA without launches, from a graph of several calls."""
        if not self.on_cuda:
            return self.seconds(work)["median_s"]
        for _ in range(2):  # what is compiled or tuned must be before a capture
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        times = []
        for _ in range(1 + self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / calls)
        return statistics.median(times[1:])

    def rates(self, seconds: float, flops: float, tokens: int = 0) -> dict[str, float]:
        """FLOP/s, tokens/s and, where the device's peak is known, the share of it."""
        found = {"tflops_per_s": flops / seconds / 1e12}
        if tokens:
            found |= {"tokens": tokens, "tokens_per_s": tokens / seconds}
        if self.peaks.flops:
            found["mfu_percent"] = percent_of_peak(flops, seconds, self.peaks.flops)
        return found

    def reset_memory(self) -> None:
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> dict[str, float]:
        """GiB: the allocator's on CUDA; on a CPU the process's peak since its start."""
        if self.on_cuda:
            return {
                "peak_active_gib": torch.cuda.max_memory_allocated() / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        return {"peak_active_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}

    def kernels(self, work: Callable[[], Any]) -> dict[str, Any]:
        """One call's device seconds by kind of kernel, the largest kernels, and the idle rest."""
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if self.on_cuda else [kinds.CPU]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            start = time.perf_counter()
            work()
            self.synchronize()
            wall = time.perf_counter() - start
        by_kind: dict[str, float] = {}
        by_name: list[tuple[float, str]] = []
        for event in profile.key_averages():
            seconds = self._own_seconds(event)
            if seconds > 0:
                kind = kind_of(event.key)
                by_kind[kind] = by_kind.get(kind, 0.0) + seconds
                by_name.append((seconds, f"{event.count}x {event.key[:90]}"))
        idle = max(0.0, wall - sum(by_kind.values()))
        top = [f"{s:.6f} s {name}" for s, name in sorted(by_name, reverse=True)[:40]]
        return {"wall_s": wall, "seconds_by_kind": {**by_kind, "idle": idle}, "top": top}

    def _own_seconds(self, event: Any) -> float:
        if not self.on_cuda:
            return event.self_cpu_time_total / 1e6
        # Operators and annotations are charged with the time of the kernels below them.
        annotation = getattr(event, "is_user_annotation", False)
        if event.device_type != DeviceType.CUDA or annotation:
            return 0.0
        return event.self_device_time_total / 1e6


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


def fed_in(samples: list[Sample]) -> list[int]:
    """Tokens of each sequence that go through a model: all but the last."""
    return [s.num_tokens - 1 for s in samples]


def responses(samples: list[Sample]) -> int:
    return sum(len(s.response_ids) for s in samples)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| over |wanted|, as 2-norms in fp64."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
