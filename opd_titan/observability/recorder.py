"""Everything a step leaves behind: scalars, a console line, a file of rollouts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from opd_titan.config import JobConfig
from opd_titan.data.pieces import TokenTexts
from opd_titan.data.types import Sample
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.distributed.collectives import gather_lists, max_scalar, sum_scalars
from opd_titan.distributed.world import World
from opd_titan.errors import reason
from opd_titan.grading.answers import after_prompt
from opd_titan.observability.console import report_outcome
from opd_titan.observability.metrics import MetricLogger, PhaseClock, memory_stats, phase_scalars
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
from opd_titan.observability.tensorboard import SHOWN_SAMPLES, is_recorded

logger = logging.getLogger("opd_titan")


class Recorder:
    """Times the phases of a step and records its outcome. All ranks call; rank 0 writes.

    Args:
        forward_flops: by role, (lengths of the sequences, projected tokens) -> FLOPs.
        decode_bytes: of the student, (forwards, cached tokens, bytes of a number) -> bytes read.
        start_step: the last step that was done, 0 for a new run.
        whole: updates project the frozen models' hidden states.
        texts: of single tokens, for the files of rollouts.
    """

    def __init__(
        self,
        config: JobConfig,
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
        self.whole, self.texts = whole, texts
        self.config, self.world, self.decode, self.grade = config, world, decode, grade
        self.forward_flops, self.decode_bytes = forward_flops, decode_bytes
        self.total_steps = total_steps
        folder = Path(config.job.dump_folder)
        self.rollouts = folder / "rollouts"
        self.old_rollouts = OldRollouts(self.rollouts, config.metrics.keep_rollouts)
        device, self.dtype = world.device, dtype
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.on_policy_fraction = config.rollout.on_policy_fraction
        self.clock = PhaseClock(device)
        self.peaks = _peaks(device, dtype)
        self.metrics = MetricLogger(
            folder,
            config.metrics.enable_tensorboard,
            config.metrics.log_freq,
            self.rank,
            start_step=start_step,
            total_steps=total_steps,
        )
        if self.metrics.events is not None:
            self.metrics.events.describe(config)

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
        """Record a step that has just ended; its scalars.

        Args:
            samples: of all ranks; those that this rank updated on have their advantages, those that
                the student sampled its log-probs.
            scalars: what the update measured.
            decode_forwards, preempted, seconds: of this rank's rollout, see `RolloutStats`.
        """
        mine = [s for s in samples if s.advantages is not None]
        sampled = _sampled(samples)
        scalars = {**scalars, **self._work_scalars(samples, sampled, decode_forwards)}
        if 0.0 < self.on_policy_fraction < 1.0:
            scalars["rollout/on_policy_fraction"] = len(sampled) / len(samples)
        if sampled:
            scalars |= rollout_scalars(sampled, _sampled(mine), self.decode, self.world)
            scalars |= balance_scalars(seconds, preempted, self.world)
            scalars |= kl_scalars(mine, self.world)
            scalars |= data_set_scalars(sampled, _sampled(mine), self.world)
        memory = memory_stats(self.world.device)
        scalars |= {name: max_scalar(value, self.world.device) for name, value in memory.items()}
        self.metrics.totals.tokens += sum(len(s.response_ids) for s in samples)
        self.metrics.log(step, scalars)
        if is_recorded(step, self.total_steps):
            self._record_ratios(step, mine)
        if self.metrics.due(step):
            logger.info("%s", self.metrics.console_line(step, self.total_steps))
        self._write_rollouts(step, self._chosen(samples), mine)
        return scalars

    def choose(self, samples: list[Sample]) -> None:
        """Mark those of a step that will be written down for a closer look at them."""
        for sample in self._chosen(samples):
            sample.inspection = {}

    def _chosen(self, samples: list[Sample]) -> list[Sample]:
        limit = self.config.metrics.sample_rollouts
        if self.on_policy_fraction == 0.0:
            return []
        return samples if limit < 0 else samples[:limit]

    def record_pauses(self, step: int, found: Mapping[str, float]) -> None:
        """Record what came after a step, or at the start, while no step ran.

        Args:
            found: scalars besides its times.
        """
        self.metrics.log(step, {**found, **phase_scalars(self.clock.pop(), {}, {}, {})})

    def report_outcome(self, step: int) -> None:
        """The last words of a job that is done."""
        report_outcome(self.config, step, self.metrics.totals, self.metrics.last)

    def _work_scalars(
        self, samples: Sequence[Sample], sampled: Sequence[Sample], decode_forwards: int
    ) -> dict[str, float]:
        tokens, flops = work(samples, self.forward_flops, self.whole)
        del tokens["rollout"], flops["rollout"]
        bytes_read = {}
        if sampled:
            sampled_tokens, sampled_flops = work(sampled, self.forward_flops, self.whole)
            tokens["rollout"] = sampled_tokens["rollout"]
            flops["rollout"] = sampled_flops["rollout"]
            bytes_read["rollout"] = self._rollout_bytes(sampled, decode_forwards)
        return phase_scalars(
            self.clock.pop(), tokens, flops, bytes_read, world_size=self.ranks, peaks=self.peaks
        )

    def _rollout_bytes(self, sampled: Sequence[Sample], decode_forwards: int) -> float:
        # Tensor-parallel ranks make one forward between them, each reading its share.
        own = {"forwards": float(decode_forwards)}
        forwards = int(sum_scalars(own, self.world.device, self.world.dp)["forwards"])
        return self.decode_bytes(forwards, cached_tokens_read(sampled), self.dtype.itemsize)

    def _record_ratios(self, step: int, mine: list[Sample]) -> None:
        """All ranks call, whether or not they write."""
        if self.config.metrics.enable_tensorboard:
            ratios_N = log_ratios(mine, self.world)
            if self.metrics.events is not None:
                self.metrics.events.histogram(step, "log_ratio/student_teacher", ratios_N)

    def _show(self, step: int, scored: Sequence[Sample]) -> None:
        """A few of the step's rollouts in TensorBoard, of different prompts."""
        if self.metrics.events is None or not is_recorded(step, self.total_steps):
            return
        first: dict[int, Sample] = {}
        for s in scored:
            first.setdefault(s.prompt.index, s)
        rows = []
        for s in list(first.values())[:SHOWN_SAMPLES]:
            response, answer = self.decode(s.response_ids), s.prompt.answer
            told = f"{s.finish_reason}, {len(s.response_ids)} tokens"
            if answer is not None:
                graded = after_prompt(s.prompt.text, response)
                found = self.grade(graded, answer)
                grade = "not graded" if found is None else f"grade {float(found):g}"
                told += f", {grade} against {answer}"
            rows.append((s.prompt.text, response, told))
        self.metrics.events.samples(step, rows)

    def _write_rollouts(self, step: int, keep: list[Sample], mine: list[Sample]) -> None:
        if not keep:
            return
        place = {(s.prompt.index, s.sample_index): i for i, s in enumerate(keep)}
        scored = [s for s in mine if (s.prompt.index, s.sample_index) in place]
        scored = gather_lists(scored, self.world.dp)
        scored.sort(key=lambda s: place[s.prompt.index, s.sample_index])
        with raise_on_all_ranks():  # a user's own grader may fail
            if self.rank == 0:
                self._write(step, scored)

    def _write(self, step: int, scored: list[Sample]) -> None:
        try:
            self._show(step, scored)
            write_rollouts(self.rollouts, step, scored, self.decode, self.grade, self.texts)
            self.old_rollouts.delete(step)
        except OSError as error:  # a sample for people: no reason to lose the run
            logger.error("Storage: rollouts of step %s not written: %s", step, reason(error))


def _sampled(samples: Sequence[Sample]) -> list[Sample]:
    """Those that the student wrote, not the data set."""
    return [s for s in samples if s.student_logprobs is not None]


def _peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """What this device can do in `dtype`; the table's FLOP/s are of bf16."""
    if device.type != "cuda":
        return Peaks()
    peaks = device_peaks(torch.cuda.get_device_name(device))
    return peaks if dtype == torch.bfloat16 else replace(peaks, flops=None)
