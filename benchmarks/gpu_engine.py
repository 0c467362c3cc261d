"""Is what the rollout engine samples what the update sees? With CUDA graphs and without."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_phases import recipe, rule
from gpu_setting import Setting
from torch import Tensor, nn

from opd_titan.config import JobConfig
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
from opd_titan.training.models import inspect_model, load_model
from opd_titan.training.self_check import TOLERANCE

DEBUG = Path(__file__).resolve().parent.parent / "assets" / "debug"
# Around the ends of pages of 64 and of 256 tokens; those of a group share their prompt's.
LENGTHS = (3, 63, 64, 65, 40, 255, 256, 257, 600, 20)
NEW_TOKENS = (70, 30, 80, 60, 90, 20, 50, 64, 33, 81)
CONCURRENT = 6


class _Student:
    """A trained model and the generator's copy of it, as the trainer has them."""

    def __init__(self, s: Setting, model: nn.Module, build: Callable[[], nn.Module]) -> None:
        self.s, self.model = s, model
        self.weights = GeneratorWeights(model, build, s.dtype, s.device)
        self.weights.sync()

    @classmethod
    def random(cls, s: Setting, size: str) -> _Student:
        shape = s.shape("student", size)
        build = partial(shape.build_share, s.world.tp, False)
        return cls(s, s.model(shape, recipe(False)), build)

    def gaps(self, samples: Sequence[Sample]) -> Tensor:
        """|log-prob at rollout - log-prob by the packed forward| of each token."""
        plan = plan_minibatches(samples, 1, max(self.s.budgets), self.s.world.dp)
        scored = score(self.model, plan, Distribution(), self.s.world)
        return torch.cat([(sample.student_logprobs - v).abs() for sample, v in scored])


def check_engine(s: Setting, size: str) -> None:
    """The engine against the packed forward, against itself, and after weights have changed."""
    student = _Student.random(s, size)
    vocab = student.weights.model.args.vocab_size
    requests = _requests(vocab, 8 if s.miniature else 1)
    # Random weights draw nearly evenly: with these, responses end early now and then.
    eos = set(range(vocab // 200))
    params = SamplingParams(max(NEW_TOKENS))
    without = None
    for graphs in (False, True):
        generator = Generator(student.weights.model, eos, CONCURRENT)
        generator.use_cuda_graphs = graphs
        first, second = (_timed(s, generator, requests, params) for _ in range(2))
        samples = first["samples"]
        without = without or samples
        found = {
            "graphs": graphs,
            "path": str(choose_path(generator.model.args.head_dim, s.dtype, s.device)),
            "captured": sorted(generator._runner._graphs) if generator._runner else [],
            "same_twice": _tokens(samples) == _tokens(second["samples"]),
            "same_as_without": _share(samples, without),
            "first_s": first["seconds"],
            "second_s": second["seconds"],
            **_gap(student.gaps(samples)),
            **s.peak_memory(),
        }
        good = found["same_twice"] and found["gap_max"] <= TOLERANCE[s.dtype]
        taken = found["captured"] or not (graphs and s.on_cuda)
        s.emit({"figure": "engine", **found, "ok": bool(good and taken)})
    _check_changed_weights(student, generator, requests, params, samples)
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


def _timed(
    s: Setting, generator: Generator, requests: Sequence[Request], params: SamplingParams
) -> dict[str, Any]:
    s.synchronize()
    start = time.perf_counter()
    samples = generator.generate(requests, params)
    s.synchronize()
    return {"samples": samples, "seconds": time.perf_counter() - start}


def _tokens(samples: Sequence[Sample]) -> list[list[int]]:
    return [s.response_ids for s in samples]


def _share(found: Sequence[Sample], wanted: Sequence[Sample]) -> float:
    """Of responses that are equal, token by token. Other shapes of a product round otherwise."""
    pairs = zip(_tokens(found), _tokens(wanted), strict=True)
    return statistics.mean(a == b for a, b in pairs)


def _gap(gaps: Tensor) -> dict[str, Any]:
    return {
        "tokens": gaps.numel(),
        "gap_mean": gaps.double().mean().item(),
        "gap_max": gaps.max().item(),
    }


def _check_changed_weights(
    student: _Student,
    generator: Generator,
    requests: Sequence[Request],
    params: SamplingParams,
    before: Sequence[Sample],
) -> None:
    """Graphs read weights where they are: after a change in place, the new ones."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.neg_()
    student.weights.mark_stale()
    student.weights.sync()
    samples = generator.generate(requests, params)
    found = {"same_as_before": _share(samples, before), **_gap(student.gaps(samples))}
    good = found["same_as_before"] < 1.0 and found["gap_max"] <= TOLERANCE[student.s.dtype]
    student.s.emit({"figure": "engine, weights changed in place", **found, "ok": good})


def _check_failed_capture(
    student: _Student, eos: set[int], requests: Sequence[Request], params: SamplingParams
) -> None:
    """A step that waits for the device cannot be captured; the rollout goes on without graphs."""

    def wait(module: nn.Module, inputs: Any, hidden_ND: Tensor) -> None:
        hidden_ND[0, 0].item()

    generator = Generator(student.weights.model, eos, CONCURRENT)
    hook = student.weights.model.register_forward_hook(wait)
    try:
        samples = generator.generate(requests, params)
    finally:
        hook.remove()
    found = _gap(student.gaps(samples))
    good = found["gap_max"] <= TOLERANCE[student.s.dtype]
    student.s.emit({"figure": "engine, capture fails", **found, "ok": good})


# ---------------------------------------------------------- rollout against update


def measure_gap(s: Setting) -> None:
    """|log-prob at rollout - log-prob in the update|, which trains on what rollouts sampled."""
    student = _Student.random(s, "0.6B")
    prompts = s.prompts(s.step_sequences, student.weights.model.args.vocab_size)
    params = SamplingParams(min(256, s.step_new_tokens), ignore_eos=True)
    _emit_gap(student, "0.6B, random weights", prompts, params, {0})
    del student
    gc.collect()
    source = inspect_model("student", str(DEBUG / "student"), False, 1)
    model = load_model(source, s.world, JobConfig(), s.dtype)
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
    r = rule(recipe(False, objective="sft"))
    gaps = []
    with resharding(student.model):
        for microbatch in update.microbatches:
            stats, rollout_R = forward_backward(
                student.model, microbatch, update.response_tokens, r, s.world
            )
            gaps.append((stats.logprob_R - rollout_R).abs().cpu())
    student.model.zero_grad(set_to_none=True)
    s.emit({"figure": "gap", "model": name, **_gap(torch.cat(gaps))})
