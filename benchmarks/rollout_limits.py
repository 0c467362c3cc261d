"""What a rollout takes at least on this machine, and our engine beside that.

The limit of a workload: in each phase (prefill, decode) its bytes over the bandwidth of a large
read, or its FLOPs over the rate of the fastest of the model's own products with as many rows,
whichever is longer. Sampling, norms and attention's softmax are not counted. Both rates are
measured in the same process. Everything is in bf16.
"""

from __future__ import annotations

import gc
import heapq
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from gpu_setting import GIB, Setting
from harness import Record
from rollout_engines import Answer, Ours, Workload, nano_workload, random_model

from opd_titan.observability.step_scalars import cached_tokens_read

MAX_PREFILL_ROWS = 8192
ITEMSIZE = torch.bfloat16.itemsize


def measure_limit(s: Setting, args: Any, work: Workload, concurrent: int) -> Record:
    """Return the least seconds of a workload, by phase, by bytes and by FLOPs.

    Prompts, but for the tokens that decoding begins with, are prefilled in as few forwards as they
    fit in; for decoding see `count_forwards`.
    """
    bandwidth = measure_bandwidth(s)
    samples, prompts = work.samples(), [len(p) - 1 for p in work.prompts]
    new, forwards = sum(work.new_tokens), count_forwards(work.new_tokens, concurrent)
    first_rows = sum(map(len, work.prompts[:concurrent]))
    rates = {
        "prefill": measure_flops(s, args, min(MAX_PREFILL_ROWS, first_rows), head=False),
        "decode": measure_flops(s, args, max(1, round(new / forwards)), head=True),
    }
    prefill_flops = args.forward_flops(prompts, 0)
    all_flops = args.forward_flops([sample.num_tokens - 1 for sample in samples], new)
    flops = {"prefill": prefill_flops, "decode": all_flops - prefill_flops}
    layer_bytes = args.decode_bytes(1, 0, ITEMSIZE) - ITEMSIZE * args.dim * args.vocab_size
    moved = {
        "prefill": -(-sum(prompts) // MAX_PREFILL_ROWS) * layer_bytes,
        "decode": args.decode_bytes(forwards, cached_tokens_read(samples), ITEMSIZE),
    }
    found: Record = {"read_gb_per_s": bandwidth / 1e9}
    for phase, rate in rates.items():
        by_bytes, by_flops = moved[phase] / bandwidth, flops[phase] / rate
        found |= {f"{phase}_s": max(by_bytes, by_flops), f"{phase}_tflops_per_s": rate / 1e12}
        found |= {f"{phase}_bytes_s": by_bytes, f"{phase}_flops_s": by_flops}
    found["seconds"] = found["prefill_s"] + found["decode_s"]
    tokens = {"prompt_tokens": sum(map(len, work.prompts)), "new_tokens": new}
    s.emit({"figure": "limit", "requests": len(prompts), **tokens, **found})
    gc.collect()
    s.reset_memory()
    return found


def measure_bandwidth(s: Setting) -> float:
    """Return bytes/s: the best of several ways to read (and one to copy) what no cache holds."""
    num_bytes = 4 * GIB if s.on_cuda else GIB // 16 if s.miniature else GIB
    x = torch.ones(num_bytes // 4, device=s.device)
    # A copy moves as much again, so half of it takes as long.
    source, target = x.chunk(2)
    ways = (x.sum, x.amax, lambda: torch.dot(source, target), lambda: target.copy_(source))
    return num_bytes / min(s.seconds(way, repeats=5)["min_s"] for way in ways)


def measure_flops(s: Setting, args: Any, rows: int, head: bool) -> float:
    """Return the FLOP/s of the fastest of the model's products with that many rows."""
    mixed = args.n_heads * args.head_dim
    shapes = {(args.dim, mixed), (mixed, args.dim), (args.dim, args.ffn_dim)}
    shapes |= {(args.ffn_dim, args.dim)} | ({(args.dim, args.vocab_size)} if head else set())
    best = 0.0
    for inside, outside in shapes:
        x = torch.randn(rows, inside, device=s.device, dtype=torch.bfloat16)
        w = torch.randn(outside, inside, device=s.device, dtype=torch.bfloat16)
        seconds = s.seconds(lambda x=x, w=w: x @ w.t(), inner=4, repeats=5)["min_s"]
        best = max(best, 2.0 * rows * inside * outside / seconds)
    return best


def count_forwards(new_tokens: Sequence[int], concurrent: int) -> int:
    """Return the decoding steps if every sequence that ends makes room for the next one at once."""
    ends: list[int] = []
    for n in new_tokens:
        begin = heapq.heappop(ends) if len(ends) == concurrent else 0
        heapq.heappush(ends, begin + n)
    return max(ends)


def engine_figures(answers: Sequence[Answer], limit: Record) -> Record:
    """Return the medians of some rounds, and their shares of the limit."""
    seconds = statistics.median(a.seconds for a in answers)
    tokens = sum(answers[0].tokens)
    found: Record = {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds}
    found["share_of_limit"] = limit["seconds"] / seconds
    for name in answers[0].details:
        found[name] = statistics.median(a.details[name] for a in answers)
    return found


# ------------------------------------------------------------------ stages of gpu.py


def measure_ours(s: Setting, size: str, workload: str) -> None:
    """Measure our engine with all of a workload at once, and the limit.

    Args:
        workload: "nano", nano-vllm's; or "burst", 128 sequences of 128 tokens and 1,024 new ones.
    """
    shape = s.shape("student", size)
    if workload == "nano":
        lengths = (8, 4, 16) if s.miniature else (256, 100, 1024)
        work = nano_workload(*lengths, shape.args.vocab_size)
    else:
        count, prompt, new = (4, 8, 12) if s.miniature else (128, 128, 1024)
        ids = torch.randint(shape.args.vocab_size, (count, prompt)).tolist()
        work = Workload([tuple(row) for row in ids], [new] * count)
    limit = measure_limit(s, shape.args, work, len(work.prompts))
    engine = Ours(random_model(shape, s.device))
    for _ in range(2):  # the first one captures graphs
        answer = engine(work, len(work.prompts))
    if answer.tokens != work.new_tokens:
        raise RuntimeError(f"{sum(answer.tokens)} tokens, not {sum(work.new_tokens)}")
    s.emit({"figure": "rollout", **engine_figures([answer], limit), **s.peak_memory()})


def measure_steps(s: Setting, size: str) -> None:
    """Measure a decoding step at several batch sizes, with sequences of one length."""
    shape = s.shape("student", size)
    args, bandwidth = shape.args, measure_bandwidth(s)
    context, new, batches = (24, 16, (4, 2, 1)) if s.miniature else (1000, 64, (256, 64, 1))
    prompt, skipped = context - new // 2, new // 8  # the first steps capture graphs
    # Few rounds of prefills, so that sequences are nearly of one length.
    engine = Ours(random_model(shape, s.device), checks_stop=True, max_prefill_tokens=16384)
    s.reset_memory()
    for batch in batches:  # the largest first: its cache has room for all
        prompts = [tuple(row) for row in torch.randint(args.vocab_size, (batch, prompt)).tolist()]
        engine(Workload(prompts, [new] * batch), batch)
        steps = [t for kind, n, t in engine.intervals[:-1] if (kind, n) == ("decode", batch)]
        seconds = statistics.median(steps[skipped:])
        middle = prompt + (skipped + new) / 2  # tokens attended to, on average
        floor = args.decode_bytes(1, round(batch * middle), ITEMSIZE) / bandwidth
        row = {
            "batch": batch,
            "context": context,
            "ms_per_step": 1e3 * seconds,
            "tokens_per_s": batch / seconds,
            "floor_ms": 1e3 * floor,
            "share_of_bandwidth": floor / seconds,
        }
        s.emit({"figure": "decoding step", **row, **s.peak_memory()})
