"""The least time that a workload can take on this machine, from what is measured here and now.

A phase takes at least as long as its bytes take through the memory and its FLOPs through the
matrix units, whichever is longer. Sampling, norms and attention's softmax are not counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rollout_engines import Workload
from scale_setting import GIB, Setting

from opd_titan.observability.step_scalars import cached_tokens_read

MAX_PREFILL_ROWS = 8192


class Machine(NamedTuple):
    """Bytes/s that a large read reaches, and FLOP/s of the best product in each phase."""

    bandwidth: float
    prefill_flops: float
    decode_flops: float

    def figures(self) -> dict[str, float]:
        return {
            "read_gb_per_s": self.bandwidth / 1e9,
            "prefill_tflops_per_s": self.prefill_flops / 1e12,
            "decode_tflops_per_s": self.decode_flops / 1e12,
        }


def measure_bandwidth(s: Setting) -> float:
    """Bytes/s: the best of several ways to read (and one to copy) what no cache holds."""
    num_bytes = 4 * GIB if s.on_cuda else GIB // 16 if s.miniature else GIB
    x = torch.ones(num_bytes // 4, device=s.device)
    # A copy moves as much again, so half of it is as long.
    source, target = x.chunk(2)
    ways = (x.sum, x.amax, lambda: torch.dot(source, target), lambda: target.copy_(source))
    return num_bytes / min(s.seconds(way, repeats=5)["min_s"] for way in ways)


def measure_flops(s: Setting, args: Any, rows: int, head: bool) -> float:
    """FLOP/s of the fastest of the model's products with so many rows."""
    mixed = args.n_heads * args.head_dim
    shapes = {(args.dim, mixed), (mixed, args.dim), (args.dim, args.ffn_dim)}
    shapes |= {(args.ffn_dim, args.dim)} | ({(args.dim, args.vocab_size)} if head else set())
    best = 0.0
    for inside, outside in shapes:
        x = torch.randn(rows, inside, device=s.device, dtype=s.dtype)
        w = torch.randn(outside, inside, device=s.device, dtype=s.dtype)
        seconds = s.seconds(lambda x=x, w=w: x @ w.t(), inner=4, repeats=5)["min_s"]
        best = max(best, 2.0 * rows * inside * outside / seconds)
    return best


def measure_machine(
    s: Setting, args: Any, work: Workload, concurrent: int, bandwidth: float
) -> Machine:
    """Its products have as many rows as the phases of this workload on average."""
    forwards = count_forwards(work.new_tokens, concurrent)
    prompt_rows = min(MAX_PREFILL_ROWS, sum(map(len, work.prompts[:concurrent])))
    decode_rows = max(1, round(sum(work.new_tokens) / forwards))
    return Machine(
        bandwidth,
        measure_flops(s, args, prompt_rows, head=False),
        measure_flops(s, args, decode_rows, head=True),
    )


def count_forwards(new_tokens: Sequence[int], concurrent: int) -> int:
    """Decoding steps where every sequence that ends makes room for the next one at once."""
    ends: list[int] = []
    for n in new_tokens:
        begin = heapq.heappop(ends) if len(ends) == concurrent else 0
        heapq.heappush(ends, begin + n)
    return max(ends)


class Phase(NamedTuple):
    bytes: float
    flops: float
    bytes_s: float
    flops_s: float

    @property
    def seconds(self) -> float:
        return max(self.bytes_s, self.flops_s)


class Floor(NamedTuple):
    prefill: Phase
    decode: Phase

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"seconds": self.seconds}
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            found |= {f"{name}_{key}": value for key, value in phase._asdict().items()}
        return found


def floor_of(machine: Machine, args: Any, work: Workload, concurrent: int, itemsize: int) -> Floor:
    """Prompts, but for the tokens that go in first when decoding, are prefilled in as few forwards
    as they fit in; for decoding see `count_forwards`."""
    samples, prompts = work.samples(), [len(p) - 1 for p in work.prompts]
    fed_in = [s.num_tokens - 1 for s in samples]
    forwards = count_forwards(work.new_tokens, concurrent)
    flops = args.forward_flops(prompts, 0)
    head_bytes = itemsize * args.dim * args.vocab_size
    layer_bytes = args.decode_bytes(1, 0, itemsize) - head_bytes
    moved = -(-sum(prompts) // MAX_PREFILL_ROWS) * layer_bytes
    prefill = Phase(moved, flops, moved / machine.bandwidth, flops / machine.prefill_flops)
    flops = args.forward_flops(fed_in, sum(work.new_tokens)) - flops
    moved = args.decode_bytes(forwards, cached_tokens_read(samples), itemsize)
    decode = Phase(moved, flops, moved / machine.bandwidth, flops / machine.decode_flops)
    return Floor(prefill, decode)
