"""Accuracy on held-out prompts, and how much of the gap to the teacher is closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_titan.data.grading import grade
from opd_titan.data.types import Prompt
from opd_titan.observability.progress import progress
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

# Keeps validation's random numbers apart from those of any training step.
VALIDATION_STREAM = 1 << 62


@dataclass(frozen=True)
class Accuracy:
    """accuracy: mean over prompts and samples. response_tokens_mean: stop token included."""

    accuracy: float
    response_tokens_mean: float


class Validator:
    """Grades a model's responses to the same prompts, with the same random numbers, each time."""

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

    def measure(self, generator: Generator, name: str) -> Accuracy:
        """All ranks call; all get the same result."""
        most = len(self.prompts) * self.samples_per_prompt * self.params.max_new_tokens
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
        return Accuracy(correct / len(samples), tokens / len(samples))


def gap_recovered(student: float, start: float, teacher: float) -> float | None:
    """(student - start) / (teacher - start); None where there is no gap to close."""
    return (student - start) / (teacher - start) if teacher > start else None
