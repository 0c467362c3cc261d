"""What the stages of `gpu.py` share: models of true shapes, samples, clocks, memory, kernels."""

from __future__ import annotations

import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harness import Record, emit
from qwen3_shapes import write_config
from torch import Tensor, nn
from torch.autograd import DeviceType

from opd_titan.config import JobConfig
from opd_titan.config.resolve import ModelSpec, ResolvedJob, resolve
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World, build_world, init_world
from opd_titan.observability.peaks import Peaks, device_peaks, percent_of_peak
from opd_titan.training.models import allocate, compute_dtype, parallel_model
from opd_titan.training.sources import ModelShape, inspect_shape

GIB = 1024**3


@dataclass
class Setting:
    """How large and how often, and on which device.

    Attributes:
        emit: gets each figure.
        prompt, sequence: tokens of each sequence's prompt, and of all of it.
        budgets: tokens of a micro-batch.
        microbatches: numbers of micro-batches in an update; scoring uses the largest.
        step_sequences, step_new_tokens: of the whole step.
    """

    emit: Callable[[Record], None] = emit
    miniature: bool = False
    warmup: int = 2
    repeats: int = 3
    prompt: int = 128
    sequence: int = 1024
    budgets: tuple[int, ...] = (4096, 8192)
    microbatches: tuple[int, ...] = (2, 8)
    step_sequences: int = 32
    step_new_tokens: int = 1024
    device: torch.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    @classmethod
    def small(cls, emit: Callable[[Record], None] = emit) -> Setting:
        """Return what a CPU runs in seconds."""
        sizes: Record = {"prompt": 16, "sequence": 64, "step_sequences": 4, "step_new_tokens": 24}
        often: Record = {"budgets": (128, 256), "microbatches": (2,), "warmup": 1, "repeats": 1}
        return cls(emit, miniature=True, **sizes, **often)

    @cached_property
    def world(self) -> World:
        """One process by itself."""
        return build_world(init_world(300))

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What the trainer computes in: bf16 on CUDA, else fp32."""
        return compute_dtype(self.job(JobConfig()))

    def job(self, config: JobConfig) -> ResolvedJob:
        return resolve(config, self.device.type, 1)

    @property
    def peaks(self) -> Peaks:
        return device_peaks(torch.cuda.get_device_name()) if self.on_cuda else Peaks()

    # -------------------------------------------------------------- building

    def shape(self, role: str, size: str, **changes: object) -> ModelShape:
        """Return the shape of a released size, with these keys of its config.json changed."""
        with tempfile.TemporaryDirectory() as folder:
            write_config(size, Path(folder), miniature=self.miniature, **changes)
            return inspect_shape(ModelSpec(role, folder, f"{role}.hf_path"), 1)

    def model(
        self, shape: ModelShape, config: JobConfig, seed: int = 0, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Build and shard a model as the program does; draw its weights on the device, quickly."""
        mode, compiled = config.activation_checkpoint.mode, self.job(config).compiled
        model = parallel_model(shape, self.world, dtype or self.dtype, mode, compiled)
        allocate(model, self.device)
        draw_weights(model, shape.args.init_std, seed)
        return model

    def prompts(self, count: int, vocab: int) -> list[Prompt]:
        ids = torch.randint(vocab, (count, self.prompt)).tolist()
        return [Prompt(i, "", tuple(row)) for i, row in enumerate(ids)]

    def samples(self, budget: int, count: int, vocab: int) -> list[Sample]:
        """Return sequences for `count` micro-batches, with log-probs as if they had been scored."""
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
        """Return FLOP/s, tokens/s and, where the device's peak is known, the share of it."""
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
        """Return the peak in GiB: the allocator's on CUDA, on a CPU the process's ever."""
        if self.on_cuda:
            return {
                "peak_active_gib": torch.cuda.max_memory_allocated() / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        return {"peak_active_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}

    def kernels(self, work: Callable[[], Any]) -> Record:
        """Return one call's device seconds by kind of kernel, the largest kernels, idle time."""
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
        # Operators and annotations also have the time of the kernels below them.
        annotation = getattr(event, "is_user_annotation", False)
        if event.device_type != DeviceType.CUDA or annotation:
            return 0.0
        return event.self_device_time_total / 1e6


@torch.no_grad()
def draw_weights(model: nn.Module, std: float, seed: int = 0) -> None:
    """Draw matrices from normal(0, std) on their own device and set vectors to one."""
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


def fed_in(samples: list[Sample]) -> list[int]:
    """Return the tokens of each sequence that go through a model: all but the last."""
    return [s.num_tokens - 1 for s in samples]


def responses(samples: list[Sample]) -> int:
    return sum(len(s.response_ids) for s in samples)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| over |wanted|, as 2-norms in fp64."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
