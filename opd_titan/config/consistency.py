"""The rules between keys: which are required, and which contradict each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from opd_titan.config.job_config import JobConfig
from opd_titan.config.options import in_recipe
from opd_titan.config.resolve import data_sets, is_teacher, teacher_role, teachers, validation_sets
from opd_titan.config.value_types import literal, show
from opd_titan.errors import ConfigError

# Objectives that have a minimum with a negative reference.coef: the loss grows at least as fast
# as the reference term falls when the student moves away from the teacher.
EXTRAPOLATES = ("policy_gradient", "reverse_kl", "top_k_reverse_kl")
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NEED_MODEL = "give a local Hugging Face folder or a hub id"
_NEED_PATH = 'required with dataset = "prompts"; give a file, a folder or a hub id'

Problems = Iterator[tuple[str, str]]
"""Pairs of an option (`table.key`, or `table.list[row].key`) and its problem."""


def check_consistency(config: JobConfig) -> None:
    """Raise `ConfigError` if a key of a training job is missing or contradicts another key."""
    checks = (_model_problems, _data_problems, _validation_problems, _routing_problems)
    more = (_objective_problems, _rollout_problems, _training_problems)
    _raise_first(p for check in (*checks, *more) for p in check(config))


def check_evaluation(config: JobConfig) -> None:
    """Raise `ConfigError` like `check_consistency`, for a job that only evaluates a model."""
    checks = (_evaluation_problems, _data_problems, _validation_problems)
    enabled = replace(config, validation=replace(config.validation, enable=True))
    _raise_first(p for check in checks for p in check(enabled))


def _raise_first(problems: Problems) -> None:
    for name, problem in problems:
        raise ConfigError(f"{in_recipe(name.split('.'))}: {problem}")


def _contradicts(c: JobConfig, name: str, reason: str, wanted: object) -> tuple[str, str]:
    """Return the problem of an option with a value that contradicts something else."""
    table, _, key = name.partition(".")
    value = getattr(getattr(c, table), key)
    return name, f"{show(value)} contradicts {reason}; wanted {wanted}"


def _model_problems(c: JobConfig) -> Problems:
    objective, teacher = c.distill.objective, c.teacher
    if not c.student.hf_path:
        yield "student.hf_path", f"required; {_NEED_MODEL}"
    if not (teacher.hf_path or teacher.models) and objective != "sft":
        yield "teacher.hf_path", f'required with [distill] objective = "{objective}"; {_NEED_MODEL}'
    if not (teacher.hf_path or teacher.models) and teacher.random_init:
        yield "teacher.random_init", f"true needs the sizes in [teacher] hf_path; {_NEED_MODEL}"
    if teacher.hf_path and teacher.models:
        yield _contradicts(c, "teacher.hf_path", "[[teacher.models]]", "only one of them")
    yield from _name_problems("teacher.models", teacher.models)
    for i, row in enumerate(teacher.models):
        if not row.hf_path:
            yield f"teacher.models[{i}].hf_path", f"required; {_NEED_MODEL}"


def _evaluation_problems(c: JobConfig) -> Problems:
    model = c.evaluate.model
    if model in ("", "student") and not c.student.hf_path:
        yield "evaluate.model", f"required without [student] hf_path; {_NEED_MODEL}"
    names = [teacher_role(t.name) for t in c.teacher.models]
    if is_teacher(model) and names and model not in names and not os.path.exists(model):
        wanted = " or ".join(names)
        yield "evaluate.model", f"{show(model)} is not one of the teachers; wanted {wanted}"
    elif model == "teacher" and not c.teacher.hf_path:
        yield "teacher.hf_path", f'required with [evaluate] model = "teacher"; {_NEED_MODEL}'


def _data_problems(c: JobConfig) -> Problems:
    if c.data.template == "raw" and c.data.enable_thinking:
        yield "data.enable_thinking", 'true needs the chat template; set [data] template = "chat"'
    yield from _name_problems("data.sets", c.data.sets)
    for i, row in enumerate(data_sets(c)):
        if row.dataset == "prompts" and not row.path:
            yield f"data.sets[{i}].path" if c.data.sets else "data.path", _NEED_PATH
    if c.training.epochs and len(c.data.sets) > 1:
        several = "several [[data.sets]], which end their epochs at different steps"
        yield _contradicts(c, "training.epochs", several, "0, and [training] steps")
    for name, path in _read_from(c):
        if path and os.path.realpath(path) == os.path.realpath(c.job.dump_folder):
            folder = show(c.job.dump_folder)
            problem = (
                f"{folder} is also {name}, and the run would write into it; wanted a new folder"
            )
            yield "job.dump_folder", problem


def _read_from(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield the inputs of the run: the option as in messages, and its path or hub id."""
    for table in ("student", "teacher", "reference"):
        yield f"[{table}] hf_path", getattr(c, table).hf_path
    for table in ("data", "validation"):
        yield f"[{table}] path", getattr(c, table).path
        for i, row in enumerate(getattr(c, table).sets):
            yield f"{table}.sets[{i}].path", row.path
    for i, model in enumerate(c.teacher.models):
        yield f"teacher.models[{i}].hf_path", model.hf_path


def _validation_problems(c: JobConfig) -> Problems:
    v = c.validation
    yield from _name_problems("validation.sets", v.sets)
    for i, row in enumerate(validation_sets(c)):
        here = f"validation.sets[{i}]" if v.sets else "validation"
        if v.enable and row.dataset == "prompts" and not row.path:
            yield f"{here}.path", _NEED_PATH
    if v.samples_per_prompt > 1 and v.temperature == 0:
        yield (
            "validation.samples_per_prompt",
            f"{v.samples_per_prompt} greedy samples ([validation] temperature = 0) would be equal; "
            "set the temperature > 0, or the number of samples to 1",
        )


def _routing_problems(c: JobConfig) -> Problems:
    """Yield the problems with the teachers that the sets name."""
    known = [model.name for model in c.teacher.models] if teachers(c) else []
    wanted = " or ".join(known) or "a name in [[teacher.models]]"
    sets = data_sets(c)
    rows = [("data", i, row.teacher) for i, row in enumerate(sets)]
    if c.validation.enable:
        rows += [("validation", i, row.teacher) for i, row in enumerate(validation_sets(c))]
    for table, i, teacher in rows:
        here = f"{table}.sets[{i}].teacher" if getattr(c, table).sets else f"{table}.sets"
        if known and not teacher:
            yield (
                here,
                "required when there are several teachers: name the teacher that scores this set; "
                f"wanted {wanted}",
            )
        if teacher and teacher not in known:
            yield here, f"{show(teacher)} is not the name of a teacher; wanted {wanted}"
    for i, name in enumerate(known):
        if name not in [row.teacher for row in sets]:
            yield (
                f"teacher.models[{i}].name",
                f"no [[data.sets]] has teacher = {show(name)}; add one, or remove this teacher",
            )


def _name_problems(where: str, rows: Sequence[Any]) -> Problems:
    names = [row.name for row in rows]
    for i, name in enumerate(names):
        if not _SET_NAME.fullmatch(name):
            wanted = "letters, digits, _, - and dots"
            yield f"{where}[{i}].name", f"{show(name)} is not a valid name; wanted {wanted}"
        if name in names[:i]:
            yield f"{where}[{i}].name", f"{show(name)} is already used; wanted another name"


def _objective_problems(c: JobConfig) -> Problems:
    d, r = c.distill, c.rollout
    named = f'[distill] objective = "{d.objective}"'
    for key, off in {"baseline": "none", "reward_power": 0.0}.items():
        if getattr(d, key) != off and d.objective != "policy_gradient":
            reason = f"{named}; only policy_gradient has advantages"
            yield _contradicts(c, f"distill.{key}", reason, literal(off))
    if d.reward_power > 0.0 and d.log_ratio_clamp > 0.0:
        reason = f"reward_power = {d.reward_power}, which is bounded already"
        yield _contradicts(c, "distill.log_ratio_clamp", reason, "0 for one of them")
    if c.reference.coef < 0.0 and d.objective not in EXTRAPOLATES:
        reason = f"{named}, which then has no minimum"
        wanted = f">= 0, or one of {', '.join(EXTRAPOLATES)}"
        yield _contradicts(c, "reference.coef", reason, wanted)
    if d.objective not in ("policy_gradient", "sft"):
        reason = f"{named}, which compares whole distributions"
        if r.top_p < 1.0:
            yield _contradicts(c, "rollout.top_p", reason, 1.0)
        if r.top_k:
            yield _contradicts(c, "rollout.top_k", reason, 0)


def _rollout_problems(c: JobConfig) -> Problems:
    objective, r, fraction = c.distill.objective, c.rollout, c.rollout.on_policy_fraction
    named = f'[distill] objective = "{objective}"'
    if objective == "sft" and fraction != 0.0:
        reason = f"{named}, which trains on the data set's own responses"
        yield _contradicts(c, "rollout.on_policy_fraction", reason, 0.0)
    if objective == "policy_gradient" and fraction != 1.0:
        reason = f"{named}, which needs the student's own samples"
        wanted = "1.0, or a divergence such as reverse_kl"
        yield _contradicts(c, "rollout.on_policy_fraction", reason, wanted)
    if fraction == 0.0 and r.group_size != 1:
        reason = "on_policy_fraction = 0.0: the data set has one response for each prompt"
        yield _contradicts(c, "rollout.group_size", reason, 1)
    responses = r.prompts_per_step * r.group_size
    if fraction == 0.0 and r.max_tokens_per_step:
        reason = "on_policy_fraction = 0.0: nothing is sampled"
        yield _contradicts(c, "rollout.max_tokens_per_step", reason, 0)
    elif 0 < r.max_tokens_per_step < responses:
        yield (
            "rollout.max_tokens_per_step",
            f"{r.max_tokens_per_step} is less than one token for each of the {responses} responses "
            f"of a step; wanted 0, or at least {responses}",
        )
    # By chance, a step may have only responses of the data set.
    fewest, factors = responses, "prompts_per_step x group_size"
    if fraction < 1.0:
        fewest, factors = r.prompts_per_step, "prompts_per_step, if the student samples none"
    if c.distill.minibatches > fewest:
        yield (
            "distill.minibatches",
            f"{c.distill.minibatches} is more than the {fewest} responses of a step ([rollout] "
            f"{factors}); wanted at most {fewest}",
        )


def _training_problems(c: JobConfig) -> Problems:
    objective, r = c.distill.objective, c.rollout
    named = f'[distill] objective = "{objective}"'
    if objective == "sft" and c.reference.coef != 0:
        yield _contradicts(c, "reference.coef", f"{named}, which has no reference", 0)
    if objective == "sft" and (r.temperature, r.top_p, r.top_k) != (1.0, 1.0, 0):
        yield (
            "rollout.temperature",
            f"{r.temperature}, with top_p {r.top_p} and top_k {r.top_k}, would change the loss of "
            f"{named}; wanted 1.0, 1.0 and 0",
        )
    if c.checkpoint.load_step > 0 and not c.checkpoint.enable:
        yield _contradicts(c, "checkpoint.load_step", "[checkpoint] enable = false", "-1 or 0")
    if c.watchdog.action == "rollback" and not c.checkpoint.enable:
        yield "watchdog.action", "rollback needs checkpoints; wanted [checkpoint] enable = true"
