"""Measure accuracy on held-out prompts, and the recovered share of the gap to the teacher."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opd_titan.config.job_config import Data, ValidationSet
from opd_titan.config.resolve import ResolvedJob
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
from opd_titan.grading.graders import Grade, load_grader
from opd_titan.observability.progress import Bar, progress
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

logger = logging.getLogger("opd_titan")

# Takes a progress bar; returns a function that a rollout calls with the number of sampled tokens.
OnTokens = Callable[[Bar], Callable[[int], None]]

# Takes the place of the step in the keys of random numbers. No training step has this number.
VALIDATION_STREAM = 1 << 62


def _update_bar(bar: Bar) -> Callable[[int], None]:
    return bar.update


@dataclass
class Baselines:
    """The models that the student is compared with: for each set, the mean score of each prompt.

    None: not measured yet.
    """

    start: list[ByPrompt] | None = None
    teacher: list[ByPrompt] | None = None


class Validator:
    """Measure models on the validation sets, always with the same prompts and random numbers.

    Args:
        sets: validation sets of prompts with gold answers. They have equal weight.
        samples_per_prompt: responses to each prompt.
        params: sampling parameters.
        seed: the seed of the sampling.
        decode: returns the text of token ids.
        dp: the data-parallel ranks, which share the work.
        teacher: identifies the job's teachers, so that the baselines of other teachers are not
            taken from a checkpoint; None if there is no teacher.
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
        self.sets, self.samples_per_prompt, self.params = sets, samples_per_prompt, params
        self.seed, self.decode, self.dp, self.teacher = seed, decode, dp, teacher
        self.baselines = Baselines()
        self._teacher_scores: dict[str, ByPrompt] = {}  # by the names of the sets measured so far

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return max(len(p.token_ids) for held_out in self.sets for p in held_out.prompts)

    def warn_if_not_held_out(self) -> None:
        """Log a warning for each set that shares more than 1 % of its prompts with training."""
        for s in self.sets:
            # Many public data sets repeat a few questions in both splits.
            if s.trained_on > 0.01 * len(s.prompts):
                logger.warning(
                    "Validation%s: %s of %s prompts are training prompts too, so its accuracy is "
                    "not that of held-out prompts; see validation.path and validation.split",
                    f" on {s.name}" if s.name else "",
                    s.trained_on,
                    len(s.prompts),
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the baselines and the conditions that they depend on, as JSON values."""
        return {"measured_by": self._conditions(), "baselines": asdict(self.baselines)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the baselines if they were measured under the same conditions.

        Args:
            state: from `state_dict`; None if the run that was saved did not validate.
        """
        if state is not None and state["measured_by"] == self._conditions():
            self.baselines = Baselines(**state["baselines"])
        else:
            logger.warning(
                "Validation or the teacher changed since the checkpoint, so the accuracies of the "
                "start and the teacher cannot be compared any more: gap_recovered is not reported"
            )

    def _conditions(self) -> dict[str, Any]:
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
        self, generator: Generator, role: str = "teacher", on_tokens: OnTokens = _update_bar
    ) -> None:
        """Measure a teacher on the sets on which the student is compared with this teacher.

        The baseline is complete when every set has been measured.
        """
        sets = [s for s in self.sets if s.teacher == role]
        for result in self.measure(generator, role, on_tokens, sets).sets:
            self._teacher_scores[result.held_out.name] = result.by_prompt
        if len(self._teacher_scores) == len(self.sets):
            self.baselines.teacher = [self._teacher_scores[s.name] for s in self.sets]

    def measure_student(
        self, generator: Generator, step: int, on_tokens: OnTokens = _update_bar
    ) -> dict[str, float]:
        """Measure the student, log the result and return the `validation/*` scalars.

        Later results are compared with the result at step 0, the start.
        """
        measured = self.measure(generator, "student", on_tokens)
        if step == 0:
            self.baselines.start = measured.by_prompt
        scalars = measured.scalars()
        text = f"student {measured.accuracy:.1%} ({percent(measured.interval)})"
        start, teacher = self.baselines.start, self.baselines.teacher
        if start is not None and teacher is not None:
            compared = Comparison(measured.by_prompt, start, teacher)
            scalars |= compared.scalars()
            text += compared.text()
            if len(self.sets) > 1:
                for s, alone in zip(self.sets, compared.each, strict=True):
                    scalars |= alone.scalars(f"validation/{s.name}/")
        logger.info("Validation at step %s: %s", step, text)
        if len(self.sets) > 1:
            by_set = (f"{s.held_out.name} {s.accuracy:.1%}" for s in measured.sets)
            logger.info("Validation at step %s by set: %s", step, ", ".join(by_set))
        return scalars

    def measure(
        self,
        generator: Generator,
        name: str,
        on_tokens: OnTokens = _update_bar,
        sets: Sequence[HeldOut] | None = None,
    ) -> Measurement:
        """Sample and grade responses. All ranks call, and all get the same result.

        Args:
            name: the model's name, for the progress bar.
            sets: the sets to measure on; None for all.

        Raises:
            ConfigError: the user's own grader failed.
        """
        results = []
        for held_out in self.sets if sets is None else sets:
            samples = self._sample(held_out, generator, name, on_tokens)
            results.append(SetResult(held_out, samples, self._grade(held_out, samples)))
        return Measurement(results)

    def _sample(
        self, held_out: HeldOut, generator: Generator, name: str, on_tokens: OnTokens
    ) -> list[Sample]:
        own_prompts = len(held_out.prompts[self.dp.rank :: self.dp.size])
        most_tokens = own_prompts * self.samples_per_prompt * self.params.max_new_tokens
        label = f"validate {name} {held_out.name}".strip()
        # By name, so that a set's random numbers do not depend on the other sets.
        stream = VALIDATION_STREAM + zlib.crc32(held_out.name.encode())
        with progress(most_tokens, label, "tok", rank=dist.get_rank()) as bar:
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
        """Grade a share of the samples on each rank, and gather the grades."""
        mine: list[tuple[int, Grade]] = []
        with raise_on_all_ranks():
            for i in range(self.dp.rank, len(samples), self.dp.size):
                prompt, response = samples[i].prompt, self.decode(samples[i].response_ids)
                assert prompt.answer is not None  # checked by `_read_set`
                response = after_prompt(prompt.text, response)
                mine.append((i, held_out.grader(response, prompt.answer)))
        return [grade for _, grade in sorted(gather_lists(mine, self.dp))]


def prompt_options(data: Data, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the options of `build_prompts` that training and validation share."""
    return {
        "template": data.template,
        "enable_thinking": data.enable_thinking,
        "max_prompt_tokens": data.max_prompt_tokens,
        "tokenizer": tokenizer,
    }


def build_validator(
    job: ResolvedJob,
    options: dict[str, Any],
    training_sets: Sequence[Prompts],
    decode: Callable[[list[int]], str],
    dp: Axis,
    teacher: str | None,
) -> Validator:
    """Read the job's validation sets and return their validator.

    Args:
        options: from `prompt_options`.
        training_sets: to count the validation prompts that are among them.
        decode, dp, teacher: see `Validator`.

    Raises:
        ConfigError: a grader cannot be loaded.
        DataError: a set cannot be read, or has a prompt without an answer that its grader can
            grade.
    """
    config, v = job.config, job.config.validation
    sets = [
        _read_set(row, f"validation.sets[{i}]" if v.sets else "validation", options, training_sets)
        for i, row in enumerate(job.validation_sets)
    ]
    params = SamplingParams(v.max_new_tokens or config.rollout.max_new_tokens, v.temperature)
    seed = config.training.seed
    return Validator(sets, v.samples_per_prompt, params, seed, decode, dp, teacher)


def _read_set(
    row: ValidationSet, section: str, options: dict[str, Any], training_sets: Sequence[Prompts]
) -> HeldOut:
    grader = load_grader(row.grader, f"{section}.grader")

    def answer_problem(answer: str) -> str:
        if grader.can_grade(answer):
            return ""
        return (
            f"the answer {answer[:60]!r} cannot be graded by {grader.name}; expected {grader.golds}"
        )

    found = build_prompts(
        dataset=row.dataset,
        path=row.path,
        split=row.split,
        max_prompts=row.max_prompts,
        keep_responses=False,
        answer_problem=answer_problem,
        section=section,
        **options,
    )
    if any(prompt.answer is None for prompt in found.prompts):
        raise DataError(
            f"{section}: {found.source} has prompts without an answer to grade; give "
            f"{section}.dataset and {section}.path a data set with answers, or set "
            f"validation.enable = false"
        )
    texts = [prompt.text for prompt in found.prompts]
    trained_on = set().union(*(s.texts_among(texts) for s in training_sets))
    shared = sum(text in trained_on for text in texts)
    return HeldOut(row.name, found.prompts, grader, found.source, shared, row.teacher)
