"""Does the update see what the rollout engine samples? With CUDA graphs and without."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_setting import Setting
from gpu_update import recipe, rule
from harness import REPO, Record
from torch import Tensor, nn

from opd_titan.config import JobConfig
from opd_titan.config.resolve import ModelSpec
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import forward_backward
from opd_titan.distributed.sharding import resharding
from opd_titan.models.kernels.paged import choose_path
from opd_titan.models.logits import Distribution
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.sampler import SamplingParams, sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.models import load_model
from opd_titan.training.self_check import TOLERANCE
from opd_titan.training.sources import inspect_model

DEBUG = REPO / "assets" / "debug"
# Around the ends of pages of 64 and of 256 tokens; the samples of a prompt share its pages.
LENGTHS = (3, 63, 64, 65, 40, 255, 256, 257, 600, 20)
NEW_TOKENS = (70, 30, 80, 60, 90, 20, 50, 64, 33, 81)
CONCURRENT = 6


class _Student:
    """A model and the generator's copy of it, as the trainer has them."""

    def __init__(self, s: Setting, model: nn.Module, build: Callable[[], nn.Module]) -> None:
        self.s, self.model = s, model
        self.weights = GeneratorWeights(model, build, s.dtype, s.device)
        self.weights.sync()

    @classmethod
    def random(cls, s: Setting, size: str) -> _Student:
        shape = s.shape("student", size)
        build = partial(shape.build_share, s.world.tp, False)
        return cls(s, s.model(shape, recipe()), build)

    def check(self, samples: Sequence[Sample], figure: str, ok: bool = True, **more: Any) -> None:
        """Emit |log-prob at rollout - log-prob by the packed forward|, and whether it is small."""
        plan = plan_minibatches(list(samples), 1, max(self.s.budgets), self.s.world.dp)
        scored = score(self.model, plan, Distribution(), self.s.world)
        gap = _gap(torch.cat([(sample.student_logprobs - v).abs() for sample, v in scored]))
        good = ok and gap["gap_max"] <= TOLERANCE[self.s.dtype]
        self.s.emit({"figure": figure, **more, **gap, **self.s.peak_memory(), "ok": good})


def _gap(gaps: Tensor) -> Record:
    mean, largest = gaps.double().mean().item(), gaps.max().item()
    return {"tokens": gaps.numel(), "gap_mean": mean, "gap_max": largest}


def _equal(found: Sequence[Sample], wanted: Sequence[Sample]) -> float:
    """Return the share of equal responses. Products of other shapes round otherwise."""
    pairs = zip(found, wanted, strict=True)
    return statistics.mean(a.response_ids == b.response_ids for a, b in pairs)


def check_engine(s: Setting, size: str) -> None:
    """Check the engine with graphs and without, twice, and after weights have changed in place."""
    student = _Student.random(s, size)
    vocab = student.weights.model.args.vocab_size
    requests = _requests(vocab, 8 if s.miniature else 1)
    # Random weights draw nearly evenly, so that with these some responses end early.
    eos = set(range(vocab // 200))
    params = SamplingParams(max(NEW_TOKENS))
    first: dict[bool, list[Sample]] = {}
    for graphs in (False, True):
        generator = Generator(student.weights.model, eos, CONCURRENT)
        generator.use_cuda_graphs = graphs
        first[graphs] = generator.generate(requests, params)
        s.synchronize()
        start = time.perf_counter()
        again = generator.generate(requests, params)
        s.synchronize()
        captured = sorted(generator._runner._graphs) if generator._runner else []
        found = {
            "graphs": graphs,
            "path": str(choose_path(generator.model.args.head_dim, s.dtype, s.device)),
            "captured": captured,
            "same_twice": _equal(first[graphs], again) == 1.0,
            "same_as_without": _equal(first[graphs], first[False]),
            "seconds": time.perf_counter() - start,
        }
        good = found["same_twice"] and bool(captured or not (graphs and s.on_cuda))
        student.check(first[graphs], "engine", good, **found)
    # Graphs read weights where they are: after a change in place, the new ones.
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.neg_()
    student.weights.mark_stale()
    student.weights.sync()
    samples = generator.generate(requests, params)
    same = _equal(samples, first[True])
    student.check(samples, "engine, weights changed in place", same < 1.0, same_as_before=same)
    generator.release()
    gc.collect()
    s.reset_memory()
    _check_failed_capture(student, eos, requests, params)


def _requests(vocab: int, shorter: int) -> list[Request]:
    found = []
    for i, (length, new) in enumerate(zip(LENGTHS, NEW_TOKENS, strict=True)):
        ids = torch.randint(vocab, (max(2, length // shorter),)).tolist()
        prompt, new = Prompt(i, "", tuple(ids)), max(2, new // shorter)
        found += [Request(prompt, j, sequence_key(0, i, j), new) for j in range(1 + i % 2)]
    return found


def _check_failed_capture(
    student: _Student, eos: set[int], requests: Sequence[Request], params: SamplingParams
) -> None:
    """A step that waits for the device cannot be captured: the rollout goes on without graphs."""

    def wait(module: nn.Module, inputs: Any, hidden_ND: Tensor) -> None:
        hidden_ND[0, 0].item()

    generator = Generator(student.weights.model, eos, CONCURRENT)
    hook = student.weights.model.register_forward_hook(wait)
    try:
        samples = generator.generate(requests, params)
    finally:
        hook.remove()
    student.check(samples, "engine, capture fails")


# ---------------------------------------------------------- rollout against update


def measure_gap(s: Setting) -> None:
    """Measure |log-prob at rollout - log-prob in the update| of random and of trained weights."""
    student = _Student.random(s, "0.6B")
    prompts = s.prompts(s.step_sequences, student.weights.model.args.vocab_size)
    params = SamplingParams(min(256, s.step_new_tokens), ignore_eos=True)
    _emit_gap(student, "0.6B, random weights", prompts, params, {0})
    del student
    gc.collect()
    source = inspect_model(ModelSpec("student", str(DEBUG / "student"), "student.hf_path"), 1)
    model = load_model(s.job(JobConfig()), source, s.world)
    student = _Student(s, model, partial(source.build_share, s.world.tp, False))
    with (DEBUG / "data" / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(4 * s.step_sequences)]
    texts = [f"{row['question']}\n" for row in rows]
    prompts = [Prompt(i, t, tuple(source.tokenizer.encode(t))) for i, t in enumerate(texts)]
    _emit_gap(student, "debug student", prompts, SamplingParams(32), source.eos_ids)


def _emit_gap(
    student: _Student,
    name: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    eos: set[int],
) -> None:
    s, generator = student.s, Generator(student.weights.model, eos)
    requests = [Request(p, 0, sequence_key(0, p.index)) for p in prompts]
    samples = generator.generate(requests, params)
    generator.release()
    (update,) = plan_minibatches(samples, 1, max(s.budgets), s.world.dp)
    r = rule(recipe(objective="sft"))
    gaps = []
    with resharding(student.model):
        for microbatch in update.microbatches:
            stats, rollout_R = forward_backward(
                student.model, microbatch, update.response_tokens, r, s.world
            )
            gaps.append((stats.logprob_R - rollout_R).abs().cpu())
    student.model.zero_grad(set_to_none=True)
    s.emit({"figure": "gap", "model": name, **_gap(torch.cat(gaps))})
