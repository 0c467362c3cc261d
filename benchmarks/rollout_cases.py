"""The parts of `rollout.py`. Each runs in a process of its own and emits its figures."""

from __future__ import annotations

import argparse
import gc
import heapq
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_setting import GIB, Setting
from qwen3_shapes import hf_config
from rollout_engines import (
    Answer,
    Engine,
    Generate,
    Ours,
    Vllm,
    Workload,
    gsm8k_prompts,
    nano_workload,
    random_model,
)

from opd_titan.models.logits import VocabHead, project
from opd_titan.observability.step_scalars import cached_tokens_read
from opd_titan.rollout.generator import SamplingParams
from opd_titan.rollout.sampler import Sampler
from opd_titan.training.models import ModelShape, inspect_shape

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_PREFILL_ROWS = 8192


@dataclass
class RolloutSetting(Setting):
    """`Setting` for one device by name, in bf16, without a process group.

    Attributes:
        options: of `rollout.py`.
    """

    device_name: str = "cpu"
    options: argparse.Namespace = field(default_factory=argparse.Namespace)

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @cached_property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def write_shape(self, size: str, folder: Path) -> ModelShape:
        """Write the config.json of "small" or of a released size."""
        vocab = getattr(self.options, "vocab", None)
        config = hf_config("0.6B" if size == "small" else size, miniature=self.miniature)
        config |= SMALL if size == "small" else {}
        if vocab:
            config |= {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return inspect_shape("student", str(folder), 1)

    def shape(self, role: str, size: str) -> ModelShape:
        with tempfile.TemporaryDirectory() as folder:
            return self.write_shape(size, Path(folder))


class Run(NamedTuple):
    """An engine with the first `requests` of the workload."""

    engine: str
    requests: int
    concurrent: int

    @property
    def name(self) -> str:
        return f"{self.engine}@{self.concurrent}"


# ----------------------------------------------------------------------- engines


def measure_engines(s: RolloutSetting, size: str, engines: Sequence[str]) -> None:
    """Engines side by side. On a GPU one alone, as nothing else may hold memory meanwhile."""
    o = s.options
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        shape = s.write_shape(size, folder)
        work = make_workload(s, shape.args.vocab_size)
        count = len(work.prompts) if o.setting == "nano" else o.concurrent
        runs = [Run(engine, len(work.prompts), count) for engine in engines]
        if o.setting == "small" and "generate" in engines:
            half = max(1, count // 2)
            runs += [Run(e, half, half) for e in ("ours", "generate") if e in engines]
        floors = measure_floors(s, shape.args, work, runs)
        started: dict[str, Engine] = {}
        # vLLM first: it looks at how much memory is free.
        for engine in sorted(engines, key=lambda e: not e.startswith("vllm")):
            try:
                if engine.startswith("vllm"):
                    found = start_vllm(s, engine, folder, work.longest, count)
                    found = found and stack.enter_context(closing(found))
                elif engine == "generate":
                    found = Generate(folder, s.device)
                else:
                    waits = {"in_waves": engine == "waves", "keeps_rows": engine == "batches"}
                    found = Ours(random_model(shape, s.device), **waits)
            except Exception as error:
                s.emit({"figure": "engine", "engine": engine, "error": str(error)})
                continue
            if found is not None:
                started[engine] = found
        runs = [r for r in runs if r.engine in started]
        compare(s, started, work, runs, floors)


def measure_ours(s: RolloutSetting, size: str, workload: str) -> None:
    """Our engine alone with all of a workload at once, and the floor.

    Args:
        workload: "nano", nano-vllm's; or "burst", 128 sequences of 128 tokens and 1,024 new ones.
    """
    shape = s.shape("student", size)
    vocab = shape.args.vocab_size
    if workload == "nano":
        work = make_nano(s, vocab)
    else:
        count, prompt, new = (4, 8, 12) if s.miniature else (128, 128, 1024)
        ids = torch.randint(vocab, (count, prompt)).tolist()
        work = Workload([tuple(row) for row in ids], [new] * count)
    runs = [Run("ours", len(work.prompts), len(work.prompts))]
    floors = measure_floors(s, shape.args, work, runs)
    compare(s, {"ours": Ours(random_model(shape, s.device))}, work, runs, floors)
    s.emit({"figure": "memory", **s.peak_memory()})


def make_nano(s: RolloutSetting, vocab: int) -> Workload:
    return nano_workload(*((8, 4, 16) if s.miniature else (256, 100, 1024)), vocab)


def make_workload(s: RolloutSetting, vocab: int) -> Workload:
    o = s.options
    if o.setting == "nano":
        return make_nano(s, vocab)
    pick, ragged = random.Random(0), o.setting == "ragged"
    shortest, longest = (o.shortest, o.longest) if ragged else (o.new_tokens, o.new_tokens)
    lengths = [pick.randint(shortest, longest) for _ in range(o.requests)]
    return Workload(gsm8k_prompts(o.requests, vocab, o.data), lengths)


def start_vllm(
    s: RolloutSetting, name: str, folder: Path, longest: int, concurrent: int
) -> Vllm | None:
    """None where there is none."""
    python = s.options.vllm_python
    if python is None and importlib.util.find_spec("vllm"):
        python = sys.executable
    if python is None:
        s.emit({"figure": "skipped", "engine": name, "why": "not importable, no --vllm-python"})
        return None
    log = s.options.out / f"{name}.log"
    engine = Vllm(python, folder, longest, concurrent, log, all_cores=name == "vllm-all-cores")
    s.emit({"figure": "versions", "vllm": engine.version})
    return engine


def compare(
    s: RolloutSetting,
    engines: dict[str, Engine],
    work: Workload,
    runs: list[Run],
    floors: dict[Run, dict[str, float]],
) -> None:
    """Engines take turns, the first round is a warm-up; one that fails is left out from then on."""
    answers: dict[Run, list[Answer]] = {run: [] for run in runs}
    for number in range(-1, s.repeats):
        runs = list(answers)
        turn = max(0, number) % max(1, len(runs))
        for run in runs[turn:] + runs[:turn]:
            part = work.first(run.requests)
            if number < 0 and not s.on_cuda:  # a GPU's graphs are captured as they are needed
                part = Workload(part.prompts, [min(4, n) for n in part.new_tokens])
            try:
                answer = engines[run.engine](part, run.concurrent)
                if answer.tokens != part.new_tokens:
                    raise RuntimeError(f"{sum(answer.tokens)} tokens: not what was asked for")
            except Exception as error:
                s.emit({"figure": "run", "engine": run.name, "error": repr(error)})
                del answers[run]
                continue
            if number >= 0:
                answers[run].append(answer)
                more = {"seconds": answer.seconds, **answer.details}
                s.emit({"figure": "run", "engine": run.name, "round": number, **more})
    rounds = {run: [sum(a.tokens) / a.seconds for a in found] for run, found in answers.items()}
    for run, found in answers.items():
        s.emit({"figure": "engine", **_engine(run, found, rounds[run], floors[run])})
    emit_ratios(s, rounds)


def _engine(
    run: Run, answers: list[Answer], rounds: list[float], floor: dict[str, float]
) -> dict[str, Any]:
    """Medians, and the shares of the floor."""
    seconds = statistics.median(a.seconds for a in answers)
    found: dict[str, Any] = {
        "engine": run.name,
        "requests": run.requests,
        "concurrent": run.concurrent,
        "tokens": sum(answers[0].tokens),
        "tokens_per_s": statistics.median(rounds),
        "rounds": rounds,
        "seconds": seconds,
        "share_of_floor": floor["seconds"] / seconds,
    }
    details = [a.details for a in answers]
    if details[0]:
        for phase in ("prefill_s", "decode_s"):
            found[phase] = statistics.median(d[phase] for d in details)
        found["decode_share_of_floor"] = floor["decode_s"] / found["decode_s"]
        found["decode_share_of_bandwidth"] = floor["decode_bytes_s"] / found["decode_s"]
        found["forwards"] = details[0]["forwards"]
    return found


def emit_ratios(s: RolloutSetting, rounds: dict[Run, list[float]]) -> None:
    """Of ours to every other with as many sequences, and of our largest run to every other."""
    ours = sorted((r for r in rounds if r.engine == "ours"), key=lambda r: -r.concurrent)
    for other in (r for r in rounds if r.engine != "ours"):
        for mine in ours:
            if mine != ours[0] and mine.concurrent != other.concurrent:
                continue
            ratios = [a / b for a, b in zip(rounds[mine], rounds[other], strict=True)]
            row = {"of": mine.name, "to": other.name, "ratio": statistics.median(ratios)}
            s.emit({"figure": "ratio", **row, "rounds": ratios})


# --------------------------------------------------------------------- the floor


def measure_floors(
    s: RolloutSetting, args: Any, work: Workload, runs: Sequence[Run]
) -> dict[Run, dict[str, float]]:
    """Of each run; the same for all engines."""
    bandwidth = measure_bandwidth(s)
    sizes = dict.fromkeys((run.requests, run.concurrent) for run in runs)
    for requests, concurrent in sizes:
        part = work.first(requests)
        floor = measure_floor(s, args, part, concurrent, bandwidth)
        sizes[requests, concurrent] = floor
        tokens = {"prompt_tokens": sum(map(len, part.prompts)), "new_tokens": sum(part.new_tokens)}
        size = {"requests": requests, "concurrent": concurrent}
        s.emit({"figure": "floor", **size, **tokens, "read_gb_per_s": bandwidth / 1e9, **floor})
    gc.collect()
    s.reset_memory()
    return {run: sizes[run.requests, run.concurrent] for run in runs}


def measure_floor(
    s: RolloutSetting, args: Any, work: Workload, concurrent: int, bandwidth: float
) -> dict[str, float]:
    """Least seconds of each phase: by its bytes, or by its FLOPs at the rate of the best product
    with as many rows. Sampling, norms and attention's softmax are not counted.

    Prompts, but for the tokens that go in first when decoding, are prefilled in as few forwards as
    they fit in; for decoding see `count_forwards`.
    """
    samples, prompts = work.samples(), [len(p) - 1 for p in work.prompts]
    new, forwards = sum(work.new_tokens), count_forwards(work.new_tokens, concurrent)
    first_rows = sum(map(len, work.prompts[:concurrent]))
    rates = {
        "prefill": measure_flops(s, args, min(MAX_PREFILL_ROWS, first_rows), head=False),
        "decode": measure_flops(s, args, max(1, round(new / forwards)), head=True),
    }
    itemsize = s.dtype.itemsize
    prefill_flops = args.forward_flops(prompts, 0)
    all_flops = args.forward_flops([sample.num_tokens - 1 for sample in samples], new)
    flops = {"prefill": prefill_flops, "decode": all_flops - prefill_flops}
    layer_bytes = args.decode_bytes(1, 0, itemsize) - itemsize * args.dim * args.vocab_size
    moved = {
        "prefill": -(-sum(prompts) // MAX_PREFILL_ROWS) * layer_bytes,
        "decode": args.decode_bytes(forwards, cached_tokens_read(samples), itemsize),
    }
    found = {}
    for phase, rate in rates.items():
        by_bytes, by_flops = moved[phase] / bandwidth, flops[phase] / rate
        found |= {f"{phase}_s": max(by_bytes, by_flops), f"{phase}_tflops_per_s": rate / 1e12}
        found |= {f"{phase}_bytes_s": by_bytes, f"{phase}_flops_s": by_flops}
    return {"seconds": found["prefill_s"] + found["decode_s"], **found}


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


def count_forwards(new_tokens: Sequence[int], concurrent: int) -> int:
    """Decoding steps where every sequence that ends makes room for the next one at once."""
    ends: list[int] = []
    for n in new_tokens:
        begin = heapq.heappop(ends) if len(ends) == concurrent else 0
        heapq.heappush(ends, begin + n)
    return max(ends)


# ------------------------------------------------------------- one decoding step


def measure_curve(
    s: RolloutSetting,
    size: str,
    batches: Sequence[int] = BATCHES,
    context: int = 1000,
    graphs: bool = True,
    stop_tokens: bool = True,
) -> None:
    """Milliseconds of a decoding step at every batch size, with sequences of one length.

    Args:
        graphs: replay CUDA graphs, where they are.
        stop_tokens: each step looks for them, as a real run does.
    """
    shape = s.shape("student", size)
    args, bandwidth = shape.args, measure_bandwidth(s)
    new = 64
    if s.miniature:
        batches, context, new = (1, 2, 4), 24, 16
    prompt, skipped = context - new // 2, new // 8  # the first steps capture
    model = random_model(shape, s.device)
    # In few rounds of prefills, so that sequences are nearly of one length.
    engine = Ours(model, max_prefill_tokens=16384, cuda_graphs=graphs, checks_stop=stop_tokens)
    s.reset_memory()
    for batch in sorted(batches, reverse=True):  # the largest first: its cache has room for all
        prompts = [tuple(row) for row in torch.randint(args.vocab_size, (batch, prompt)).tolist()]
        engine(Workload(prompts, [new] * batch), batch)
        steps = [t for kind, n, t in engine.intervals[:-1] if (kind, n) == ("decode", batch)]
        steps = steps[skipped:]
        seconds = statistics.median(steps)
        middle = prompt + (skipped + new) / 2  # tokens attended to, on average
        floor = args.decode_bytes(1, round(batch * middle), s.dtype.itemsize) / bandwidth
        row = {
            "batch": batch,
            "context": context,
            "ms_per_step": 1e3 * seconds,
            "tokens_per_s": batch / seconds,
            "steps": len(steps),
            "floor_ms": 1e3 * floor,
            "share_of_bandwidth": floor / seconds,
        }
        s.emit({"figure": "decoding step", **row, **s.peak_memory()})


@torch.no_grad()
def measure_sampler(s: RolloutSetting, size: str) -> None:
    """The vocabulary projection alone, and with the draw, by number of rows."""
    args = s.shape("student", size).args
    weight = torch.randn(args.vocab_size, args.dim, device=s.device).mul_(0.02).to(s.dtype)
    batches = (1, 2, 4, 8, 16, 32, 64, 256) if s.on_cuda else (1, 8, 16, 32)
    sampler = Sampler(VocabHead.of(weight), SamplingParams(1), max(batches))
    floor = weight.numel() * weight.element_size() / measure_bandwidth(s)
    for rows in batches:
        hidden = torch.randn(rows, args.dim, device=s.device, dtype=s.dtype)
        uniforms = torch.rand(rows, dtype=torch.float64, device=s.device)
        whole = s.seconds(lambda h=hidden, u=uniforms: sampler(h, u), inner=4, repeats=5)["min_s"]
        alone = s.seconds(lambda h=hidden: project(h, weight), inner=4, repeats=5)["min_s"]
        row = {"project_ms": 1e3 * alone, "project_and_draw_ms": 1e3 * whole}
        s.emit({"figure": "sampler", "rows": rows, **row, "floor_ms": 1e3 * floor})
