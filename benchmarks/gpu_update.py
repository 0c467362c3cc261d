"""Update, scoring, a whole step, and the debug recipe, through the program's own functions."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_setting import Setting, fed_in, responses
from harness import REPO, Record, read_scalars, words
from transformers import AutoModelForCausalLM

from opd_titan.config import JobConfig
from opd_titan.data.types import Sample
from opd_titan.distill.optim import build_optimizer
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, forward_backward, update
from opd_titan.models.logits import Distribution
from opd_titan.models.transforms import num_compiled_graphs
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.memory import StepMemory, total_bytes
from opd_titan.rollout.rollout import sample_responses
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.gathering import keep_what_fits

STEPS = 40  # as in train_configs/debug.toml
SMALL: Record = {
    "rollout.prompts_per_step": 4,
    "rollout.max_new_tokens": 8,
    "validation.max_prompts": 4,
    "validation.max_new_tokens": 8,
}


def recipe(compile: bool = False, objective: str = "policy_gradient") -> JobConfig:
    config = JobConfig()
    config.compile.enable = "on" if compile else "off"
    config.activation_checkpoint.mode = "none"
    config.distill.objective = objective
    return config


def rule(config: JobConfig) -> UpdateRule:
    return UpdateRule.of(config.distill, config.reference, config.training, Distribution())


def measure_update(s: Setting, size: str, compile: bool) -> None:
    """Measure updates of each number of micro-batches of each size, and one micro-batch."""
    config, shape = recipe(compile), s.shape("student", size)
    model = s.model(shape, config)
    optimizer = build_optimizer(model, config.optimizer)
    for budget in s.budgets:
        config.training.max_tokens_per_microbatch = budget
        kept = keep_what_fits(
            s.job(config), {"student": model}, {"student": shape}, s.world, total_bytes(s.device)
        )
        for count in s.microbatches:
            samples = s.samples(budget, count, shape.args.vocab_size)
            plan = plan_minibatches(samples, 1, budget, s.world.dp)
            flops = 3.0 * shape.args.forward_flops(fed_in(samples), responses(samples))
            whole = partial(
                update, model, optimizer, plan, rule(config), s.world, exchange_once=kept.gradients
            )
            s.reset_memory()
            timed = s.seconds(whole)
            found = {**timed, **s.rates(timed["median_s"], flops, sum(fed_in(samples)))}
            how = {"budget": budget, "microbatches": count, "compiled": num_compiled_graphs()}
            s.emit({"figure": "update", **how, **found, **s.peak_memory()})
        one = partial(
            forward_backward,
            model,
            plan[0].microbatches[0],
            plan[0].response_tokens,
            rule(config),
            s.world,
        )
        timed, count = s.seconds(one), len(plan[0].microbatches)
        rates = s.rates(timed["median_s"], flops / count, sum(fed_in(samples)) // count)
        s.emit({"figure": "microbatch", "budget": budget, **timed, **rates})
        if budget == max(s.budgets):
            s.emit({"figure": "microbatch kernels", "budget": budget, **s.kernels(one)})
        optimizer.zero_grad(set_to_none=True)


def measure_score(s: Setting, size: str) -> None:
    shape = s.shape("teacher", size)
    model = s.model(shape, recipe())
    for budget in s.budgets:
        samples = s.samples(budget, max(s.microbatches), shape.args.vocab_size)
        plan = plan_minibatches(samples, 1, budget, s.world.dp)
        flops = shape.args.forward_flops(fed_in(samples), responses(samples))
        s.reset_memory()
        timed = s.seconds(partial(score, model, plan, Distribution(), s.world))
        rates = s.rates(timed["median_s"], flops, sum(fed_in(samples)))
        s.emit({"figure": "score", "budget": budget, **timed, **rates, **s.peak_memory()})


# ------------------------------------------------------------------ a whole step


class _Step:
    """The trainer's step, without its data, tokenizer and records."""

    def __init__(self, s: Setting, objective: str) -> None:
        self.s, self.config = s, recipe(objective=objective)
        self.config.training.max_tokens_per_microbatch = max(s.budgets)
        self.config.rollout.prompts_per_step = s.step_sequences
        shapes = {"student": s.shape("student", "0.6B"), "teacher": s.shape("teacher", "4B")}
        models = {role: s.model(shape, self.config, i) for i, (role, shape) in
                  enumerate(shapes.items())}  # fmt: skip
        self.memory = StepMemory(s.device)
        self.kept = keep_what_fits(
            s.job(self.config), models, shapes, s.world, self.memory.total_bytes()
        )
        self.student, self.teacher = models.values()
        self.optimizer = build_optimizer(self.student, self.config.optimizer)
        build = partial(shapes["student"].build_share, s.world.tp, False)
        self.weights = GeneratorWeights(self.student, build, s.dtype, s.device)
        self.generator = Generator(
            self.weights.model,
            {0},
            max_prefill_tokens=max(s.budgets),
            room=lambda: self.memory.room_beside(self.weights),
        )
        self.prompts = s.prompts(s.step_sequences, shapes["student"].args.vocab_size)

    def run(self, new_tokens: int, number: int) -> Record:
        """Go through the phases of `Trainer.train_step`; return their seconds and the gap."""
        s, times = self.s, {}

        def phase(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            s.synchronize()
            start = time.perf_counter()
            result = function(*args, **options)
            s.synchronize()
            times[name] = time.perf_counter() - start
            return result

        start = time.perf_counter()
        phase("sync", self.weights.sync)
        params = SamplingParams(new_tokens, ignore_eos=True)
        sampling = (self.generator, self.prompts, 1, params, (42, number), s.world.dp)
        samples: list[Sample] = phase("rollout", sample_responses, *sampling)
        self.memory.make_room(self.weights, self.generator)
        plan = plan_minibatches(samples, 1, max(s.budgets), s.world.dp)
        update_rule = rule(self.config)
        whole = update_rule.needs_vocabulary
        scoring = (self.teacher, plan, Distribution(), s.world)
        for sample, values in phase("teacher", score, *scoring, keep_hidden=whole):
            assign = sample.set_hidden if whole else sample.set_logprobs
            assign("teacher", values)
        result = phase(
            "update",
            update,
            self.student,
            self.optimizer,
            plan,
            update_rule,
            s.world,
            frozen={"teacher": self.teacher} if whole else {},
            exchange_once=self.kept.gradients,
        )
        self.weights.mark_stale()
        self.memory.measure()
        times["step"] = time.perf_counter() - start
        gap = result.scalars["policy/logprob_gap_max"]
        forwards = self.generator.stats.decode_forwards
        return {**times, "logprob_gap_max": gap, "forwards": forwards}


def measure_step(s: Setting, objective: str) -> None:
    """Measure two steps of 0.6B taught by 4B."""
    step = _Step(s, objective)
    s.emit({"figure": "warm-up", **step.run(min(32, s.step_new_tokens), 0)})
    s.reset_memory()
    runs = []
    for number in (1, 2):
        runs.append(step.run(s.step_new_tokens, number))
        s.emit({"figure": f"step {number}", **runs[-1]})
    medians = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
    s.emit({"figure": "step", **medians, **s.peak_memory()})


# -------------------------------------------------------------- the debug recipe


def train_debug_recipe(s: Setting) -> None:
    """Run half of its steps as a user does, then the others by a process that resumes."""
    steps = 4 if s.miniature else STEPS
    options = {"validation.interval": steps // 2} | (SMALL if s.miniature else {})
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), []
        for last in (steps // 2, steps):
            start = time.perf_counter()
            _train({**options, "job.dump_folder": name, "training.steps": last})
            seconds.append(time.perf_counter() - start)
            s.emit({"figure": f"recipe, to step {last}", "seconds": seconds[-1]})
        scalars = read_scalars(folder)
        model = AutoModelForCausalLM.from_pretrained(folder / "hf" / "latest")
        found: Record = {
            "resumed": [*scalars["lr"]] == [*range(1, steps + 1)],
            "exported": all(bool(p.isfinite().all()) for p in model.parameters()),
            "logprob_gap_max": max(scalars["policy/logprob_gap_max"].values()),
            "step_s": scalars["time/step(s)"][steps],
            "recipe_s": sum(seconds),
        }
    for value in [*scalars.get("validation/gap_recovered", {}).values()][-1:]:
        found["gap_recovered"] = value  # in miniature there may be no gap
    s.emit({"figure": "recipe", **found, "ok": found["resumed"] and found["exported"]})


def _train(options: Record) -> None:
    """Run the job in this process's group, so that it ends when the stage does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "CONFIG_FILE"} | {"PATH": path, "NGPU": "1"}
    subprocess.run(["./scripts/run_train.sh", *words(options)], cwd=REPO, env=env, check=True)
