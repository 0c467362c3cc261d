"""Our rollout engine, and what a rollout takes at least on this machine.

The limit of a workload: in each phase (prefill, decode) its bytes over the bandwidth of a large
read, or its FLOPs over the rate of the fastest of the model's own products with as many rows,
whichever is longer. Sampling, norms and attention's softmax are not counted. Everything is in bf16.
Weights are random, because the time that an engine takes does not depend on them.
"""

from __future__ import annotations

import gc
import heapq
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Record
from setting import Setting, draw_weights
from torch import nn

from opd_titan.data.types import Prompt, Sample
from opd_titan.models.kernels import can_pack
from opd_titan.models.layers import Linear, join
from opd_titan.observability.step_scalars import cached_tokens_read
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.sampler import sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.training.sources import ModelShape

MAX_PREFILL_ROWS = 8192
ITEMSIZE = torch.bfloat16.itemsize


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to sample for each."""

    prompts: list[tuple[int, ...]]
    new_tokens: list[int]

    @classmethod
    def even(cls, count: int, prompt: int, new: int, vocab: int) -> Workload:
        """Return random prompts of one length, with responses of one length."""
        ids = torch.randint(vocab, (count, prompt)).tolist()
        return cls([tuple(row) for row in ids], [new] * count)

    @classmethod
    def nano(cls, count: int, shortest: int, longest: int, vocab: int) -> Workload:
        """Return nano-vllm's bench.py, draw by draw: its 256 requests ask for 133,966 tokens."""
        pick = random.Random(0)
        prompts = [
            tuple(pick.randint(0, 10000) % vocab for _ in range(pick.randint(shortest, longest)))
            for _ in range(count)
        ]
        return cls(prompts, [pick.randint(shortest, longest) for _ in range(count)])

    def batches(self, size: int) -> Iterator[Workload]:
        for i in range(0, len(self.prompts), size):
            yield Workload(self.prompts[i : i + size], self.new_tokens[i : i + size])

    @property
    def longest(self) -> int:
        """Tokens of a sequence that no prompt with its response exceeds."""
        return max(map(len, self.prompts)) + max(self.new_tokens)

    def requests(self) -> list[Request]:
        both = enumerate(zip(self.prompts, self.new_tokens, strict=True))
        return [Request(Prompt(i, "", p), 0, sequence_key(0, i), n) for i, (p, n) in both]


@dataclass
class Answer:
    """Tokens sampled for each prompt, seconds, and what else an engine measures."""

    tokens: list[int]
    seconds: float
    details: dict[str, float] = field(default_factory=dict)


Engine = Callable[[Workload, int], Answer]  # the second argument: sequences at once


@torch.no_grad()
def random_model(shape: ModelShape, device: torch.device) -> nn.Module:
    """Return our decoder in bf16, with its weights laid out as `GeneratorWeights` does."""
    with torch.device("meta"):
        model = shape.build().to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    model.tie_weights()
    packs = can_pack(torch.bfloat16, device)
    for layers in () if packs else model.layers_with_one_input():
        join(layers)
    draw_weights(model, 0, shape.args.init_std)
    for module in model.modules() if packs else ():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.pack(module.weight)
    return model


class Ours:
    """`Generator`.

    Args:
        static: in batches, each as long as its longest response, without continuous batching.

    Attributes:
        steps: of the last call, the time and the number of sequences of each decoding step.
    """

    def __init__(
        self, model: nn.Module, static: bool = False, max_prefill_tokens: int = MAX_PREFILL_ROWS
    ) -> None:
        # It looks for a stop token after each step, as a run does, but no token is one.
        never = {model.args.vocab_size}
        self.generator = Generator(model, never, max_prefill_tokens=max_prefill_tokens)
        self.static = static
        self.steps: list[tuple[float, int]] = []

    def __call__(self, work: Workload, concurrent: int) -> Answer:
        # One limit for all, so that batches and rounds can share one cache.
        params = SamplingParams(max(work.new_tokens))
        self.generator.max_concurrent = concurrent
        self.steps, samples, forwards = [], [], 0
        start = time.perf_counter()
        for batch in work.batches(concurrent) if self.static else (work,):
            if self.static:
                batch = Workload(batch.prompts, [max(batch.new_tokens)] * len(batch.prompts))
            samples += self.generator.generate(batch.requests(), params, self._on_tokens)
            forwards += self.generator.stats.decode_forwards
        seconds = time.perf_counter() - start
        assert all(torch.isfinite(s.student_logprobs).all() for s in samples)
        wanted = zip(samples, work.new_tokens, strict=True)
        details = {"forwards": forwards, "first_token_s": self.steps[0][0] - start}
        return Answer([min(len(s.response_ids), n) for s, n in wanted], seconds, details)

    def _on_tokens(self, number: int) -> None:
        self.steps.append((time.perf_counter(), number))


# -------------------------------------------------------------------- the limit


def measure_limit(s: Setting, args: Any, work: Workload, concurrent: int) -> Record:
    """Return the least seconds of a workload, by phase, by bytes and by FLOPs.

    Prompts, but for the tokens that decoding begins with, are prefilled in as few forwards as they
    fit in; for decoding see `count_forwards`.
    """
    bandwidth = s.bandwidths()["read"]
    both = zip(work.prompts, work.new_tokens, strict=True)
    samples = [Sample(Prompt(i, "", p), 0, [0] * n, "length") for i, (p, n) in enumerate(both)]
    prompts = [len(p) - 1 for p in work.prompts]
    new, forwards = sum(work.new_tokens), count_forwards(work.new_tokens, concurrent)
    first_rows = sum(map(len, work.prompts[:concurrent]))
    rates = {
        "prefill": best_flops(s, args, min(MAX_PREFILL_ROWS, first_rows), head=False),
        "decode": best_flops(s, args, max(1, round(new / forwards)), head=True),
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


def best_flops(s: Setting, args: Any, rows: int, head: bool) -> float:
    """Return the FLOP/s of the fastest of the model's products with that many rows."""
    mixed = args.n_heads * args.head_dim
    shapes = {(args.dim, mixed), (mixed, args.dim), (args.dim, args.ffn_dim)}
    shapes |= {(args.ffn_dim, args.dim)} | ({(args.dim, args.vocab_size)} if head else set())
    return max(2.0 * rows * n * m / s.product_seconds(rows, n, m)[0] for n, m in shapes)


def count_forwards(new_tokens: Sequence[int], concurrent: int) -> int:
    """Return the decoding steps if every sequence that ends makes room for the next one at once."""
    ends: list[int] = []
    for n in new_tokens:
        begin = heapq.heappop(ends) if len(ends) == concurrent else 0
        heapq.heappush(ends, begin + n)
    return max(ends)


def engine_figures(answers: Sequence[Answer], limit: Record) -> Record:
    """Return the medians of some rounds, and their share of the limit."""
    seconds = statistics.median(a.seconds for a in answers)
    tokens = sum(answers[0].tokens)
    found: Record = {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds}
    found["share_of_limit"] = limit["seconds"] / seconds
    for name in answers[0].details:
        found[name] = statistics.median(a.details[name] for a in answers)
    return found


# ------------------------------------------------------------------ stages of gpu.py


def measure_rollout(s: Setting, size: str, workload: str) -> None:
    """Measure our engine with all of a workload at once, and the limit.

    Args:
        workload: "nano", nano-vllm's; or "burst", 128 sequences of 128 tokens and 1,024 new ones.
    """
    shape = s.shape(size)
    lengths = {"nano": (256, 100, 1024), "burst": (128, 128, 1024)}[workload]
    make = Workload.nano if workload == "nano" else Workload.even
    work = make(*((4, 4, 16) if s.miniature else lengths), shape.args.vocab_size)
    limit = measure_limit(s, shape.args, work, len(work.prompts))
    engine = Ours(random_model(shape, s.device))
    for _ in range(2):  # the first one captures graphs
        answer = engine(work, len(work.prompts))
    if answer.tokens != work.new_tokens:
        raise RuntimeError(f"{sum(answer.tokens)} tokens, not {sum(work.new_tokens)}")
    s.emit({"figure": "rollout", **engine_figures([answer], limit), **s.peak_memory()})


def measure_steps(s: Setting, size: str) -> None:
    """Measure a decoding step at several batch sizes, with sequences of one length."""
    shape = s.shape(size)
    args, bandwidth = shape.args, s.bandwidths()["read"]
    context, new, batches = (24, 16, (4, 2, 1)) if s.miniature else (1000, 64, (256, 64, 1))
    prompt, skipped = context - new // 2, new // 8  # the first steps capture graphs
    # Few rounds of prefills, so that sequences are nearly of one length.
    engine = Ours(random_model(shape, s.device), max_prefill_tokens=16384)
    s.reset_memory()
    for batch in batches:  # the largest first: its cache has room for all
        engine(Workload.even(batch, prompt, new, args.vocab_size), batch)
        # The host is one step ahead of the device, so a step lasts from one launch to the next.
        launches = [t for t, n in engine.steps if n == batch][skipped:]
        seconds = statistics.median(b - a for a, b in zip(launches, launches[1:], strict=False))
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
