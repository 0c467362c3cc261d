"""Everything about a job that can be known, and be wrong, before a weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from opd_titan.checkpoint.checkpointer import inspect_checkpoint
from opd_titan.checkpoint.faults import config_error_if_unwritable
from opd_titan.checkpoint.publish import clear_leftovers, reset_latest
from opd_titan.checkpoint.steps import agree_on_step, complete_steps, open_folder
from opd_titan.config import RECIPE_FILE, JobConfig, to_toml
from opd_titan.config.sets import data_sets, is_teacher, teacher_role
from opd_titan.data.loader import PromptLoader
from opd_titan.data.prompts import PromptSet, build_prompts
from opd_titan.data.templates import template_warning
from opd_titan.data.tokenizer import eos_warning
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.distributed.heartbeat import set_phase
from opd_titan.distributed.world import World, axes, build_world, init_world
from opd_titan.errors import CheckpointError, ConfigError, Fault, ModelError
from opd_titan.evaluation.validator import Validator, build_validator, prompt_options
from opd_titan.grading.graders import load_grader
from opd_titan.models.transforms import has_cpp_compiler
from opd_titan.observability.logging import init_logging
from opd_titan.training.fingerprint import Identity, differences, job_identity
from opd_titan.training.models import (
    ModelSource,
    check_lengths,
    compiles,
    compute_dtype,
    inspect_models,
)

logger = logging.getLogger("opd_titan")

# Of what a checkpoint says besides tensors: another one cannot be read.
STATE_FORMAT = 3


@dataclass(frozen=True)
class PreparedJob:
    """A job that has passed its checks.

    Attributes:
        dtype: what models compute in.
        sources: the models by role.
        grade: as `write_rollouts` has it.
        identity: what makes it this job and no other.
        resumed_at: the step to go on from, 0 for a new run.
        why: that step, in words.
        saved_state: what its checkpoint says besides tensors; None for a new run.
    """

    config: JobConfig
    world: World
    dtype: torch.dtype
    sources: dict[str, ModelSource]
    decode: Callable[[list[int]], str]
    grade: Callable[[str, str], bool | float | None]
    prompt_sets: list[PromptSet]
    loader: PromptLoader
    validator: Validator | None
    total_steps: int
    identity: Identity
    resumed_at: int = 0
    why: str = ""
    saved_state: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.sources["student"].tokenizer


def prepare(config: JobConfig) -> PreparedJob:
    """Join the world, check models, data and checkpoint, then open the dump folder.

    Raises:
        UserError: in one line, what is wrong. Nothing has been written yet, unless the dump folder
            itself is at fault: then what could be written there has been.
    """
    world = join_world(config)
    with raise_on_all_ranks():
        job = _inspect(config, world)
        if config.watchdog.action == "stop":
            for text in _at_odds(job):
                raise ModelError(f"watchdog.action is stop: {text}")
    job = _find_checkpoint(job)
    _open_folder(job)
    _say_what_was_found(job)
    return job


def sent_back(job: PreparedJob, good: int) -> PreparedJob:
    """The job as if it were resumed from its newest intact checkpoint up to step `good`.

    Raises:
        Fault: there is none.
    """
    folder = job.folder / "checkpoint"
    try:
        step = agree_on_step(folder, -1, at_most=good)
    except CheckpointError as error:
        raise Fault(f"watchdog: rollback: {error}") from error
    if step is None:
        raise Fault(
            f"watchdog: rollback: no checkpoint in {folder} is from before the sign (step {good} "
            f"or earlier); lower checkpoint.interval, or raise checkpoint.keep_latest_k"
        )
    with torch.device("meta"):
        shapes = job.sources["student"].build()
    state = inspect_checkpoint(folder, step, shapes)
    job.loader.load_state_dict(state["loader"])
    if dist.get_rank() == 0:
        reset_latest(job.folder / "hf", state["exported_at"])
    return replace(job, resumed_at=step, why="watchdog.action is rollback", saved_state=state)


def _inspect(config: JobConfig, world: World) -> PreparedJob:
    """Models, tokenizers and data, all but the weights. The job as if it were new."""
    sources = inspect_models(config)
    tokenizer = sources["student"].tokenizer
    decode: Any = partial(tokenizer.decode, skip_special_tokens=True)  # of one text: a str
    options = prompt_options(config, tokenizer)
    prompt_sets = _read_data(config, options)
    loader = PromptLoader(
        [s.prompts for s in prompt_sets],
        weights=[row.weight for row in data_sets(config)],
        prompts_per_step=config.rollout.prompts_per_step,
        seed=config.training.seed,
        shuffle=config.data.shuffle,
    )
    prompts = [prompt for s in prompt_sets for prompt in s.prompts]
    check_lengths(sources.values(), prompts, config.rollout.max_new_tokens, "rollout")
    epochs = config.training.epochs
    identity = job_identity(config, sources, {s.name: s.prompts for s in prompt_sets})
    validator = None
    if config.validation.enable:
        # Where a teacher stops is not in its weights, but shows in its accuracy.
        told = [
            f"{identity[f'{role}.hf_path']['id']} {sorted(source.eos_ids)}"
            for role, source in sources.items()
            if is_teacher(role)
        ]
        teacher = "; ".join(told) or None
        validator = build_validator(config, options, prompts, decode, world.dp, teacher)
        new_tokens = validator.params.max_new_tokens
        check_lengths(sources.values(), validator.prompts, new_tokens, "validation")
    return PreparedJob(
        config=config,
        world=world,
        dtype=compute_dtype(config, world.device),
        sources=sources,
        decode=decode,
        grade=load_grader(config.validation.grader, "validation.grader").score,
        prompt_sets=prompt_sets,
        loader=loader,
        validator=validator,
        total_steps=epochs * loader.batches_per_epoch if epochs else config.training.steps,
        identity=identity,
    )


def _read_data(config: JobConfig, options: dict[str, Any]) -> list[PromptSet]:
    found: list[PromptSet] = []
    for i, row in enumerate(data_sets(config)):
        prompt_set = build_prompts(
            dataset=row.dataset,
            path=row.path,
            split=row.split,
            keep_responses=config.rollout.on_policy_fraction < 1.0,
            section=f"data.sets[{i}]" if config.data.sets else "data",
            # As if the sets lay end to end.
            first_index=sum(s.num_rows for s in found),
            name=row.name,
            teacher=teacher_role(row.teacher),
            **options,
        )
        found.append(prompt_set)
    return found


def _at_odds(job: PreparedJob) -> Iterator[str]:
    """Where student and teacher were trained on other forms of prompts and responses."""
    if job.config.watchdog.action == "off":
        return
    student, data = job.sources["student"], job.config.data
    for role, teacher in job.sources.items():
        if not is_teacher(role):
            continue
        texts = [eos_warning(student.eos_ids, teacher.eos_ids, job.tokenizer)]
        if data.template == "chat":
            texts.append(template_warning(job.tokenizer, teacher.tokenizer, data.enable_thinking))
        named = "" if role == "teacher" else f"{role}: "
        yield from (named + text for text in texts if text)


def join_world(config: JobConfig) -> World:
    """Start the process group and lay out the mesh, where the recipe's options suit the device."""
    set_phase("the meeting of all ranks")
    device = init_world(config.comm.init_timeout_seconds)
    _check_device_options(config, device)
    init_logging(None, dist.get_rank())
    p = config.parallelism
    return build_world(
        device,
        p.data_parallel_replicate_degree,
        p.data_parallel_shard_degree,
        p.tensor_parallel_degree,
    )


def _check_device_options(config: JobConfig, device: torch.device) -> None:
    if config.training.deterministic and device.type == "cuda":
        # The sampler's prefix sums have no deterministic kernel there.
        raise ConfigError("[training] deterministic: true is built for the CPU only so far")
    if compiles(config) and device.type == "cpu" and not has_cpp_compiler():
        raise ConfigError(
            '[compile] enable: "on", but no C++ compiler found (g++, or what CXX names); install '
            'one, or set it to "off"'
        )


def _find_checkpoint(job: PreparedJob) -> PreparedJob:
    """Which step to go on from, and whether this recipe can; the loader is moved there."""
    c, folder = job.config.checkpoint, job.folder / "checkpoint"
    set_phase(f"the check of {folder}")
    step = agree_on_step(folder, c.load_step if c.enable else 0)
    if step is None:
        why = "no complete checkpoint" if c.enable else "checkpoint.enable is false"
        return replace(job, why="checkpoint.load_step is 0" if c.load_step == 0 else why)
    with raise_on_all_ranks():
        with torch.device("meta"):
            shapes = job.sources["student"].build()
        state = inspect_checkpoint(folder, step, shapes)
        _check_same_job(folder / f"step-{step}", state, job)
    why = "the newest complete checkpoint" if c.load_step < 0 else "checkpoint.load_step"
    return replace(job, resumed_at=step, why=why, saved_state=state)


def _check_same_job(path: Path, state: dict[str, Any], job: PreparedJob) -> None:
    """Refuse another job's checkpoint, or say what differs; move the loader."""
    allow_changes = job.config.checkpoint.allow_changes
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path}: was written by another version of opd_titan ({state.get('version')}, format "
            f"{state.get('format')}; this one reads format {STATE_FORMAT}); go on with that one, "
            f"choose another job.dump_folder, or start afresh with checkpoint.load_step = 0"
        )
    differ = differences(state["identity"], job.identity)
    told = "; ".join(differ.values())
    if differ and not allow_changes:
        raise CheckpointError(
            f"{path}: is another job's: {told}; set that back, choose another job.dump_folder, or "
            f"go on with --checkpoint.allow_changes"
        )
    if differ:
        logger.warning("%s was another job's (checkpoint.allow_changes): %s", path, told)
    try:
        if any(key.startswith("data.") for key in differ):
            raise CheckpointError("the data are others")
        job.loader.load_state_dict(state["loader"])
    except CheckpointError as error:
        if not allow_changes:
            raise
        logger.warning("The prompts' order starts afresh: %s", error)


def _open_folder(job: PreparedJob) -> None:
    """From here on the job writes: every mistake that can be known by now has been named."""
    resolved = to_toml(job.config)
    with raise_on_all_ranks(), config_error_if_unwritable(job.folder):
        if dist.get_rank() == 0:
            _warn_of_others_files(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        init_logging(job.folder, dist.get_rank())
        if dist.get_rank() == 0:
            (job.folder / RECIPE_FILE).write_text(resolved, encoding="utf-8")
            clear_leftovers(job.folder / "hf")
    if job.config.checkpoint.enable:
        open_folder(job.folder / "checkpoint")
    if job.config.job.print_config:
        logger.info("Resolved config:\n%s", resolved)


def _warn_of_others_files(folder: Path) -> None:
    """Every run of ours writes its recipe before anything else into its folder."""
    if (folder / RECIPE_FILE).exists() or complete_steps(folder / "checkpoint"):
        return
    found = [n for n in ("checkpoint", "rollouts", "hf") if any((folder / n).glob("*"))]
    if found:
        logger.warning(
            "[job] dump_folder: %s has %s, but no run of this program wrote there before: files of "
            "the same names will be replaced; another folder keeps them",
            folder,
            " and ".join(f"{name}/" for name in found),
        )


def _say_what_was_found(job: PreparedJob) -> None:
    rows = data_sets(job.config)
    for found, row in zip(job.prompt_sets, rows, strict=True):
        share = ""
        if row.name:
            share = f", {row.weight / sum(r.weight for r in rows):.0%} of each step"
            share += f", taught by {row.teacher}" if row.teacher else ""
        logger.info(
            "Data%s: %s: %s prompts kept of %s rows (%s duplicates, %s over %s tokens)%s; %s steps",
            f" {row.name}" if row.name else "",
            found.source,
            len(found.prompts),
            found.num_rows,
            found.num_duplicates,
            found.num_too_long,
            job.config.data.max_prompt_tokens,
            share,
            job.total_steps,
        )
    mesh = job.world.mesh
    shape = " x ".join(f"{name} {n}" for name, n in axes(mesh).items())
    logger.info("World: %s processes on %s: %s", mesh.size(), job.world.device.type, shape)
    if job.validator is not None:
        job.validator.warn_if_not_held_out()
    for warning in _at_odds(job):
        logger.warning("%s", warning)
