"""What a value may be: its type, its choices, its range, and which keys contradict each other.

TOML values and command-line values go through the same `check_value`.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_origin, get_type_hints

from opd_titan.config.job_config import JobConfig
from opd_titan.config.validation_sets import validation_sets
from opd_titan.errors import ConfigError, without_credentials


def _of(cls: type, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{key}": kind for key, kind in get_type_hints(cls).items()}


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list


TABLES: dict[str, type] = {
    name: kind for name, kind in _of(JobConfig).items() if not _is_list(kind)
}
_FIELDS = {n: kind for table, cls in TABLES.items() for n, kind in _of(cls, f"{table}.").items()}

# "table.key" -> bool, int, float, str or a Literal of strings.
OPTIONS: dict[str, Any] = {name: kind for name, kind in _FIELDS.items() if not _is_list(kind)}
# A `list[Row]` of dataclasses, in a table or beside the tables: its name -> Row.
LISTS: dict[str, type] = {
    name: get_args(kind)[0]
    for name, kind in {**_of(JobConfig), **_FIELDS}.items()
    if _is_list(kind)
}
# Whatever has a value of its own: options, and the keys of a list's rows as "table.list.key".
VALUES: dict[str, Any] = {
    **OPTIONS,
    **{n: kind for name, row in LISTS.items() for n, kind in _of(row, f"{name}.").items()},
}

# Bounds of the numbers, all of which must hold. A number without a row must be >= 0.
RANGES: dict[str, tuple[str, ...]] = {
    "reference.coef": ("> -1",),
    "data.max_prompt_tokens": (">= 1",),
    "rollout.prompts_per_step": (">= 1",),
    "rollout.group_size": (">= 1", "<= 1048576"),
    "rollout.max_new_tokens": (">= 1",),
    "rollout.max_tokens_per_step": (">= 0",),
    "rollout.temperature": ("> 0",),
    "rollout.top_p": ("> 0", "<= 1"),
    "rollout.on_policy_fraction": (">= 0", "<= 1"),
    "distill.clip_low": (">= 0", "< 1"),
    "distill.beta": (">= 0", "<= 1"),
    "distill.top_k": (">= 1",),
    "distill.minibatches": (">= 1",),
    "optimizer.beta1": (">= 0", "< 1"),
    "optimizer.beta2": (">= 0", "< 1"),
    "optimizer.eps": ("> 0",),
    "lr_scheduler.min_lr_factor": (">= 0", "<= 1"),
    "training.steps": (">= 1",),
    "training.max_tokens_per_microbatch": (">= 1",),
    "parallelism.data_parallel_replicate_degree": (">= 1",),
    "parallelism.data_parallel_shard_degree": (">= -1", "!= 0"),
    "parallelism.tensor_parallel_degree": (">= 1",),
    "checkpoint.load_step": (">= -1",),
    "validation.samples_per_prompt": (">= 1", "<= 1048576"),
    "metrics.log_freq": (">= 1",),
    "metrics.sample_rollouts": (">= -1",),
    "profiling.interval": (">= 1",),
    # A year: beyond some centuries a timeout overflows.
    "comm.init_timeout_seconds": (">= 1", "<= 31536000"),
    "comm.train_timeout_seconds": (">= 1", "<= 31536000"),
}
# Tensors of bfloat16 and float32 end there.
_LARGEST_FLOAT = 3e38
_COMPARE = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "!=": operator.ne,
}
# Objectives that a negative reference.coef has an optimum with: what they charge for leaving the
# teacher grows as fast as what the reference term pays.
EXTRAPOLATES = ("policy_gradient", "reverse_kl", "top_k_reverse_kl")
NOT_EMPTY = ("job.dump_folder", "data.split", "validation.split")
# What is read; the one that is written is not among them.
SOURCES = (
    "student.hf_path",
    "teacher.hf_path",
    "reference.hf_path",
    "data.path",
    "validation.path",
)
WRITTEN = ("job.dump_folder", "evaluate.folder")
PATHS = (*WRITTEN, *SOURCES, "validation.sets.path", "evaluate.model")
GRADERS = ("auto", "gsm8k", "math", "boxed", "choice", "exact")
OWN_GRADER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def config_error(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: {what}")


def literal(value: Any) -> str:
    """`value` as TOML spells it (a TOML string escapes as JSON does, plus DEL)."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def show(value: Any) -> str:
    """`literal`, cut short for a message; arrays, tables and numbers too long to print by name."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of over 60 digits"
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "a table"
    text = without_credentials(literal(value))
    return text if len(text) <= 60 else text[:57] + "..."


def bounds(name: str) -> tuple[str, ...]:
    """The bounds that a number's option has; none for the other types."""
    return RANGES.get(name, (">= 0",)) if VALUES[name] in (int, float) else ()


def wanted(name: str) -> str:
    """In words, what the value `name` (`table.key`) may be."""
    kind = VALUES[name]
    if choices := get_args(kind):
        return "one of " + ", ".join(choice or '""' for choice in choices)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return " ".join([words[kind], " and ".join(bounds(name))]).rstrip()


def check_value(where: str, name: str, value: Any) -> Any:
    """Return `value` as the type of `VALUES[name]`; `where` starts the message if it is wrong.

    An integer will do for a float, but no float for an integer and no bool for either.
    """
    kind = VALUES[name]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise config_error(where, f"{show(value)} does not fit in 64 bits; wanted {wanted(name)}")
    if kind is float and type(value) is int:
        value = float(value)
    choices = get_args(kind)
    if value not in choices if choices else type(value) is not kind:
        raise config_error(where, f"{show(value)} is not {wanted(name)}")
    if kind is float and not math.isfinite(value):
        raise config_error(where, f"{show(value)} is not finite; wanted {wanted(name)}")
    if kind is float and abs(value) > _LARGEST_FLOAT:
        raise config_error(where, f"{show(value)} does not fit in 32 bits; wanted {wanted(name)}")
    for bound in bounds(name):
        compare, limit = bound.split()
        if not _COMPARE[compare](value, int(limit)):
            raise config_error(where, f"{show(value)} is out of range; wanted {wanted(name)}")
    if name in NOT_EMPTY and not value:
        raise config_error(where, "must not be empty")
    if problem := _text_problem(name, value) if kind is str else "":
        raise config_error(where, problem)
    return value


def check_rows(where: str, name: str, value: Any) -> list[Any]:
    """Return `value` as the rows of the list `name`; `where` starts the message if it is wrong."""
    if not isinstance(value, list):
        raise config_error(where, f"{show(value)} is not a list of tables; write [[{name}]]")
    rows = []
    for i, row in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(row, dict):
            raise config_error(place, f"{show(row)} is not a table; write [[{name}]]")
        for key in row:
            if f"{name}.{key}" not in VALUES:
                known = list(_of(LISTS[name]))
                guesses = difflib.get_close_matches(key, known, n=1)
                raise config_error(f"{place}.{key}", "unknown key; " + did_you_mean(guesses, known))
        values = {k: check_value(f"{place}.{k}", f"{name}.{k}", v) for k, v in row.items()}
        rows.append(LISTS[name](**values))
    return rows


def did_you_mean(guesses: list[str], known: list[str]) -> str:
    if guesses:
        return f"did you mean {' or '.join(guesses)}?"
    return f"known: {', '.join(known)}"


def _text_problem(name: str, value: str) -> str:
    """What is wrong with the text of `VALUES[name]`; empty if nothing is."""
    # A lone surrogate is an undecodable byte of the command line; a path cannot hold NUL.
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return f"{show(value)} holds a NUL or bytes that are not UTF-8"
    if without_credentials(value) != value:
        return "holds a URL with a user name or password, which the run would write to its folder"
    if name.endswith(".grader"):
        return _grader_problem(value, may_be_empty=name != "validation.grader")
    if name not in PATHS:
        return ""
    writes = name in WRITTEN
    if "://" in value:  # not quoted: what follows may be a signature
        scheme = show(value.partition("://")[0] + "://...")
        return f"{scheme} is a URL; wanted a local path" + ("" if writes else " or a hub id")
    if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in value.split("/")):
        return f"{show(value)} ({len(value)} characters) is too long for a path"
    if value.startswith("~") and writes:
        return f"{show(value)}: ~ is not expanded here; write the path out, or ./~... for that name"
    if os.path.expanduser(value).startswith("~"):
        return (
            f"{show(value)}: no such user's home; wanted ~/..., or ./~... for a file of that name"
        )
    return ""


def _grader_problem(value: str, may_be_empty: bool) -> str:
    if value in GRADERS or OWN_GRADER.fullmatch(value) or (may_be_empty and not value):
        return ""
    return (
        f"{show(value)} is not a grader; wanted one of {', '.join(GRADERS)}, or your own as "
        "package.module:function"
    )


def keys_of(table: str) -> list[str]:
    """What may stand in a table, lists included."""
    names = (*OPTIONS, *LISTS)
    return [name.partition(".")[2] for name in names if name.startswith(f"{table}.")]


def nearest(table: str, key: str) -> list[str]:
    """The options (`table.key`) that an unknown name most likely means, best first; maybe none."""
    if table in LISTS:
        return [table]
    close = difflib.get_close_matches(key, keys_of(table), n=1)
    if close:
        return [f"{table}.{close[0]}"]
    elsewhere = [name for name in OPTIONS if name.partition(".")[2] == key]
    if elsewhere or table in TABLES:
        return elsewhere
    return difflib.get_close_matches(f"{table}.{key}", OPTIONS, n=1)


_NEED_MODEL = "give a local Hugging Face folder or a hub id"
_NEED_PATH = 'required with dataset = "prompts"; give a file, a folder or a hub id'


def check_consistency(config: JobConfig) -> None:
    """Raise `ConfigError` for the first key that is missing, not built yet or contradicted."""
    checks = (_model_problems, _data_problems, _validation_problems)
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
    if not c.teacher.hf_path and objective != "sft":
        yield "teacher.hf_path", f'required with [distill] objective = "{objective}"; {_NEED_MODEL}'
    if not c.teacher.hf_path and c.teacher.random_init:
        yield "teacher.random_init", f"true takes the sizes of [teacher] hf_path; {_NEED_MODEL}"
    if c.data.dataset == "prompts" and not c.data.path:
        yield "data.path", _NEED_PATH


def _evaluation_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    model = c.evaluate.model
    if model in ("", "student") and not c.student.hf_path:
        yield "evaluate.model", f"required without [student] hf_path; {_NEED_MODEL}"
    if model == "teacher" and not c.teacher.hf_path:
        yield "teacher.hf_path", f'required with [evaluate] model = "teacher"; {_NEED_MODEL}'


def _data_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    if c.data.template == "raw" and c.data.enable_thinking:
        yield "data.enable_thinking", 'true needs the chat template; set [data] template = "chat"'
    for name in SOURCES:
        table, _, key = name.partition(".")
        path = getattr(getattr(c, table), key)
        if path and _same_place(path, c.job.dump_folder):
            yield (
                "job.dump_folder",
                f"{show(c.job.dump_folder)} is also [{table}] {key}, which the run would write "
                "into; wanted a folder of its own",
            )


def _validation_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    v = c.validation
    names: list[str] = []
    for i, row in enumerate(validation_sets(c)):
        here = f"validation.sets[{i}]" if v.sets else "validation"
        if v.sets and not _SET_NAME.fullmatch(row.name):
            yield (
                f"{here}.name",
                f"{show(row.name)} is not the name of a set; wanted letters, digits, _, - and dots",
            )
        if row.name in names:
            yield f"{here}.name", f"{show(row.name)} is the name of another set too"
        names.append(row.name)
        if v.enable and row.dataset == "prompts" and not row.path:
            yield f"{here}.path", _NEED_PATH
        if v.sets and row.path and _same_place(row.path, c.job.dump_folder):
            yield f"{here}.path", f"{show(row.path)} is also [job] dump_folder; wanted another"
    if v.samples_per_prompt > 1 and v.temperature == 0:
        yield (
            "validation.samples_per_prompt",
            f"{v.samples_per_prompt} greedy samples ([validation] temperature = 0) would all be "
            "the same; set the temperature > 0 or the samples to 1",
        )


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
