"""Accuracy on held-out prompts, and how much of the gap to the teacher is closed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from opd_titan.data.grading import grade
from opd_titan.data.types import Prompt
from opd_titan.observability.progress import progress
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

logger = logging.getLogger("opd_titan")

# Keeps validation's random numbers apart from those of any training step.
VALIDATION_STREAM = 1 << 62


@dataclass
class Baselines:
    """What the student is measured against. None: not measured."""

    start: float | None = None
    teacher: float | None = None


class Validator:
    """Grades a model's responses to the same prompts, with the same random numbers, each time.

    Args:
        prompts: each with an answer.
        seed: of the sampling, when it is not greedy.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        params: SamplingParams,
        seed: int,
        decode: Callable[[list[int]], str],
        rank: int,
    ) -> None:
        self.prompts, self.samples_per_prompt, self.params = prompts, samples_per_prompt, params
        self.seed, self.decode, self.rank = seed, decode, rank
        self.baselines = Baselines()

    def measure_teacher(self, generator: Generator) -> None:
        self.baselines.teacher, _ = self._measure(generator, "teacher")

    def measure_student(self, generator: Generator, step: int) -> dict[str, float]:
        """`validation/*` scalars of the student as it is now; step 0 sets the start."""
        accuracy, tokens = self._measure(generator, "student")
        if step == 0:
            self.baselines.start = accuracy
        scalars = {"validation/accuracy": accuracy, "validation/response_tokens_mean": tokens}
        text = f"Validation at step {step}: student {accuracy:.1%}"
        start, teacher = self.baselines.start, self.baselines.teacher
        if start is not None and teacher is not None:
            scalars["validation/teacher_accuracy"] = teacher
            text += f", start {start:.1%}, teacher {teacher:.1%}"
            if teacher > start:
                scalars["validation/gap_recovered"] = (accuracy - start) / (teacher - start)
                text += f", gap recovered {scalars['validation/gap_recovered']:.1%}"
        logger.info("%s", text)
        return scalars

    def _measure(self, generator: Generator, name: str) -> tuple[float, float]:
        """Accuracy over prompts and samples, and mean response tokens. The same on all ranks."""
        mine = len(self.prompts[self.rank :: dist.get_world_size()]) * self.samples_per_prompt
        most = mine * self.params.max_new_tokens
        with progress(most, f"validate {name}", "tok", rank=self.rank) as bar:
            samples = sample_responses(
                generator,
                self.prompts,
                self.samples_per_prompt,
                self.params,
                (self.seed, VALIDATION_STREAM),
                bar.update,
            )
        correct = sum(bool(grade(self.decode(s.response_ids), s.prompt.answer)) for s in samples)
        tokens = sum(len(s.response_ids) for s in samples)
        return correct / len(samples), tokens / len(samples)
