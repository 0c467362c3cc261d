"""Record each step: scalars, a console line, a file of rollouts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from opd_titan.config.resolve import ResolvedJob
from opd_titan.data.pieces import TokenTexts
from opd_titan.data.types import Sample
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.distributed.collectives import gather_lists, max_scalar, sum_scalars
from opd_titan.distributed.world import World
from opd_titan.errors import reason
from opd_titan.grading.answers import after_prompt
from opd_titan.observability.console import report_outcome
from opd_titan.observability.metrics import (
    MetricLogger,
    PhaseClock,
    has_details,
    memory_scalars,
    time_scalars,
    work_scalars,
)
from opd_titan.observability.peaks import Peaks, device_peaks
from opd_titan.observability.rollout_writer import OldRollouts, write_rollouts
from opd_titan.observability.step_scalars import (
    ForwardFlops,
    balance_scalars,
    cached_tokens_read,
    data_set_scalars,
    kl_scalars,
    log_ratios,
    rollout_scalars,
    work,
)

logger = logging.getLogger("opd_titan")

SHOWN_SAMPLES = 3  # in TensorBoard, each for a different prompt


class Recorder:
    """Time the phases of a step and record its outcome. All ranks call; rank 0 writes.

    Args:
        forward_flops: by role, (lengths of the sequences, projected tokens) -> FLOPs.
        decode_bytes: the student's (forwards, cached tokens, bytes per element) -> bytes read.
        start_step: the last completed step, 0 for a new run.
        whole: whether the update projects the frozen models' hidden states.
        texts: returns the texts of single tokens, for the files of rollouts.
    """

    def __init__(
        self,
        job: ResolvedJob,
        *,
        world: World,
        dtype: torch.dtype,
        decode: Callable[[list[int]], str],
        grade: Callable[[str, str], bool | float | None],
        forward_flops: Mapping[str, ForwardFlops],
        decode_bytes: Callable[[int, int, int], float],
        start_step: int,
        total_steps: int,
        whole: bool = False,
        texts: TokenTexts | None = None,
    ) -> None:
        config = job.config
        self.job, self.config, self.world, self.dtype = job, config, world, dtype
        self.decode, self.grade, self.texts = decode, grade, texts
        self.forward_flops, self.decode_bytes, self.whole = forward_flops, decode_bytes, whole
        self.total_steps = total_steps
        self.rollouts = job.folder / "rollouts"
        self.old_rollouts = OldRollouts(self.rollouts, config.metrics.keep_rollouts)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.on_policy_fraction = config.rollout.on_policy_fraction
        self.clock = PhaseClock(world.device)
        self.peaks = _peaks(world.device, dtype)
        self.metrics = MetricLogger(
            job.folder,
            total_steps=total_steps,
            start_step=start_step,
            log_freq=config.metrics.log_freq,
            enable_tensorboard=config.metrics.enable_tensorboard,
            rank=self.rank,
        )
        if self.metrics.events is not None:
            self.metrics.events.describe(job)

    def record(
        self,
        step: int,
        samples: list[Sample],
        scalars: dict[str, float],
        *,
        decode_forwards: int,
        preempted: int,
        seconds: float,
    ) -> dict[str, float]:
        """Record a step that has just ended and return its scalars.

        Args:
            samples: samples of all ranks. They have advantages if this rank updates on them, and
                the student's log-probs if the student wrote them.
            scalars: measured by the update.
            decode_forwards, preempted, seconds: of this rank's rollout, see `RolloutStats`.
        """
        mine = [s for s in samples if s.advantages is not None]
        sampled = _sampled(samples)
        scalars = {**scalars, **self._speed(samples, sampled, decode_forwards)}
        if 0.0 < self.on_policy_fraction < 1.0:
            scalars["rollout/on_policy_fraction"] = len(sampled) / len(samples)
        if sampled:
            scalars |= rollout_scalars(sampled, _sampled(mine), self.decode, self.world)
            scalars |= balance_scalars(seconds, preempted, self.world)
            scalars |= kl_scalars(mine, self.world)
            scalars |= data_set_scalars(sampled, _sampled(mine), self.world)
        memory = memory_scalars(self.world.device)
        scalars |= {name: max_scalar(value, self.world.device) for name, value in memory.items()}
        self.metrics.totals.tokens += sum(len(s.response_ids) for s in samples)
        self.metrics.log(step, scalars)
        if self.config.metrics.enable_tensorboard and has_details(step, self.total_steps):
            ratios_N = log_ratios(mine, self.world)
            if self.metrics.events is not None:
                self.metrics.events.histogram(step, "log_ratio/student_teacher", ratios_N)
        if self.metrics.due(step):
            logger.info("%s", self.metrics.console_line(step))
        self._record_rollouts(step, self._chosen(samples), mine)
        return scalars

    def choose(self, samples: list[Sample]) -> None:
        """Mark the samples of a step that will be written to a file, so that scoring ranks them."""
        for sample in self._chosen(samples):
            sample.inspection = {}

    def _chosen(self, samples: list[Sample]) -> list[Sample]:
        limit = self.config.metrics.sample_rollouts
        if self.on_policy_fraction == 0.0:
            return []
        return samples if limit < 0 else samples[:limit]

    def record_pauses(self, step: int, found: Mapping[str, float]) -> None:
        """Record scalars and times from after a step, or from before the first one.

        Args:
            found: scalars other than the times.
        """
        self.metrics.log_pause(step, {**found, **time_scalars(self.clock.pop())})

    def report_outcome(self, step: int) -> None:
        """Log the summary of a finished job."""
        report_outcome(self.job, step, self.metrics.totals, self.metrics.last)

    def _speed(
        self, samples: Sequence[Sample], sampled: Sequence[Sample], decode_forwards: int
    ) -> dict[str, float]:
        seconds = self.clock.pop()
        tokens, flops = work(samples, self.forward_flops, self.whole)
        del tokens["rollout"], flops["rollout"]
        bytes_read = {}
        if sampled:
            own_tokens, own_flops = work(sampled, self.forward_flops, self.whole)
            tokens["rollout"], flops["rollout"] = own_tokens["rollout"], own_flops["rollout"]
            # Tensor-parallel ranks run each forward together, and each rank reads its share.
            own = {"forwards": float(decode_forwards)}
            forwards = int(sum_scalars(own, self.world.device, self.world.dp)["forwards"])
            cached = cached_tokens_read(sampled)
            bytes_read["rollout"] = self.decode_bytes(forwards, cached, self.dtype.itemsize)
        speed = work_scalars(
            seconds, tokens, flops, bytes_read, world_size=self.ranks, peaks=self.peaks
        )
        return {**time_scalars(seconds), **speed}

    def _record_rollouts(self, step: int, keep: list[Sample], mine: list[Sample]) -> None:
        if not keep:
            return
        place = {(s.prompt.index, s.sample_index): i for i, s in enumerate(keep)}
        scored = [s for s in mine if (s.prompt.index, s.sample_index) in place]
        scored = gather_lists(scored, self.world.dp)
        scored.sort(key=lambda s: place[s.prompt.index, s.sample_index])
        with raise_on_all_ranks():  # a user's own grader may fail
            if self.rank == 0:
                self._write_rollouts(step, scored)

    def _write_rollouts(self, step: int, scored: list[Sample]) -> None:
        if self.metrics.events is not None and has_details(step, self.total_steps):
            first: dict[int, Sample] = {}
            for s in scored:
                first.setdefault(s.prompt.index, s)
            rows = [self._shown(s) for s in list(first.values())[:SHOWN_SAMPLES]]
            self.metrics.events.samples(step, rows)
        try:
            write_rollouts(self.rollouts, step, scored, self.decode, self.grade, self.texts)
            self.old_rollouts.delete(step)
        except OSError as error:  # missing rollout files must not stop the run
            logger.error("Storage: rollouts of step %s not written: %s", step, reason(error))

    def _shown(self, s: Sample) -> tuple[str, str, str]:
        """Return the prompt, the response and the grade as text."""
        response, answer = self.decode(s.response_ids), s.prompt.answer
        outcome = f"{s.finish_reason}, {len(s.response_ids)} tokens"
        if answer is not None:
            score = self.grade(after_prompt(s.prompt.text, response), answer)
            grade = "not graded" if score is None else f"grade {float(score):g}"
            outcome += f", {grade} against {answer}"
        return s.prompt.text, response, outcome


def _sampled(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that the student wrote, not the data set."""
    return [s for s in samples if s.student_logprobs is not None]


def _peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Return the peaks of this device in `dtype`; the table's FLOP/s are for bf16."""
    if device.type != "cuda":
        return Peaks()
    peaks = device_peaks(torch.cuda.get_device_name(device))
    return peaks if dtype == torch.bfloat16 else replace(peaks, flops=None)
