"""What a model's graded responses to the held-out prompts say: accuracies and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from opd_titan.data.types import Prompt, Sample
from opd_titan.evaluation.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_interval,
    gap_recovered,
    ks_of,
    mean_interval,
    paired_p_value,
    pass_at_k,
    prompt_means,
)
from opd_titan.grading.graders import Grade, Grader

NOISE = 0.05  # a difference that chance alone makes this often is within noise
ByPrompt = list[float]  # mean score of each prompt of a set


@dataclass(frozen=True)
class HeldOut:
    """One set to validate on.

    Attributes:
        name: empty for the only one.
        source: where it comes from, for people.
        trained_on: how many of the prompts are training prompts too.
        teacher: among the job's models, whom the student is measured against.
    """

    name: str
    prompts: Sequence[Prompt]
    grader: Grader
    source: str = ""
    trained_on: int = 0
    teacher: str = "teacher"


@dataclass(frozen=True)
class SetResult:
    """A model's responses to one set, in the order of the prompts, then of the sample index."""

    held_out: HeldOut
    samples: list[Sample]
    grades: list[Grade]

    @property
    def scores_PN(self) -> list[list[float]]:
        """[prompts, samples of each]."""
        values = [float(grade.score) for grade in self.grades]
        n = len(values) // len(self.held_out.prompts)
        return [values[i : i + n] for i in range(0, len(values), n)]

    @property
    def by_prompt(self) -> ByPrompt:
        return prompt_means(self.scores_PN).tolist()

    @property
    def accuracy(self) -> float:
        return sum(float(grade.score) for grade in self.grades) / len(self.grades)

    @property
    def interval(self) -> Interval:
        return accuracy_interval(self.scores_PN)

    @property
    def response_tokens_mean(self) -> float:
        return sum(len(s.response_ids) for s in self.samples) / len(self.samples)

    @property
    def truncated_fraction(self) -> float:
        return sum(s.finish_reason == "length" for s in self.samples) / len(self.samples)

    @property
    def pass_at(self) -> dict[int, float]:
        """By k, mean over prompts; a response passes with full marks. Empty for one sample."""
        prompts = len(self.held_out.prompts)
        n = len(self.grades) // prompts
        passed = [grade.correct for grade in self.grades]
        counts = [sum(passed[i : i + n]) for i in range(0, len(passed), n)]
        ks = ks_of(n) if n > 1 else []
        return {k: sum(pass_at_k(c, n, k) for c in counts) / prompts for k in ks}


@dataclass(frozen=True)
class Measurement:
    """A model's results on all sets, each of which counts the same."""

    sets: list[SetResult]

    @property
    def by_prompt(self) -> list[ByPrompt]:
        return [s.by_prompt for s in self.sets]

    @property
    def accuracy(self) -> float:
        """The plain mean of the sets' accuracies."""
        return _mean([s.accuracy for s in self.sets])

    @property
    def interval(self) -> Interval:
        if len(self.sets) == 1:
            return self.sets[0].interval
        return mean_interval([s.accuracy for s in self.sets], [s.interval for s in self.sets])

    @property
    def pass_at(self) -> dict[int, float]:
        by_set = [s.pass_at for s in self.sets]
        return {k: _mean([found[k] for found in by_set]) for k in by_set[0]}

    def scalars(self) -> dict[str, float]:
        """`validation/*`: of all sets together and, where there are several, of each."""
        found = _scalars("validation/", self)
        if len(self.sets) > 1:
            for s in self.sets:
                found |= _scalars(f"validation/{s.held_out.name}/", Measurement([s]))
        return found


def _scalars(prefix: str, measured: Measurement) -> dict[str, float]:
    low, high = measured.interval
    found = {
        "accuracy": measured.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "response_tokens_mean": _mean([s.response_tokens_mean for s in measured.sets]),
    }
    found |= {f"pass_at_{k}": value for k, value in measured.pass_at.items() if k > 1}
    return {prefix + name: value for name, value in found.items()}


@dataclass(frozen=True)
class Comparison:
    """Student, start and teacher on the same prompts, under the same conditions.

    Args:
        student, start, teacher: by set, the mean score of each prompt.
    """

    student: list[ByPrompt]
    start: list[ByPrompt]
    teacher: list[ByPrompt]

    @property
    def accuracies(self) -> np.ndarray:
        """(student, start, teacher): plain means over sets."""
        return np.mean([scores_PM.mean(axis=0) for scores_PM in self._sets()], axis=0)

    @property
    def gap(self) -> float | None:
        """Share of the way from start to teacher; None where the teacher is not better."""
        share = float(gap_recovered(self.accuracies))
        return share if np.isfinite(share) else None

    @cached_property
    def gap_interval(self) -> Interval | None:
        """None where the data do not bound it: the teacher may be no better than the start."""
        if self.gap is None:
            return None
        return bootstrap_interval(self._sets(), gap_recovered)

    def chance(self, model: str, other: str) -> float:
        """How often chance alone parts these two as far; both are names of attributes."""
        pairs = zip(getattr(self, model), getattr(self, other), strict=True)
        return paired_p_value([np.subtract(a, b) for a, b in pairs])

    def of_set(self, i: int) -> Comparison:
        return Comparison([self.student[i]], [self.start[i]], [self.teacher[i]])

    def scalars(self, prefix: str = "validation/") -> dict[str, float]:
        found = {f"{prefix}teacher_accuracy": float(self.accuracies[2])}
        if self.gap is not None:
            found[f"{prefix}gap_recovered"] = self.gap
        if self.gap_interval is not None:
            low, high = self.gap_interval
            found |= {f"{prefix}gap_recovered_low": low, f"{prefix}gap_recovered_high": high}
        return found

    def text(self) -> str:
        """For the console, after the student's own figure."""
        start, teacher = self.accuracies[1:]
        text = f", start {start:.1%}, teacher {teacher:.1%}"
        if self.gap is None:
            return text
        text += f", gap recovered {self.gap:.1%}"
        if self.student == self.start:
            return text
        if self.gap_interval is not None:
            text += f" ({percent(self.gap_interval)})"
        if (p := self.chance("teacher", "start")) >= NOISE:
            text += f"; the teacher is within noise of the start (p = {p:.2f})"
        elif (p := self.chance("student", "start")) >= NOISE:
            text += f"; within noise of the start (p = {p:.2f})"
        return text

    def _sets(self) -> list[np.ndarray]:
        """By set, [prompts, (student, start, teacher)]."""
        models = zip(self.student, self.start, self.teacher, strict=True)
        return [np.array(scores).T for scores in models]


def percent(interval: Interval) -> str:
    """As "71.8 to 83.2"."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
