"""Accuracy on held-out prompts, and how much of the gap to the teacher is closed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opd_titan.config import JobConfig
from opd_titan.data.grading import grade
from opd_titan.data.prompts import build_prompts
from opd_titan.data.types import Prompt
from opd_titan.distributed.world import Axis
from opd_titan.errors import DataError
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
    """What the student is measured against. None: not measured."""

    start: float | None = None
    teacher: float | None = None


class Validator:
    """Grades a model's responses to the same prompts, with the same random numbers, each time.

    Args:
        prompts: each with an answer.
        seed: of the sampling, when it is not greedy.
        teacher: what tells this job's teacher from another; None: it has none.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        params: SamplingParams,
        seed: int,
        decode: Callable[[list[int]], str],
        dp: Axis,
        teacher: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.prompts, self.samples_per_prompt, self.params = prompts, samples_per_prompt, params
        self.seed, self.decode, self.dp = seed, decode, dp
        self.baselines = Baselines()
        self.trained_on = 0  # how many of the prompts are training prompts too

    def warn_if_not_held_out(self) -> None:
        # A few questions stand in both splits of many sets; more is a mistake in the recipe.
        if self.trained_on > 0.01 * len(self.prompts):
            logger.warning(
                "Validation: %s of %s prompts are training prompts too, so its accuracy is not "
                "that of held-out prompts; see validation.path and validation.split",
                self.trained_on,
                len(self.prompts),
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
        held_out = repr([(p.token_ids, p.answer) for p in self.prompts])
        return {
            "teacher": self.teacher,
            "prompts": hashlib.sha256(held_out.encode()).hexdigest(),
            "samples_per_prompt": self.samples_per_prompt,
            **asdict(self.params),
        }

    def measure_teacher(self, generator: Generator, on_tokens: OnTokens = _only_the_bar) -> None:
        self.baselines.teacher, _ = self._measure(generator, "teacher", on_tokens)

    def measure_student(
        self, generator: Generator, step: int, on_tokens: OnTokens = _only_the_bar
    ) -> dict[str, float]:
        """`validation/*` scalars of the student as it is now; step 0 sets the start."""
        accuracy, tokens = self._measure(generator, "student", on_tokens)
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

    def _measure(self, generator: Generator, name: str, on_tokens: OnTokens) -> tuple[float, float]:
        """Accuracy over prompts and samples, and mean response tokens. The same on all ranks."""
        mine = len(self.prompts[self.dp.rank :: self.dp.size]) * self.samples_per_prompt
        most = mine * self.params.max_new_tokens
        with progress(most, f"validate {name}", "tok", rank=dist.get_rank()) as bar:
            samples = sample_responses(
                generator,
                self.prompts,
                self.samples_per_prompt,
                self.params,
                (self.seed, VALIDATION_STREAM),
                self.dp,
                on_tokens(bar),
            )
        correct = sum(bool(grade(self.decode(s.response_ids), s.prompt.answer)) for s in samples)
        tokens = sum(len(s.response_ids) for s in samples)
        return correct / len(samples), tokens / len(samples)


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
    training_prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    dp: Axis,
    teacher: str | None,
) -> Validator:
    """The validator that `[validation]` asks for.

    Args:
        teacher: what tells this job's teacher from another; None: it has none.

    Raises:
        DataError: the set cannot be read, or has prompts without an answer.
    """
    c, v = config, config.validation
    held_out = build_prompts(
        dataset=v.dataset or c.data.dataset,
        path=v.path or c.data.path,
        split=v.split,
        max_prompts=v.max_prompts,
        keep_responses=False,
        section="validation",
        **options,
    )
    if any(p.answer is None for p in held_out.prompts):
        raise DataError(
            f"validation: {held_out.source} has prompts without an answer to grade; give "
            f"validation.dataset and validation.path a set with answers, or set "
            f"validation.enable = false"
        )
    params = SamplingParams(v.max_new_tokens or c.rollout.max_new_tokens, v.temperature)
    validator = Validator(
        held_out.prompts, v.samples_per_prompt, params, c.training.seed, decode, dp, teacher
    )
    trained_on = {p.text for p in training_prompts}
    validator.trained_on = sum(p.text in trained_on for p in held_out.prompts)
    return validator
