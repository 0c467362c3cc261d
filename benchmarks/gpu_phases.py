"""Update, scoring and a whole step, through the program's own functions."""

from __future__ import annotations

import gc
import statistics
import time
from functools import partial

import torch
from gpu_setting import Setting, fed_in, responses

from opd_titan.config import JobConfig
from opd_titan.data.types import Sample
from opd_titan.distill.optim import build_optimizer
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, forward_backward, update
from opd_titan.models.logits import Distribution
from opd_titan.models.transforms import num_compiled_graphs
from opd_titan.observability.peaks import percent_of_peak
from opd_titan.observability.step_scalars import cached_tokens_read, work
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.memory import StepMemory
from opd_titan.rollout.rollout import sample_responses
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.gathering import keep_what_fits
from opd_titan.training.models import compiles, compiles_rollouts

MODES = ("none", "selective", "full")
# fp32 weights, gradients and two moments of 8.2e9 parameters are 131 GB: a 141 GB device has no
# room for activations beside them, and a host of 128 GiB none for cpu_offload's copy.
WITHOUT_MOMENTS = ("8B", "14B", "32B")


def recipe(compile: bool, mode: str = "none", objective: str = "policy_gradient") -> JobConfig:
    config = JobConfig()
    config.compile.enable = "on" if compile else "off"
    config.activation_checkpoint.mode = mode
    config.distill.objective = objective
    return config


def rule(config: JobConfig) -> UpdateRule:
    return UpdateRule.of(config, Distribution())


def measure_update(s: Setting, size: str, compile: bool) -> None:
    """Each budget with the least activation checkpointing that fits."""
    left = list(s.budgets)
    for mode in MODES:
        left = _update_budgets(s, size, compile, mode, left)
        gc.collect()
        s.reset_memory()
        if not left:
            return
    s.emit({"budgets": left, "error": "out of memory even with full activation checkpointing"})


def _update_budgets(
    s: Setting, size: str, compile: bool, mode: str, budgets: list[int]
) -> list[int]:
    """Measure the budgets in turn; those that did not fit."""
    config = recipe(compile, mode)
    done = 0
    try:
        shape = s.shape("student", size)
        model = s.model(shape, config)
        if size in WITHOUT_MOMENTS:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        else:
            optimizer = build_optimizer(model, config)
        for budget in budgets:
            _update_budget(s, config, shape, model, optimizer, budget)
            done += 1
    except torch.OutOfMemoryError as error:
        what = {"budget": budgets[done], "checkpointing": mode, "fits": False}
        s.emit({**what, "why": str(error).splitlines()[0][:160]})
    return budgets[done:]


def _update_budget(s, config, shape, model, optimizer, budget) -> None:
    args = shape.args
    how = {
        "budget": budget,
        "checkpointing": config.activation_checkpoint.mode,
        "optimizer": type(optimizer).__name__,
    }
    config.training.max_tokens_per_microbatch = budget
    kept = keep_what_fits(config, {"student": model}, {"student": shape}, s.world, s.dtype)
    once = kept.gradients
    graphs = {"compiled_graphs": num_compiled_graphs()} if compiles(config) else {}
    how["kept"] = str(kept)
    for count in s.microbatches:
        samples = s.samples(budget, count, args.vocab_size)
        plan = plan_minibatches(samples, 1, budget, s.world.dp)
        flops = 3.0 * args.forward_flops(fed_in(samples), responses(samples))
        tokens = sum(fed_in(samples))
        s.reset_memory()
        whole = s.seconds(
            lambda p=plan: update(model, optimizer, p, rule(config), s.world, exchange_once=once)
        )
        rates = s.rates(whole["median_s"], flops, tokens)
        sizes = {"microbatches": count, **how}
        s.emit({"figure": "update", **sizes, **whole, **rates, **s.peak_memory(), **graphs})

    def one() -> None:
        first = plan[0].microbatches[0]
        forward_backward(model, first, plan[0].response_tokens, rule(config), s.world)

    alone, count = s.seconds(one), len(plan[0].microbatches)
    rates = s.rates(alone["median_s"], flops / count, tokens // count)
    s.emit({"figure": "microbatch", **how, **alone, **rates})
    if budget == max(s.budgets):
        s.emit({"figure": "microbatch kernels", **how, **s.kernels(one)})
    optimizer.zero_grad(set_to_none=True)


def measure_score(s: Setting, size: str, compile: bool) -> None:
    shape, config = s.shape("teacher", size), recipe(compile)
    model = s.model(shape, config)
    for budget in s.budgets:
        samples = s.samples(budget, max(s.microbatches), shape.args.vocab_size)
        plan = plan_minibatches(samples, 1, budget, s.world.dp)
        flops = shape.args.forward_flops(fed_in(samples), responses(samples))
        s.reset_memory()
        one = partial(score, model, plan, Distribution(), s.world)
        timed = s.seconds(one)
        rates = s.rates(timed["median_s"], flops, sum(fed_in(samples)))
        s.emit({"figure": "score", "budget": budget, **timed, **rates, **s.peak_memory()})
    s.emit({"figure": "score kernels", "budget": budget, **s.kernels(one)})


class _Step:
    """The trainer's step, without its data, tokenizer and records."""

    def __init__(self, s: Setting, compile: bool, objective: str) -> None:
        self.s, self.config = s, recipe(compile, objective=objective)
        self.config.training.max_tokens_per_microbatch = max(s.budgets)
        self.config.rollout.prompts_per_step = s.step_sequences
        self.shapes = {"student": s.shape("student", "0.6B"), "teacher": s.shape("teacher", "4B")}
        self.student = s.model(self.shapes["student"], self.config)
        self.teacher = s.model(self.shapes["teacher"], self.config, seed=1)
        models = {"student": self.student, "teacher": self.teacher}
        self.kept = keep_what_fits(self.config, models, self.shapes, s.world, s.dtype)
        self.optimizer = build_optimizer(self.student, self.config)
        compiled = compiles_rollouts(self.config, s.device)
        build = partial(self.shapes["student"].build_share, s.world.tp, compiled)
        self.weights = GeneratorWeights(self.student, build, s.dtype, s.device, not compiled)
        self.memory = StepMemory(s.device)
        self.generator = Generator(
            self.weights.model,
            {0},
            max_prefill_tokens=max(s.budgets),
            room=lambda: self.memory.room_beside(self.weights),
        )
        self.prompts = s.prompts(s.step_sequences, self.shapes["student"].args.vocab_size)

    def run(self, new_tokens: int, number: int) -> tuple[dict[str, float], list[Sample]]:
        """Seconds by phase, as `Trainer.train_step` goes through them, and the samples."""
        s, times = self.s, {}
        params = SamplingParams(new_tokens, ignore_eos=True)

        def phase(name, function, *args):
            s.synchronize()
            start = time.perf_counter()
            result = function(*args)
            s.synchronize()
            times[name] = time.perf_counter() - start
            return result

        start = time.perf_counter()
        phase("sync", self.weights.sync)
        stream = (42, number)
        sampling = (self.generator, self.prompts, 1, params, stream, s.world.dp)
        samples = phase("rollout", sample_responses, *sampling)
        self.memory.make_room(self.weights, self.generator)
        budget = self.config.training.max_tokens_per_microbatch
        plan = plan_minibatches(samples, 1, budget, s.world.dp)
        self.rule = rule(self.config)
        whole = self.rule.needs_vocabulary
        scoring = partial(score, keep_hidden=whole)
        scored = phase("teacher", scoring, self.teacher, plan, Distribution(), s.world)
        for sample, values in scored:
            setattr(sample, "teacher_hidden" if whole else "teacher_logprobs", values)
        moving = (self.student, self.optimizer, plan, self.rule, s.world)
        frozen = {"teacher": self.teacher} if whole else {}
        learning = partial(update, frozen=frozen, exchange_once=self.kept.gradients)
        self.scalars = phase("update", learning, *moving).scalars
        self.weights.mark_stale()
        self.memory.measure()
        times["step"] = time.perf_counter() - start
        return times, samples


def measure_step(s: Setting, compile: bool, objective: str) -> None:
    """0.6B taught by 4B."""
    step = _Step(s, compile, objective)
    first, _ = step.run(min(32, s.step_new_tokens), 0)
    s.emit({"figure": "warm-up", **first})
    s.reset_memory()
    runs = []
    for n in range(s.step_repeats):
        times, samples = step.run(s.step_new_tokens, n + 1)
        s.emit({"figure": f"step {n + 1}", **times})
        runs.append(times)
    median = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
    flops_of = {role: shape.args.forward_flops for role, shape in step.shapes.items()}
    tokens, flops = work(samples, flops_of, step.rule.needs_vocabulary)
    for name in ("rollout", "teacher", "update"):
        rates = s.rates(median[name], flops[name], tokens[name])
        s.emit({"figure": f"the step's {name}", **rates})
    args, forwards = step.shapes["student"].args, step.generator.stats.decode_forwards
    read = args.decode_bytes(forwards, cached_tokens_read(samples), s.dtype.itemsize)
    bandwidth = {"gb_per_s": read / median["rollout"] / 1e9}
    if s.peaks.bandwidth:
        peak = s.peaks.bandwidth
        bandwidth["mbu_percent"] = percent_of_peak(read, median["rollout"], peak)
    per_forward = median["rollout"] / max(1, forwards) * 1e3
    s.emit(
        {
            "figure": "the step's decoding",
            "forwards": forwards,
            "ms_per_forward": per_forward,
            **bandwidth,
        }
    )
    gap = {"logprob_gap_max": step.scalars["policy/logprob_gap_max"]}
    s.emit({"figure": "step", **median, **s.peak_memory(), **gap})
