"""Accuracy on held-out prompts, and how much of the gap to the teacher is closed."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opd_titan.config import JobConfig
from opd_titan.config.job_config import ValidationSet
from opd_titan.config.sets import teacher_role, validation_sets
from opd_titan.data.cache import Prompts
from opd_titan.data.prompts import build_prompts
from opd_titan.data.types import Sample
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.world import Axis
from opd_titan.errors import DataError
from opd_titan.evaluation.metrics import (
    ByPrompt,
    Comparison,
    HeldOut,
    Measurement,
    SetResult,
    percent,
)
from opd_titan.grading.answers import after_prompt
from opd_titan.grading.graders import Grade, Grader, load_grader
from opd_titan.observability.progress import Bar, progress
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

logger = logging.getLogger("opd_titan")

# From a progress bar to what a rollout calls with the tokens just sampled.
OnTokens = Callable[[Bar], Callable[[int], None]]


def _only_the_bar(bar: Bar) -> Callable[[int], None]:
    return bar.update


# Keeps validation's random numbers apart from those of any training step.
VALIDATION_STREAM = 1 << 62


@dataclass
class Baselines:
    """What the student is measured against, by set the mean score of each prompt. None: not
    measured."""

    start: list[ByPrompt] | None = None
    teacher: list[ByPrompt] | None = None


class Validator:
    """Grades a model's responses to the same prompts, with the same random numbers, each time.

    Args:
        sets: of prompts with answers. Each counts the same.
        seed: of the sampling, when it is not greedy.
        teacher: what tells this job's teachers from others; None: it has none.
    """

    def __init__(
        self,
        sets: Sequence[HeldOut],
        samples_per_prompt: int,
        params: SamplingParams,
        seed: int,
        decode: Callable[[list[int]], str],
        dp: Axis,
        teacher: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.sets, self.samples_per_prompt, self.params = sets, samples_per_prompt, params
        self.seed, self.decode, self.dp = seed, decode, dp
        self.baselines = Baselines()
        self._of_teachers: dict[str, ByPrompt] = {}  # by set, as far as measured

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return max(len(p.token_ids) for held_out in self.sets for p in held_out.prompts)

    def warn_if_not_held_out(self) -> None:
        for held_out in self.sets:
            # A few questions stand in both splits of many sets; more is a mistake in the recipe.
            if held_out.trained_on > 0.01 * len(held_out.prompts):
                logger.warning(
                    "Validation%s: %s of %s prompts are training prompts too, so its accuracy is "
                    "not that of held-out prompts; see validation.path and validation.split",
                    f" on {held_out.name}" if held_out.name else "",
                    held_out.trained_on,
                    len(held_out.prompts),
                )

    def state_dict(self) -> dict[str, Any]:
        """The baselines and what they depend on; plain JSON values."""
        return {"measured_by": self._measured_by(), "baselines": asdict(self.baselines)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take the baselines over where they still compare. None: nothing was validated then."""
        if state is not None and state["measured_by"] == self._measured_by():
            self.baselines = Baselines(**state["baselines"])
        else:
            logger.warning(
                "What is validated, or the teacher, changed since the checkpoint: its start and "
                "teacher accuracies do not compare with today's; no gap_recovered from here on"
            )

    def _measured_by(self) -> dict[str, Any]:
        sets = []
        for s in self.sets:
            held_out = repr([(p.token_ids, p.answer) for p in s.prompts])
            sets.append([s.name, s.grader.name, hashlib.sha256(held_out.encode()).hexdigest()])
        return {
            "teacher": self.teacher,
            "sets": sets,
            "samples_per_prompt": self.samples_per_prompt,
            **asdict(self.params),
        }

    def measure_teacher(
        self, generator: Generator, role: str = "teacher", on_tokens: OnTokens = _only_the_bar
    ) -> None:
        """On its own sets. There are baselines when every teacher has been measured."""
        own = [s for s in self.sets if s.teacher == role]
        for result in self.measure(generator, role, on_tokens, own).sets:
            self._of_teachers[result.held_out.name] = result.by_prompt
        if all(s.name in self._of_teachers for s in self.sets):
            self.baselines.teacher = [self._of_teachers[s.name] for s in self.sets]

    def measure_student(
        self, generator: Generator, step: int, on_tokens: OnTokens = _only_the_bar
    ) -> dict[str, float]:
        """`validation/*` scalars of the student as it is now; step 0 sets the start."""
        measured = self.measure(generator, "student", on_tokens)
        student = measured.by_prompt
        if step == 0:
            self.baselines.start = student
        scalars = measured.scalars()
        text = f"Validation at step {step}: student {measured.accuracy:.1%}"
        text += f" ({percent(measured.interval)})"
        start, teacher = self.baselines.start, self.baselines.teacher
        if start is not None and teacher is not None:
            compared = Comparison(student, start, teacher)
            scalars |= compared.scalars()
            text += compared.text()
            if len(self.sets) > 1:
                for i, s in enumerate(self.sets):
                    scalars |= compared.of_set(i).scalars(f"validation/{s.name}/")
        logger.info("%s", text)
        if len(self.sets) > 1:
            by_set = (f"{s.held_out.name} {s.accuracy:.1%}" for s in measured.sets)
            logger.info("Validation at step %s by set: %s", step, ", ".join(by_set))
        return scalars

    def measure(
        self,
        generator: Generator,
        name: str,
        on_tokens: OnTokens = _only_the_bar,
        sets: Sequence[HeldOut] | None = None,
    ) -> Measurement:
        """Sample and grade; the same on all ranks, and all call.

        Args:
            sets: None: all.

        Raises:
            ConfigError: of a user's own grader.
        """
        results = []
        for held_out in self.sets if sets is None else sets:
            samples = self._sample(held_out, generator, name, on_tokens)
            results.append(SetResult(held_out, samples, self._grade(held_out, samples)))
        return Measurement(results)

    def _sample(
        self, held_out: HeldOut, generator: Generator, name: str, on_tokens: OnTokens
    ) -> list[Sample]:
        mine = len(held_out.prompts[self.dp.rank :: self.dp.size]) * self.samples_per_prompt
        most = mine * self.params.max_new_tokens
        label = f"validate {name} {held_out.name}".strip()
        # By name, so that a set's numbers do not depend on which others there are. Without: 0.
        stream = VALIDATION_STREAM + zlib.crc32(held_out.name.encode())
        with progress(most, label, "tok", rank=dist.get_rank()) as bar:
            return sample_responses(
                generator,
                held_out.prompts,
                self.samples_per_prompt,
                self.params,
                (self.seed, stream),
                self.dp,
                on_tokens(bar),
            )

    def _grade(self, held_out: HeldOut, samples: list[Sample]) -> list[Grade]:
        """Each rank its share: a grader may be slow, and where it gives up, so must all ranks."""
        mine: list[tuple[int, Grade]] = []
        with raise_on_all_ranks():
            for i in range(self.dp.rank, len(samples), self.dp.size):
                prompt, response = samples[i].prompt, self.decode(samples[i].response_ids)
                assert prompt.answer is not None  # `_read_set` lets none pass
                graded = after_prompt(prompt.text, response)
                mine.append((i, held_out.grader(graded, prompt.answer)))
        return [grade for _, grade in sorted(gather_lists(mine, self.dp))]


def prompt_options(config: JobConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What training and validation prompts are built with alike."""
    return {
        "template": config.data.template,
        "enable_thinking": config.data.enable_thinking,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "tokenizer": tokenizer,
    }


def build_validator(
    config: JobConfig,
    options: dict[str, Any],
    training_sets: Sequence[Prompts],
    decode: Callable[[list[int]], str],
    dp: Axis,
    teacher: str | None,
) -> Validator:
    """The validator that `[validation]` asks for.

    Args:
        teacher: what tells this job's teachers from others; None: it has none.

    Raises:
        ConfigError: a grader that is not there.
        DataError: a set cannot be read, or has prompts without an answer, or with one that its
            grader cannot grade.
    """
    c, v = config, config.validation
    sets = [
        _read_set(row, f"validation.sets[{i}]" if v.sets else "validation", options, training_sets)
        for i, row in enumerate(validation_sets(config))
    ]
    params = SamplingParams(v.max_new_tokens or c.rollout.max_new_tokens, v.temperature)
    return Validator(sets, v.samples_per_prompt, params, c.training.seed, decode, dp, teacher)


def _read_set(
    row: ValidationSet, section: str, options: dict[str, Any], training_sets: Sequence[Prompts]
) -> HeldOut:
    grader = load_grader(row.grader, f"{section}.grader")
    found = build_prompts(
        dataset=row.dataset,
        path=row.path,
        split=row.split,
        max_prompts=row.max_prompts,
        keep_responses=False,
        answer_problem=lambda answer: _answer_problem(grader, answer),
        section=section,
        **options,
    )
    prompts = found.prompts
    if any(p.answer is None for p in prompts):
        raise DataError(
            f"{section}: {found.source} has prompts without an answer to grade; give "
            f"{section}.dataset and {section}.path a set with answers, or set "
            f"validation.enable = false"
        )
    texts = [p.text for p in prompts]
    trained_on = set().union(*(s.texts_among(texts) for s in training_sets))
    known = sum(text in trained_on for text in texts)
    return HeldOut(row.name, prompts, grader, found.source, known, teacher_role(row.teacher))


def _answer_problem(grader: Grader, answer: str) -> str:
    if grader.can_grade(answer):
        return ""
    return f"the answer {answer[:60]!r} is none that grader {grader.name} knows: {grader.golds}"
