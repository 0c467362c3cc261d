"""What a value may be: its type, its choices, its range.

TOML values and command-line values go through the same `check_value`.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
import re
from typing import Any, get_args, get_origin, get_type_hints

from opd_titan.config.job_config import JobConfig
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
    "data.sets.weight": ("> 0",),
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
ROW_SOURCES = ("teacher.models.hf_path", "data.sets.path", "validation.sets.path")
PATHS = (*WRITTEN, *SOURCES, *ROW_SOURCES, "evaluate.model")
GRADERS = ("auto", "gsm8k", "math", "boxed", "choice", "exact")
OWN_GRADER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


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
                raise config_error(f"{place}.{key}", "unknown key; " + _row_hint(name, key))
        values = {k: check_value(f"{place}.{k}", f"{name}.{k}", v) for k, v in row.items()}
        rows.append(LISTS[name](**values))
    return rows


def _row_hint(name: str, key: str) -> str:
    known, table = list(_of(LISTS[name])), name.partition(".")[0]
    if f"{table}.{key}" in OPTIONS:
        return f"it is one of [{table}], for all of its rows alike, which are [[{name}]] there"
    return did_you_mean(difflib.get_close_matches(key, known, n=1), known)


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
