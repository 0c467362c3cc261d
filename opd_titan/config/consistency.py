"""Which keys a job cannot do without, and which contradict each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from opd_titan.config.checks import ROW_SOURCES, SOURCES, config_error, literal, show
from opd_titan.config.job_config import JobConfig
from opd_titan.config.resolve import data_sets, is_teacher, teacher_role, teachers, validation_sets

# Objectives that a negative reference.coef has an optimum with: what they charge for leaving the
# teacher grows as fast as what the reference term pays.
EXTRAPOLATES = ("policy_gradient", "reverse_kl", "top_k_reverse_kl")
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NEED_MODEL = "give a local Hugging Face folder or a hub id"
_NEED_PATH = 'required with dataset = "prompts"; give a file, a folder or a hub id'


def check_consistency(config: JobConfig) -> None:
    """Raise `ConfigError` for the first key that is missing, not built yet or contradicted."""
    checks = (_model_problems, _data_problems, _validation_problems, _routing_problems)
    more = (_objective_problems, _rollout_problems, _training_problems)
    _raise_first(p for check in (*checks, *more) for p in check(config))


def check_evaluation(config: JobConfig) -> None:
    """The same for `opd_titan.evaluate`, to which nothing about training matters."""
    checks = (_evaluation_problems, _data_problems, _validation_problems)
    enabled = replace(config, validation=replace(config.validation, enable=True))
    _raise_first(p for check in checks for p in check(enabled))


def _raise_first(problems: Iterator[tuple[str, str]]) -> None:
    for name, problem in problems:
        table, _, key = name.partition(".")
        raise config_error(name if "[" in name else f"[{table}] {key}", problem)


def _model_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Pairs of `table.key` and what is wrong: models, data to train on."""
    objective = c.distill.objective
    if not c.student.hf_path:
        yield "student.hf_path", f"required; {_NEED_MODEL}"
    models = c.teacher.models
    if not (c.teacher.hf_path or models) and objective != "sft":
        yield "teacher.hf_path", f'required with [distill] objective = "{objective}"; {_NEED_MODEL}'
    if not (c.teacher.hf_path or models) and c.teacher.random_init:
        yield "teacher.random_init", f"true takes the sizes of [teacher] hf_path; {_NEED_MODEL}"
    if c.teacher.hf_path and models:
        yield (
            "teacher.hf_path",
            f"{show(c.teacher.hf_path)} contradicts [[teacher.models]]; wanted one or the other",
        )
    yield from _name_problems("teacher.models", models)
    for i, row in enumerate(models):
        if not row.hf_path:
            yield f"teacher.models[{i}].hf_path", f"required; {_NEED_MODEL}"


def _evaluation_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    model = c.evaluate.model
    if model in ("", "student") and not c.student.hf_path:
        yield "evaluate.model", f"required without [student] hf_path; {_NEED_MODEL}"
    names = [teacher_role(t.name) for t in c.teacher.models]
    if is_teacher(model) and names and model not in names and not os.path.exists(model):
        yield (
            "evaluate.model",
            f"{show(model)} is none of the teachers; wanted {' or '.join(names)}",
        )
    elif model == "teacher" and not c.teacher.hf_path:
        yield "teacher.hf_path", f'required with [evaluate] model = "teacher"; {_NEED_MODEL}'


def _data_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    if c.data.template == "raw" and c.data.enable_thinking:
        yield "data.enable_thinking", 'true needs the chat template; set [data] template = "chat"'
    yield from _name_problems("data.sets", c.data.sets)
    for i, row in enumerate(data_sets(c)):
        if row.dataset == "prompts" and not row.path:
            yield f"data.sets[{i}].path" if c.data.sets else "data.path", _NEED_PATH
    if c.training.epochs and len(c.data.sets) > 1:
        yield (
            "training.epochs",
            f"{c.training.epochs} contradicts several [[data.sets]], which have no pass in common; "
            "wanted 0, and [training] steps",
        )
    for name, path in _read_from(c):
        if path and _same_place(path, c.job.dump_folder):
            yield (
                "job.dump_folder",
                f"{show(c.job.dump_folder)} is also {name}, which the run would write into; wanted "
                "a folder of its own",
            )


def _read_from(c: JobConfig) -> Iterator[tuple[str, str]]:
    """What is read, as a message calls it, and where it lies."""
    for name in SOURCES:
        table, _, key = name.partition(".")
        yield f"[{table}] {key}", getattr(getattr(c, table), key)
    for name in ROW_SOURCES:
        table, rows, key = name.split(".")
        for i, row in enumerate(getattr(getattr(c, table), rows)):
            yield f"{table}.{rows}[{i}].{key}", getattr(row, key)


def _validation_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    v = c.validation
    yield from _name_problems("validation.sets", v.sets)
    for i, row in enumerate(validation_sets(c)):
        here = f"validation.sets[{i}]" if v.sets else "validation"
        if v.enable and row.dataset == "prompts" and not row.path:
            yield f"{here}.path", _NEED_PATH
    if v.samples_per_prompt > 1 and v.temperature == 0:
        yield (
            "validation.samples_per_prompt",
            f"{v.samples_per_prompt} greedy samples ([validation] temperature = 0) would all be "
            "the same; set the temperature > 0 or the samples to 1",
        )


def _routing_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Which set is whose teacher's."""
    known = [model.name for model in c.teacher.models] if teachers(c) else []
    taught = data_sets(c)
    rows = [("data", i, row.teacher) for i, row in enumerate(taught)]
    if c.validation.enable:
        rows += [("validation", i, row.teacher) for i, row in enumerate(validation_sets(c))]
    for table, i, teacher in rows:
        here = f"{table}.sets[{i}].teacher" if getattr(c, table).sets else f"{table}.sets"
        if known and not teacher:
            wish = f"wanted {' or '.join(known)}"
            yield here, f"required with several [[teacher.models]]: whose each set is; {wish}"
        if teacher and teacher not in known:
            wish = f"one of {', '.join(known)}" if known else "[[teacher.models]] of that name"
            yield here, f"{show(teacher)} is not the name of a teacher; wanted {wish}"
    for i, name in enumerate(known):
        if name not in [row.teacher for row in taught]:
            yield f"teacher.models[{i}].name", f"no [[data.sets]] has teacher = {show(name)}"


def _name_problems(where: str, rows: Sequence[Any]) -> Iterator[tuple[str, str]]:
    names = [row.name for row in rows]
    for i, name in enumerate(names):
        if not _SET_NAME.fullmatch(name):
            yield (
                f"{where}[{i}].name",
                f"{show(name)} is not a name; wanted letters, digits, _, - and dots",
            )
        if name in names[:i]:
            yield f"{where}[{i}].name", f"{show(name)} is the name of another one too"


def _same_place(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _objective_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Pairs of `table.key` and what is wrong: options that the objective has no use for."""
    d, r = c.distill, c.rollout
    named = f'[distill] objective = "{d.objective}"'
    own = {"baseline": "none", "reward_power": 0.0}
    for key, off in own.items():
        if getattr(d, key) != off and d.objective != "policy_gradient":
            yield (
                f"distill.{key}",
                f"{literal(getattr(d, key))} contradicts {named}; only policy_gradient has "
                f"advantages; wanted {literal(off)}",
            )
    if d.reward_power > 0.0 and d.log_ratio_clamp > 0.0:
        yield (
            "distill.log_ratio_clamp",
            f"{d.log_ratio_clamp} contradicts reward_power = {d.reward_power}, which is bounded; "
            "wanted 0 for one of them",
        )
    if c.reference.coef < 0.0 and d.objective not in EXTRAPOLATES:
        yield (
            "reference.coef",
            f"{c.reference.coef} contradicts {named}: moving away from the reference outweighs it, "
            f"up to tokens that nobody would write; wanted >= 0, or one of "
            f"{', '.join(EXTRAPOLATES)}",
        )
    cut = "top_p" if r.top_p < 1.0 else "top_k" if r.top_k else ""
    if cut and d.objective not in ("policy_gradient", "sft"):
        yield (
            f"rollout.{cut}",
            f"{getattr(r, cut)} contradicts {named}, which compares whole distributions; wanted "
            f"{1.0 if cut == 'top_p' else 0}",
        )


def _rollout_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Pairs of `table.key` and what is wrong: whose responses, and how many of them."""
    objective, r, fraction = c.distill.objective, c.rollout, c.rollout.on_policy_fraction
    if objective == "sft" and fraction != 0.0:
        yield (
            "rollout.on_policy_fraction",
            f'{fraction} contradicts [distill] objective = "sft", which learns from the data '
            "set's own responses; wanted 0.0",
        )
    if objective == "policy_gradient" and fraction != 1.0:
        yield (
            "rollout.on_policy_fraction",
            f'{fraction} contradicts [distill] objective = "policy_gradient", whose gradient is a '
            "mean over the student's own samples; wanted 1.0, or a divergence such as reverse_kl",
        )
    if fraction == 0.0 and r.group_size != 1:
        yield (
            "rollout.group_size",
            f"{r.group_size} contradicts on_policy_fraction = 0.0: the data set has one "
            "response for each prompt; wanted 1",
        )
    responses = r.prompts_per_step * r.group_size
    if fraction == 0.0 and r.max_tokens_per_step:
        yield (
            "rollout.max_tokens_per_step",
            f"{r.max_tokens_per_step} contradicts on_policy_fraction = 0.0: nothing is sampled; "
            "wanted 0",
        )
    elif 0 < r.max_tokens_per_step < responses:
        yield (
            "rollout.max_tokens_per_step",
            f"{r.max_tokens_per_step} leaves nothing of some of a step's {responses} responses; "
            f"wanted 0, or at least {responses}",
        )
    # A step may by chance have no prompt that the student answers.
    fewest, factors = responses, "prompts_per_step x group_size"
    if fraction < 1.0:
        fewest, factors = r.prompts_per_step, "prompts_per_step, if none is sampled"
    if c.distill.minibatches > fewest:
        yield (
            "distill.minibatches",
            f"{c.distill.minibatches} is more than a step's {fewest} responses ([rollout] "
            f"{factors}); wanted at most {fewest}",
        )


def _training_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Pairs of `table.key` and what is wrong: objective, checkpoints."""
    objective, r = c.distill.objective, c.rollout
    if objective == "sft" and c.reference.coef != 0:
        yield "reference.coef", 'must be 0 with [distill] objective = "sft", which has no reference'
    if objective == "sft" and (r.temperature, r.top_p, r.top_k) != (1.0, 1.0, 0):
        yield (
            "rollout.temperature",
            f"{r.temperature}, with top_p {r.top_p} and top_k {r.top_k}, would change what "
            '[distill] objective = "sft" minimises; wanted 1.0, 1.0 and 0',
        )
    if c.checkpoint.load_step > 0 and not c.checkpoint.enable:
        yield (
            "checkpoint.load_step",
            f"{c.checkpoint.load_step} contradicts [checkpoint] enable = false; wanted true there",
        )
    if c.watchdog.action == "rollback" and not c.checkpoint.enable:
        yield "watchdog.action", "rollback needs checkpoints; wanted [checkpoint] enable = true"
