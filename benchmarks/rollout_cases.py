"""The parts of `rollout.py`. Each runs in a process of its own and emits its figures."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from qwen3_shapes import write_config
from rollout_engines import (
    Answer,
    Engine,
    Generate,
    Ours,
    RunnerClock,
    Vllm,
    Workload,
    gsm8k_prompts,
    load_model,
    model_config,
    nano_workload,
    ragged_lengths,
    random_model,
    write_model,
)
from rollout_floor import Floor, floor_of, measure_bandwidth, measure_machine
from scale_setting import Setting

from opd_titan.build import inspect_shape
from opd_titan.models.logits import VocabHead, project
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.rollout.generator import SamplingParams
from opd_titan.rollout.sampler import Sampler

# Ours over the other, at the largest number of concurrent sequences.
GOALS = {
    "small": {"vllm@32": 1.5, "vllm-all-cores@32": 1.5, "generate@16": 6.0},
    "0.6B": {"vllm@16": 1.2, "vllm-all-cores@16": 1.2, "generate@16": 3.0},
    "ragged": {"waves@16": 1.6},
}
# CUDA graphs, and whether each step looks for stop tokens, as a real run does.
CURVES = {
    "graphs": {"cuda_graphs": True, "checks_stop": False},
    "eager": {"cuda_graphs": False, "checks_stop": False},
    "graphs, stop tokens": {"cuda_graphs": True, "checks_stop": True},
}


@dataclass
class RolloutSetting(Setting):
    """`Setting` for one device by name, in bf16, without a process group."""

    device_name: str = "cpu"
    options: argparse.Namespace | None = None

    def start(self) -> None:
        torch.manual_seed(0)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


class Run(NamedTuple):
    """An engine with the first `requests` of the workload."""

    engine: str
    requests: int
    concurrent: int

    @property
    def name(self) -> str:
        return f"{self.engine}@{self.concurrent}"


# ------------------------------------------------------------- engines side by side


def measure_side_by_side(s: RolloutSetting) -> None:
    """The settings small, 0.6B and ragged."""
    o = s.options
    config = model_config(o.shape, o.vocab)
    prompts = gsm8k_prompts(o.requests, config["vocab_size"], o.data)
    lengths = [o.new_tokens] * o.requests
    if o.setting == "ragged":
        lengths = ragged_lengths(o.requests, o.shortest, o.longest)
    work = Workload(prompts, lengths)
    runs = [Run(engine, o.requests, o.concurrent) for engine in o.engines]
    if o.setting == "small" and "generate" in o.engines:
        half = max(1, o.concurrent // 2)
        runs += [Run(e, half, half) for e in ("ours", "generate") if e in o.engines]
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.model or Path(temporary) / "model"
        write_model(folder, config)
        args = inspect_shape("student", str(folder), 1).args
        floors = measure_floors(s, args, work, runs)
        with start_engines(s, folder, work) as engines:
            runs = [r for r in runs if r.engine in engines]
            compare(s, engines, work, runs, floors, GOALS.get(o.setting, {}))


@contextmanager
def start_engines(s: RolloutSetting, folder: Path, work: Workload) -> Iterator[dict[str, Engine]]:
    """Those of `--engines` that start. vLLM first: it looks at how much memory is free."""
    engines: dict[str, Engine] = {}
    wanted = s.options.engines
    model = None
    try:
        for name in sorted(wanted, key=lambda name: not name.startswith("vllm")):
            try:
                if name.startswith("vllm"):
                    found = start_vllm(s, name, folder, work.longest, s.options.concurrent)
                elif name == "generate":
                    found = Generate(_hf_model(folder))
                else:
                    model = load_model(folder, s.device) if model is None else model
                    found = Ours(model, in_waves=name == "waves")
            except Exception as error:
                s.emit({"figure": "engine", "engine": name, "error": str(error)})
                continue
            if found is not None:
                engines[name] = found
        yield engines
    finally:
        for engine in engines.values():
            if isinstance(engine, Vllm):
                engine.close()


def vllm_python(s: RolloutSetting, name: str) -> str | None:
    """The interpreter that imports vllm, if there is one."""
    if s.options.vllm_python:
        return s.options.vllm_python
    if importlib.util.find_spec("vllm"):
        return sys.executable
    s.emit({"figure": "skipped", "engine": name, "why": "not importable, no --vllm-python"})
    return None


def start_vllm(
    s: RolloutSetting,
    name: str,
    folder: Path,
    longest: int,
    concurrent: int,
    load_format: str = "auto",
) -> Vllm | None:
    """None where there is none."""
    python, log = vllm_python(s, name), s.options.out / f"{name}.log"
    if python is None:
        return None
    all_cores = name == "vllm-all-cores"
    engine = Vllm(python, folder, longest, concurrent, log, load_format, all_cores)
    s.emit({"figure": "versions", "vllm": engine.version})
    return engine


def _hf_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def measure_floors(
    s: RolloutSetting, args: Any, work: Workload, runs: Sequence[Run]
) -> dict[Run, Floor]:
    """Of each run; the same for all engines."""
    found: dict[tuple[int, int], Floor] = {}
    bandwidth = measure_bandwidth(s)
    for _, requests, concurrent in runs:
        if (requests, concurrent) in found:
            continue
        part = work.first(requests)
        machine = measure_machine(s, args, part, concurrent, bandwidth)
        floor = floor_of(machine, args, part, concurrent, s.dtype.itemsize)
        size = {"requests": requests, "concurrent": concurrent}
        tokens = {
            "prompt_tokens": sum(map(len, part.prompts)),
            "new_tokens": sum(part.new_tokens),
        }
        figures = {**machine.figures(), **floor.figures()}
        s.emit({"figure": "floor", **size, **tokens, **figures})
        found[requests, concurrent] = floor
    gc.collect()
    s.reset_memory()
    return {run: found[run.requests, run.concurrent] for run in runs}


def compare(
    s: RolloutSetting,
    engines: dict[str, Engine],
    work: Workload,
    runs: list[Run],
    floors: dict[Run, Floor],
    goals: dict[str, float],
) -> None:
    """Engines take turns; an engine that fails is left out from then on."""
    answers: dict[Run, list[Answer]] = {run: [] for run in runs}
    for number in range(-1, s.repeats):
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
                answers.pop(run, None)
                continue
            if number >= 0 and run in answers:
                answers[run].append(answer)
                s.emit({"figure": "run", "engine": run.name, "round": number, **_rate(answer)})
        runs = [run for run in runs if run in answers]
    for run in runs:
        s.emit({"figure": "engine", **_engine(run, answers[run], floors[run])})
    emit_ratios(s, answers, goals)


def _rate(answer: Answer) -> dict[str, Any]:
    tokens = sum(answer.tokens)
    rate = {"tokens": tokens, "seconds": answer.seconds, "tokens_per_s": tokens / answer.seconds}
    return {**rate, **answer.details}


def _engine(run: Run, answers: list[Answer], floor: Floor) -> dict[str, Any]:
    """Medians, and the shares of the floor."""
    rates = [_rate(a) for a in answers]
    seconds = statistics.median(a.seconds for a in answers)
    found: dict[str, Any] = {
        "engine": run.name,
        "requests": run.requests,
        "concurrent": run.concurrent,
        "tokens": rates[0]["tokens"],
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rates),
        "rounds": [r["tokens_per_s"] for r in rates],
        "seconds": seconds,
        "floor_s": floor.seconds,
        "share_of_floor": floor.seconds / seconds,
    }
    for phase in ("prefill", "decode"):
        if all(f"{phase}_s" in r for r in rates):
            took = statistics.median(r[f"{phase}_s"] for r in rates)
            found[f"{phase}_s"] = took
            found[f"{phase}_share_of_floor"] = getattr(floor, phase).seconds / took
    if "decode_s" in found:
        found["decode_share_of_bandwidth"] = floor.decode.bytes_s / found["decode_s"]
        found["forwards"] = rates[0]["forwards"]
    return found


def emit_ratios(
    s: RolloutSetting, answers: dict[Run, list[Answer]], goals: dict[str, float]
) -> None:
    """Of ours to every other with as many sequences, and of our largest run to every other."""
    ours = sorted((r for r in answers if r.engine == "ours"), key=lambda r: -r.concurrent)
    for other in (r for r in answers if r.engine != "ours"):
        for mine in ours:
            if mine != ours[0] and mine.concurrent != other.concurrent:
                continue
            pairs = zip(answers[mine], answers[other], strict=True)
            ratios = [_rate(a)["tokens_per_s"] / _rate(b)["tokens_per_s"] for a, b in pairs]
            row = {"of": mine.name, "to": other.name, "ratio": statistics.median(ratios)}
            goal = {"goal": goals[other.name]} if mine == ours[0] and other.name in goals else {}
            s.emit({"figure": "ratio", **row, "rounds": ratios, **goal})


# ------------------------------------------------------------------------ a GPU


def measure_nano(s: RolloutSetting, size: str, engine: str = "ours") -> None:
    """nano-vllm's workload through one engine; nothing else holds memory meanwhile."""
    if engine == "vllm" and vllm_python(s, engine) is None:
        return
    shape = s.shape("student", size)
    limits = (8, 4, 16) if s.miniature else (256, 100, 1024)
    work = nano_workload(*limits, shape.args.vocab_size)
    run = Run(engine, len(work.prompts), len(work.prompts))
    floors = measure_floors(s, shape.args, work, [run])
    with tempfile.TemporaryDirectory() as folder:
        if engine == "vllm":
            write_config(size, Path(folder), miniature=s.miniature)
            found = start_vllm(s, engine, Path(folder), work.longest, run.concurrent, "dummy")
        elif engine == "generate":
            found = Generate(_random_hf_model(s, size, Path(folder)))
        else:
            found = Ours(random_model(shape, s.device))
        try:
            compare(s, {engine: found}, work, [run], floors, {})
        finally:
            if engine == "vllm":
                found.close()
    if engine != "vllm":
        s.emit({"figure": "memory", **s.peak_memory()})


def _random_hf_model(s: RolloutSetting, size: str, folder: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write_config(size, folder, miniature=s.miniature))
    with torch.device(s.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure_curve(s: RolloutSetting, size: str, mode: str) -> None:
    """A decoding step at every batch size, where sequences are 512 tokens long."""
    shape = s.shape("student", size)
    args, bandwidth = shape.args, measure_bandwidth(s)
    context, new = (24, 16) if s.miniature else (512, 64)
    batches = (1, 2, 4) if s.miniature else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    prompt = context - new // 2
    # All prompts in one prefill, so that all sequences are of one length.
    engine = Ours(
        random_model(shape, s.device), max_prefill_tokens=prompt * max(batches), **CURVES[mode]
    )
    s.reset_memory()
    s.emit({"figure": "bandwidth", "read_gb_per_s": bandwidth / 1e9})
    for batch in reversed(batches):  # the largest first: its cache has room for all
        prompts = [tuple(row) for row in torch.randint(args.vocab_size, (batch, prompt)).tolist()]
        engine(Workload(prompts, [new] * batch), batch)
        steps = _step_seconds(engine.clock, batch)[new // 8 :]
        seconds = statistics.median(steps)
        middle = prompt + (new // 8 + new) / 2  # tokens attended to, on average
        moved = args.decode_bytes(1, round(batch * middle), s.dtype.itemsize)
        row = {
            "batch": batch,
            "ms_per_step": 1e3 * seconds,
            "tokens_per_s": batch / seconds,
            "steps": len(steps),
            "fastest_ms": 1e3 * min(steps),
            "floor_ms": 1e3 * moved / bandwidth,
            "share_of_bandwidth": moved / bandwidth / seconds,
        }
        s.emit({"figure": "step", **row, **s.peak_memory()})


def _step_seconds(clock: RunnerClock, batch: int) -> list[float]:
    return [t for kind, n, t in clock.intervals()[:-1] if kind == "decode" and n == batch]


# ------------------------------------------------------------------ the sampler


@torch.no_grad()
def measure_sampler(s: RolloutSetting, size: str) -> None:
    """The vocabulary projection alone, and with the draw, by number of rows."""
    if size == "small" or s.options.vocab:
        args = Qwen3Args.from_hf_config(model_config(size, s.options.vocab), size)
    else:
        args = s.shape("student", size).args
    weight = torch.randn(args.vocab_size, args.dim, device=s.device).mul_(0.02).to(s.dtype)
    batches = (1, 2, 4, 8, 16, 32, 64, 256) if s.on_cuda else (1, 8, 16, 32)
    sampler = Sampler(VocabHead.of(weight), SamplingParams(1), max(batches))
    bandwidth = measure_bandwidth(s)
    for rows in batches:
        hidden = torch.randn(rows, args.dim, device=s.device, dtype=s.dtype)
        uniforms = torch.rand(rows, dtype=torch.float64, device=s.device)
        whole = s.seconds(lambda h=hidden, u=uniforms: sampler(h, u), inner=4, repeats=5)["min_s"]
        alone = s.seconds(lambda h=hidden: project(h, weight), inner=4, repeats=5)["min_s"]
        moved = weight.numel() * weight.element_size()
        row = {
            "rows": rows,
            "project_ms": 1e3 * alone,
            "project_and_draw_ms": 1e3 * whole,
            "project_gflops_per_s": 2.0 * rows * weight.numel() / alone / 1e9,
            "floor_ms": 1e3 * moved / bandwidth,
        }
        s.emit({"figure": "sampler", **row})
