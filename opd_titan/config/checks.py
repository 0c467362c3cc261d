"""What a value may be: its type, its choices, its range, and which keys contradict each other.

TOML values and command-line values go through the same `check_value`.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from opd_titan.config.job_config import JobConfig
from opd_titan.errors import ConfigError, without_credentials

TABLES: dict[str, type] = get_type_hints(JobConfig)

# "table.key" -> bool, int, float, str or a Literal of strings.
OPTIONS: dict[str, Any] = {
    f"{table}.{key}": kind
    for table, cls in TABLES.items()
    for key, kind in get_type_hints(cls).items()
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
PATHS = ("job.dump_folder", *SOURCES)


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
    return RANGES.get(name, (">= 0",)) if OPTIONS[name] in (int, float) else ()


def wanted(name: str) -> str:
    """In words, what the option `name` (`table.key`) may be."""
    kind = OPTIONS[name]
    if choices := get_args(kind):
        return "one of " + ", ".join(choice or '""' for choice in choices)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return " ".join([words[kind], " and ".join(bounds(name))]).rstrip()


def check_value(where: str, name: str, value: Any) -> Any:
    """Return `value` as the type of the option `name`; `where` starts the message if it is wrong.

    An integer will do for a float, but no float for an integer and no bool for either.
    """
    kind = OPTIONS[name]
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


def _text_problem(name: str, value: str) -> str:
    """What is wrong with the text of the option `name`; empty if nothing is."""
    # A lone surrogate is an undecodable byte of the command line; a path cannot hold NUL.
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return f"{show(value)} holds a NUL or bytes that are not UTF-8"
    if without_credentials(value) != value:
        return "holds a URL with a user name or password, which the run would write to its folder"
    if name not in PATHS:
        return ""
    writes = name == "job.dump_folder"
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


def nearest(table: str, key: str) -> list[str]:
    """The options (`table.key`) that an unknown name most likely means, best first; maybe none."""
    same = [name.partition(".")[2] for name in OPTIONS if name.startswith(f"{table}.")]
    close = difflib.get_close_matches(key, same, n=1)
    if close:
        return [f"{table}.{close[0]}"]
    elsewhere = [name for name in OPTIONS if name.partition(".")[2] == key]
    if elsewhere or table in TABLES:
        return elsewhere
    return difflib.get_close_matches(f"{table}.{key}", OPTIONS, n=1)


def check_consistency(config: JobConfig) -> None:
    """Raise `ConfigError` for the first key that is missing, not built yet or contradicted."""
    problems = (_model_problems, _objective_problems, _rollout_problems, _training_problems)
    for name, problem in (p for check in problems for p in check(config)):
        table, _, key = name.partition(".")
        raise config_error(f"[{table}] {key}", problem)


def _model_problems(c: JobConfig) -> Iterator[tuple[str, str]]:
    """Pairs of `table.key` and what is wrong: models, data, hardware."""
    need_model = "give a local Hugging Face folder or a hub id"
    need_path = 'required with dataset = "prompts"; give a file, a folder or a hub id'
    objective = c.distill.objective
    if not c.student.hf_path:
        yield "student.hf_path", f"required; {need_model}"
    if not c.teacher.hf_path and objective != "sft":
        yield "teacher.hf_path", f'required with [distill] objective = "{objective}"; {need_model}'
    if not c.teacher.hf_path and c.teacher.random_init:
        yield "teacher.random_init", f"true takes the sizes of [teacher] hf_path; {need_model}"
    if c.data.dataset == "prompts" and not c.data.path:
        yield "data.path", need_path
    if c.data.template == "raw" and c.data.enable_thinking:
        yield "data.enable_thinking", 'true needs the chat template; set [data] template = "chat"'
    for name in SOURCES:
        table, _, key = name.partition(".")
        path = getattr(getattr(c, table), key)
        if path and os.path.realpath(path) == os.path.realpath(c.job.dump_folder):
            yield (
                "job.dump_folder",
                f"{show(c.job.dump_folder)} is also [{table}] {key}, which the run would write "
                "into; wanted a folder of its own",
            )
    v = c.validation
    if v.enable and v.dataset == "prompts" and not (v.path or c.data.path):
        yield "validation.path", need_path
    if v.samples_per_prompt > 1 and v.temperature == 0:
        yield (
            "validation.samples_per_prompt",
            f"{v.samples_per_prompt} greedy samples ([validation] temperature = 0) would all be "
            "the same; set the temperature > 0 or the samples to 1",
        )


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
