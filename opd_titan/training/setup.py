"""Check everything about a job that needs no weights, then open its dump folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opd_titan.checkpoint.checkpointer import inspect_checkpoint
from opd_titan.checkpoint.publish import clear_leftovers, link_latest
from opd_titan.checkpoint.steps import (
    agree_on_step,
    complete_steps,
    config_error_if_unwritable,
    open_folder,
)
from opd_titan.config import RECIPE_FILE, to_toml
from opd_titan.config.resolve import ResolvedJob
from opd_titan.data.loader import PromptLoader
from opd_titan.data.prompts import PromptSet, build_prompts, given_response
from opd_titan.data.templates import template_warning
from opd_titan.data.tokenizer import eos_warning
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.optim import learning_rate
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.distributed.heartbeat import set_phase
from opd_titan.distributed.world import World, axes, build_world, init_world
from opd_titan.errors import CheckpointError, ConfigError, Fault, ModelError
from opd_titan.evaluation.validator import Validator, build_validator, prompt_options
from opd_titan.grading.graders import load_grader
from opd_titan.models.transforms import has_cpp_compiler
from opd_titan.observability.logging import init_logging
from opd_titan.training.fingerprint import Fingerprint, differences, fingerprint
from opd_titan.training.sources import ModelSource, check_lengths, inspect_models

logger = logging.getLogger("opd_titan")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        step: the step whose checkpoint it resumes from; 0 for a new run.
        reason: why that step, for the log.
        state: what that checkpoint contains besides tensors; None for a new run.
    """

    step: int
    reason: str
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Setup:
    """A job that has passed its checks.

    Attributes:
        sources: the models by role, the student first.
        decode: returns the text of token ids, without special tokens.
        grade: returns the score of a response, given the answer; for written rollouts.
        validator: None if validation is off.
    """

    job: ResolvedJob
    world: World
    sources: dict[str, ModelSource]
    decode: Callable[[list[int]], str]
    grade: Callable[[str, str], bool | float | None]
    prompt_sets: list[PromptSet]
    loader: PromptLoader
    validator: Validator | None
    total_steps: int
    fingerprint: Fingerprint

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.sources["student"].tokenizer

    @property
    def checkpoints(self) -> Path:
        return self.job.folder / "checkpoint"

    def learning_rate(self, step: int) -> float:
        """Return the scheduled learning rate of a step, counted from 1."""
        c = self.job.config
        return learning_rate(step, self.total_steps, c.optimizer.lr, c.lr_scheduler)

    def given_response(self, prompt: Prompt) -> Sample:
        """Return the data set's own response to a prompt."""
        limit = self.job.config.rollout.max_new_tokens
        return given_response(prompt, self.tokenizer, self.sources["student"].eos_ids, limit)


def set_up(job: ResolvedJob) -> tuple[Setup, Start]:
    """Join the world, check models, data and checkpoints, then open the dump folder.

    Raises:
        UserError: a check failed. Nothing has been written, unless the dump folder itself is at
            fault.
    """
    world = join_world(job)
    # A node without a cache of the prompts may take much longer than the others.
    with raise_on_all_ranks(wait=True):
        setup = _inspect(job, world)
        if job.config.watchdog.action == "stop":
            for text in _mismatches(setup):
                raise ModelError(f"watchdog.action is stop: {text}")
    start = _find_start(setup)
    _open_folder(setup)
    _log_findings(setup)
    return setup, start


def join_world(job: ResolvedJob) -> World:
    """Start the process group and build the mesh.

    Raises:
        ConfigError: layers are to be compiled, but there is no compiler.
    """
    set_phase("the meeting of all ranks")
    device = init_world(job.config.comm.init_timeout_seconds)
    if job.compiled and device.type == "cpu" and not has_cpp_compiler():
        raise ConfigError(
            '[compile] enable: "on", but no C++ compiler found (g++, or what CXX names); install '
            'one, or set it to "off"'
        )
    init_logging(None, dist.get_rank())
    layout = job.layout
    return build_world(device, layout.replicate, layout.shard, layout.tensor)


def _inspect(job: ResolvedJob, world: World) -> Setup:
    """Check everything except the weights: models, tokenizers and data."""
    config = job.config
    sources = inspect_models(job)
    tokenizer = sources["student"].tokenizer
    decode: Any = partial(tokenizer.decode, skip_special_tokens=True)  # a str for one text
    options = prompt_options(config.data, tokenizer)
    prompt_sets = _read_data(job, options)
    loader = PromptLoader(
        [s.prompts for s in prompt_sets],
        weights=[row.weight for row in job.data_sets],
        prompts_per_step=config.rollout.prompts_per_step,
        seed=config.training.seed,
        shuffle=config.data.shuffle,
    )
    longest = max(s.prompts.longest for s in prompt_sets)
    check_lengths(sources.values(), longest, config.rollout.max_new_tokens, "rollout")
    epochs = config.training.epochs
    counted = {s.name: (len(s.prompts), s.prompts.digest) for s in prompt_sets}
    found = fingerprint(job, sources, counted)
    validator = None
    if job.validation_sets:
        # A teacher's stop tokens are not in its weights, but they change its accuracy.
        teachers = [
            f"{found[f'{role}.hf_path']['id']} {sorted(sources[role].eos_ids)}"
            for role in job.teachers
        ]
        teacher = "; ".join(teachers) or None
        training_sets = [s.prompts for s in prompt_sets]
        validator = build_validator(job, options, training_sets, decode, world.dp, teacher)
        new_tokens = validator.params.max_new_tokens
        check_lengths(sources.values(), validator.longest, new_tokens, "validation")
    return Setup(
        job=job,
        world=world,
        sources=sources,
        decode=decode,
        grade=load_grader(config.validation.grader, "validation.grader").score,
        prompt_sets=prompt_sets,
        loader=loader,
        validator=validator,
        total_steps=epochs * loader.batches_per_epoch if epochs else config.training.steps,
        fingerprint=found,
    )


def _read_data(job: ResolvedJob, options: dict[str, Any]) -> list[PromptSet]:
    found: list[PromptSet] = []
    for i, row in enumerate(job.data_sets):
        prompt_set = build_prompts(
            dataset=row.dataset,
            path=row.path,
            split=row.split,
            keep_responses=job.config.rollout.on_policy_fraction < 1.0,
            section=f"data.sets[{i}]" if job.config.data.sets else "data",
            # Indices continue from set to set.
            first_index=found[-1].end if found else 0,
            name=row.name,
            teacher=row.teacher,
            **options,
        )
        found.append(prompt_set)
    return found


def _mismatches(setup: Setup) -> Iterator[str]:
    """Yield warnings that student and teacher expect different templates or stop tokens."""
    if setup.job.config.watchdog.action == "off":
        return
    student, data = setup.sources["student"], setup.job.config.data
    for role in setup.job.teachers:
        teacher = setup.sources[role]
        texts = [eos_warning(student.eos_ids, teacher.eos_ids, setup.tokenizer)]
        if data.template == "chat":
            texts.append(template_warning(setup.tokenizer, teacher.tokenizer, data.enable_thinking))
        named = "" if role == "teacher" else f"{role}: "
        yield from (named + text for text in texts if text)


# ------------------------------------------------------------------ checkpoints


def _find_start(setup: Setup) -> Start:
    """Find the step to resume from, check that this job can, and move the loader there."""
    c, folder = setup.job.config.checkpoint, setup.checkpoints
    set_phase(f"the check of {folder}")
    step = agree_on_step(folder, c.load_step if c.enable else 0)
    if step is None:
        if c.load_step == 0:
            return Start(0, "checkpoint.load_step is 0")
        return Start(0, "no complete checkpoint" if c.enable else "checkpoint.enable is false")
    state = _read_state(setup, step)
    with raise_on_all_ranks():
        _check_same_job(folder / f"step-{step}", state, setup)
    newest = c.load_step < 0
    return Start(
        step, "the newest complete checkpoint" if newest else "checkpoint.load_step", state
    )


def roll_back(setup: Setup, last_good: int) -> Start:
    """Return the start of a run that resumes from its newest checkpoint up to step `last_good`.

    Raises:
        Fault: there is no such checkpoint.
    """
    try:
        step = agree_on_step(setup.checkpoints, -1, at_most=last_good)
    except CheckpointError as error:
        raise Fault(f"watchdog: rollback: {error}") from error
    if step is None:
        raise Fault(
            f"watchdog: rollback: {setup.checkpoints} has no checkpoint from before the sign (step "
            f"{last_good} or earlier); lower checkpoint.interval, or raise checkpoint.keep_latest_k"
        )
    state = _read_state(setup, step)
    setup.loader.load_state_dict(state["loader"])
    if dist.get_rank() == 0:
        # The run no longer includes the later exports.
        link_latest(setup.job.folder / "hf", state["exported_at"])
    return Start(step, "watchdog.action is rollback", state)


def _read_state(setup: Setup, step: int) -> dict[str, Any]:
    with torch.device("meta"):
        shapes = setup.sources["student"].build()
    return inspect_checkpoint(setup.checkpoints / f"step-{step}", shapes)


def _check_same_job(path: Path, state: dict[str, Any], setup: Setup) -> None:
    """Raise if the checkpoint belongs to another job, or log the differences; move the loader."""
    allow_changes = setup.job.config.checkpoint.allow_changes
    differ = differences(state["fingerprint"], setup.fingerprint)
    changes = "; ".join(differ.values())
    if differ and not allow_changes:
        raise CheckpointError(
            f"{path}: belongs to a different job: {changes}; set that back, choose another "
            f"job.dump_folder, or continue with --checkpoint.allow_changes"
        )
    if differ:
        logger.warning(
            "%s belongs to a different job (checkpoint.allow_changes): %s", path, changes
        )
    try:
        if any(key.startswith("data.") for key in differ):
            raise CheckpointError("the data differ")
        setup.loader.load_state_dict(state["loader"])
    except CheckpointError as error:
        if not allow_changes:
            raise
        logger.warning("The order of the prompts starts from the beginning: %s", error)


# ------------------------------------------------------------------ dump folder


def _open_folder(setup: Setup) -> None:
    """Create the dump folder, after all checks that are possible without it."""
    config, folder = setup.job.config, setup.job.folder
    resolved = to_toml(config)
    with raise_on_all_ranks(), config_error_if_unwritable(folder):
        if dist.get_rank() == 0:
            _warn_of_foreign_files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        init_logging(folder, dist.get_rank())
        if dist.get_rank() == 0:
            (folder / RECIPE_FILE).write_text(resolved, encoding="utf-8")
            clear_leftovers(folder / "hf")
    if config.checkpoint.enable:
        open_folder(setup.checkpoints)


def _warn_of_foreign_files(folder: Path) -> None:
    """Warn of results without a recipe, which every run writes before anything else."""
    if (folder / RECIPE_FILE).exists() or complete_steps(folder / "checkpoint"):
        return
    found = [n for n in ("checkpoint", "rollouts", "hf") if any((folder / n).glob("*"))]
    if found:
        logger.warning(
            "[job] dump_folder: %s has %s, but no run of this program wrote there before: files of "
            "the same names will be replaced; choose another folder to keep them",
            folder,
            " and ".join(f"{name}/" for name in found),
        )


def _log_findings(setup: Setup) -> None:
    rows = setup.job.data_sets
    for found, row in zip(setup.prompt_sets, rows, strict=True):
        share = ""
        if row.name:
            share = f", {row.weight / sum(r.weight for r in rows):.0%} of each step"
            share += f", scored by {row.teacher}" if row.teacher != "teacher" else ""
        logger.info(
            "Data%s: %s: %s prompts kept of %s rows (%s duplicates, %s over %s tokens)%s; %s steps",
            f" {row.name}" if row.name else "",
            found.source,
            len(found.prompts),
            found.num_rows,
            found.num_duplicates,
            found.num_too_long,
            setup.job.config.data.max_prompt_tokens,
            share,
            setup.total_steps,
        )
    mesh = setup.world.mesh
    shape = " x ".join(f"{name} {n}" for name, n in axes(mesh).items())
    logger.info("World: %s processes on %s: %s", mesh.size(), setup.world.device.type, shape)
    if setup.validator is not None:
        setup.validator.warn_if_not_held_out()
    for warning in _mismatches(setup):
        logger.warning("%s", warning)
