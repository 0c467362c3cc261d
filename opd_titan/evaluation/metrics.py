"""The accuracies of graded responses, and the comparison of the student with its teacher."""

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
    pass_at_k,
)
from opd_titan.grading.graders import Grade, Grader

ByPrompt = list[float]  # the mean score of each prompt of a set


@dataclass(frozen=True)
class HeldOut:
    """A validation set.

    Attributes:
        name: its name in the configuration; empty for the only set.
        source: the file or data set that it was read from, for messages.
        trained_on: number of its prompts that are training prompts too.
        teacher: the role of the teacher that the student is compared with on this set.
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

    @cached_property
    def scores_PN(self) -> np.ndarray:
        """Scores [prompts, samples per prompt], float64."""
        scores = np.array([grade.score for grade in self.grades], dtype=np.float64)
        return scores.reshape(len(self.held_out.prompts), -1)

    @property
    def by_prompt(self) -> ByPrompt:
        return self.scores_PN.mean(axis=1).tolist()

    @property
    def accuracy(self) -> float:
        return sum(float(grade.score) for grade in self.grades) / len(self.grades)

    @property
    def response_tokens_mean(self) -> float:
        return sum(len(s.response_ids) for s in self.samples) / len(self.samples)

    @property
    def truncated_fraction(self) -> float:
        return sum(s.finish_reason == "length" for s in self.samples) / len(self.samples)

    @property
    def pass_at(self) -> dict[int, float]:
        """pass@k by k, the mean over prompts; empty if there is one sample per prompt.

        A response passes with the full score.
        """
        n = self.scores_PN.shape[1]
        counts = (self.scores_PN >= 1.0).sum(axis=1).tolist()
        ks = ks_of(n) if n > 1 else []
        return {k: _mean([pass_at_k(c, n, k) for c in counts]) for k in ks}


@dataclass(frozen=True)
class Measurement:
    """A model's results on one or more sets, which have equal weight."""

    sets: list[SetResult]

    @property
    def by_prompt(self) -> list[ByPrompt]:
        return [s.by_prompt for s in self.sets]

    @property
    def accuracy(self) -> float:
        """The plain mean of the sets' accuracies."""
        return _mean([s.accuracy for s in self.sets])

    @cached_property
    def interval(self) -> Interval:
        return accuracy_interval([s.scores_PN for s in self.sets])

    @property
    def pass_at(self) -> dict[int, float]:
        by_set = [s.pass_at for s in self.sets]
        return {k: _mean([found[k] for found in by_set]) for k in by_set[0]}

    @property
    def each(self) -> list[Measurement]:
        """The measurement of each set alone."""
        return [Measurement([s]) for s in self.sets]

    def scalars(self, prefix: str = "validation/") -> dict[str, float]:
        """Return the scalars of the mean over sets and, if there are several, of each set."""
        low, high = self.interval
        found = {
            f"{prefix}accuracy": self.accuracy,
            f"{prefix}accuracy_low": low,
            f"{prefix}accuracy_high": high,
            f"{prefix}response_tokens_mean": _mean([s.response_tokens_mean for s in self.sets]),
        }
        found |= {f"{prefix}pass_at_{k}": value for k, value in self.pass_at.items() if k > 1}
        if len(self.sets) > 1:
            for alone in self.each:
                found |= alone.scalars(f"{prefix}{alone.sets[0].held_out.name}/")
        return found


@dataclass(frozen=True)
class Comparison:
    """The student, its start (step 0) and its teacher on the same prompts.

    Attributes:
        student, start, teacher: for each set, the mean score of each prompt.
    """

    student: list[ByPrompt]
    start: list[ByPrompt]
    teacher: list[ByPrompt]

    @cached_property
    def _sets(self) -> list[np.ndarray]:
        """For each set, scores [prompts, (student, start, teacher)]."""
        models = zip(self.student, self.start, self.teacher, strict=True)
        return [np.array(scores).T for scores in models]

    @property
    def accuracies(self) -> np.ndarray:
        """Plain means over sets [(student, start, teacher)]."""
        return np.mean([scores_PM.mean(axis=0) for scores_PM in self._sets], axis=0)

    @property
    def gap(self) -> float | None:
        """The gap recovered, (student - start) / (teacher - start); None if there is no gap."""
        share = float(gap_recovered(self.accuracies))
        return share if np.isfinite(share) else None

    @cached_property
    def gap_interval(self) -> Interval | None:
        """The interval of `gap`; None if the teacher may be no better than the start."""
        if self.gap is None:
            return None
        interval = bootstrap_interval(self._sets, gap_recovered)
        return interval if np.isfinite(interval).all() else None

    def within_noise(self, model: str, other: str) -> bool:
        """Return whether the interval of the difference of two models' accuracies contains 0.

        Args:
            model, other: "student", "start" or "teacher".
        """
        names = ["student", "start", "teacher"]
        i, j = names.index(model), names.index(other)
        low, high = bootstrap_interval(self._sets, lambda means: means[:, i] - means[:, j])
        return low <= 0.0 <= high

    @property
    def each(self) -> list[Comparison]:
        """The comparison on each set alone."""
        models = zip(self.student, self.start, self.teacher, strict=True)
        return [Comparison([student], [start], [teacher]) for student, start, teacher in models]

    def scalars(self, prefix: str = "validation/") -> dict[str, float]:
        """Return the teacher's accuracy and, if there is a gap, the gap recovered."""
        found = {f"{prefix}teacher_accuracy": float(self.accuracies[2])}
        if self.gap is not None:
            found[f"{prefix}gap_recovered"] = self.gap
        if self.gap_interval is not None:
            low, high = self.gap_interval
            found |= {f"{prefix}gap_recovered_low": low, f"{prefix}gap_recovered_high": high}
        return found

    def text(self) -> str:
        """Return the comparison in words, to follow the student's accuracy in the log."""
        start, teacher = self.accuracies[1:]
        text = f", start {start:.1%}, teacher {teacher:.1%}"
        if self.gap is None:
            return text
        text += f", gap recovered {self.gap:.1%}"
        if self.student == self.start:
            return text
        if self.gap_interval is not None:
            text += f" ({percent(self.gap_interval)})"
        if self.within_noise("teacher", "start"):
            text += "; the teacher is within noise of the start"
        elif self.within_noise("student", "start"):
            text += "; the student is within noise of the start"
        return text


def percent(interval: Interval) -> str:
    """Return an interval as "71.8 to 83.2", in percent."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
