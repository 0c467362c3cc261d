"""The phases of a step: rollout, scores and update, each with a progress bar and the monitor."""

from __future__ import annotations

import torch.distributed as dist

from opd_titan.config.resolve import is_teacher
from opd_titan.data.prompts import given_response
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.optim import learning_rate, set_learning_rate
from opd_titan.distill.packing import Minibatch, plan_minibatches, taught_by
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateResult, UpdateRule, update
from opd_titan.distributed.monitor import Monitor
from opd_titan.observability.progress import Bar, progress
from opd_titan.rollout.generator import SamplingParams
from opd_titan.rollout.rollout import in_order, sample_responses, split_on_policy
from opd_titan.training.models import JobModels
from opd_titan.training.setup import Setup
from opd_titan.training.sources import common_vocab_size


class Phases:
    """Run each phase of a step on all ranks.

    Attributes:
        step: the present step, for random numbers and progress bars.
        sampling: how the student samples.
        rule: the loss of the update.
    """

    def __init__(self, setup: Setup, models: JobModels, monitor: Monitor) -> None:
        self.setup, self.models, self.monitor = setup, models, monitor
        self.config, self.world = setup.job.config, setup.world
        self.step = 0
        r = self.config.rollout
        self.sampling = SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            ignore_eos=r.ignore_eos,
            max_tokens=r.max_tokens_per_step,
            vocab_size=common_vocab_size(setup.sources),
        )
        c = self.config
        self.rule = UpdateRule.of(c.distill, c.reference, c.training, self.sampling.distribution)

    def rollout(self, step: int, prompts: list[Prompt]) -> list[Sample]:
        """Begin a step: return the responses to its prompts, sampled or the data set's own."""
        self.step = step
        r, dp = self.config.rollout, self.world.dp
        stream = (self.config.training.seed, self.step)
        sampled, given = split_on_policy(prompts, r.on_policy_fraction, stream)
        most = len(sampled[dp.rank :: dp.size]) * r.group_size * r.max_new_tokens
        with self._bar("rollout", most, "tok") as bar:
            on_tokens = self.monitor.on_tokens(bar)
            samples = sample_responses(
                self.models.generator, sampled, r.group_size, self.sampling, stream, dp, on_tokens
            )
        stop_ids = self.setup.sources["student"].eos_ids
        samples += [
            given_response(p, self.setup.tokenizer, stop_ids, r.max_new_tokens) for p in given
        ]
        return in_order(samples, prompts)

    def plan(self, samples: list[Sample]) -> list[Minibatch]:
        """Return this rank's share of the step's updates, in micro-batches."""
        tokens = self.config.training.max_tokens_per_microbatch
        return plan_minibatches(samples, self.config.distill.minibatches, tokens, self.world.dp)

    def score(self, role: str, plan: list[Minibatch]) -> None:
        """Set the log-probs, or the hidden states, of a frozen model on its samples."""
        name = "reference"
        if is_teacher(role):
            name, plan = "teacher", taught_by(role, plan)
        whole = self.rule.needs_vocabulary
        with self._sequence_bar(role, plan) as bar:
            scored = score(
                self.models.frozen[role],
                plan,
                self.rule.dist.untruncated,
                self.world,
                self.monitor.on_sequences(bar),
                whole,
                name,
            )
        for sample, values in scored:
            setattr(sample, f"{name}_hidden" if whole else f"{name}_logprobs", values)

    def update(self, plan: list[Minibatch], slowdown: float) -> UpdateResult:
        """Update the student, with the learning rate of the step times `slowdown`."""
        c = self.config
        rate = learning_rate(self.step, self.setup.total_steps, c.optimizer.lr, c.lr_scheduler)
        set_learning_rate(self.models.optimizer, slowdown * rate)
        frozen = self.models.frozen if self.rule.needs_vocabulary else {}
        with self._sequence_bar("update", plan) as bar:
            # After the first optimizer step, the remaining updates of the step must be done.
            on_sequences = self.monitor.on_sequences(bar, stops=len(plan[0].microbatches))
            result = update(
                self.models.student,
                self.models.optimizer,
                plan,
                self.rule,
                self.world,
                on_sequences,
                frozen,
                exchange_once=self.models.kept.gradients,
            )
        result.scalars["lr"] = slowdown * rate
        return result

    def _sequence_bar(self, phase: str, plan: list[Minibatch]) -> Bar:
        sequences = sum(len(m) for minibatch in plan for m in minibatch.microbatches)
        return self._bar(phase, sequences, "seq")

    def _bar(self, phase: str, total: int, unit: str) -> Bar:
        return progress(total, f"step {self.step} {phase}", unit, rank=dist.get_rank())
