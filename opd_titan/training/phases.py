"""The phases of a step: rollout, scores and update, each with a progress bar and the monitor."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from opd_titan.config.resolve import ResolvedJob, is_teacher
from opd_titan.data.types import Prompt, Sample, ScoredBy
from opd_titan.distill.optim import set_learning_rate
from opd_titan.distill.packing import Minibatch, minibatches_of, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateResult, UpdateRule, update
from opd_titan.distributed.monitor import Monitor
from opd_titan.distributed.world import World
from opd_titan.observability.progress import Bar, progress
from opd_titan.rollout.generator import SamplingParams
from opd_titan.rollout.rollout import in_order, sample_responses, split_on_policy
from opd_titan.training.models import JobModels
from opd_titan.training.sources import common_vocab_size


class Phases:
    """Run each phase of a step on all ranks.

    Args:
        bars: show a progress bar for each phase.

    Attributes:
        step: the current step, for random numbers and progress bars.
        sampling: how the student samples.
        rule: the loss of the update.
    """

    def __init__(
        self,
        job: ResolvedJob,
        world: World,
        models: JobModels,
        monitor: Monitor,
        bars: bool = True,
    ) -> None:
        self.config, self.world, self.models, self.monitor = job.config, world, models, monitor
        self.bars = bars
        self.step = 0
        r = self.config.rollout
        self.sampling = SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            ignore_eos=r.ignore_eos,
            max_tokens=r.max_tokens_per_step,
            vocab_size=common_vocab_size(models.shapes),
        )
        c = self.config
        self.rule = UpdateRule.of(c.distill, c.reference, c.training, self.sampling.distribution)

    def rollout(
        self, step: int, prompts: list[Prompt], given_response: Callable[[Prompt], Sample]
    ) -> list[Sample]:
        """Begin a step, and return the responses to its prompts, sampled or given.

        Args:
            given_response: returns the data set's own response to a prompt.
        """
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
        return in_order(samples + [given_response(p) for p in given], prompts)

    def plan(self, samples: list[Sample]) -> list[Minibatch]:
        """Return this rank's share of the step's updates, in micro-batches."""
        tokens = self.config.training.max_tokens_per_microbatch
        return plan_minibatches(samples, self.config.distill.minibatches, tokens, self.world.dp)

    def score(self, role: str, plan: list[Minibatch]) -> None:
        """Set the log-probs, or the hidden states, of a frozen model on its samples."""
        name: ScoredBy = "reference"
        if is_teacher(role):
            name, plan = "teacher", minibatches_of(role, plan)
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
            if whole:
                sample.set_hidden(name, values)
            else:
                sample.set_logprobs(name, values)

    def update(self, plan: list[Minibatch], rate: float) -> UpdateResult:
        """Update the student with this learning rate."""
        set_learning_rate(self.models.optimizer, rate)
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
        result.scalars["lr"] = rate
        return result

    def _sequence_bar(self, phase: str, plan: list[Minibatch]) -> Bar:
        sequences = sum(len(m) for minibatch in plan for m in minibatch.microbatches)
        return self._bar(phase, sequences, "seq")

    def _bar(self, phase: str, total: int, unit: str) -> Bar:
        rank = dist.get_rank() if self.bars else -1  # rank 0 shows its bars
        return progress(total, f"step {self.step} {phase}", unit, rank=rank)
