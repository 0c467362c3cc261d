"""The options by name, and the messages for names and values that are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from opd_titan.config.job_config import JobConfig
from opd_titan.config.value_types import show


def fields_of(cls: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of a table or row by name, with `prefix` before each name."""
    return {prefix + key: field for key, field in cls.__pydantic_fields__.items()}


TABLES: dict[str, Any] = {name: field.annotation for name, field in fields_of(JobConfig).items()}
_FIELDS = {n: f for table, cls in TABLES.items() for n, f in fields_of(cls, f"{table}.").items()}

# A list of rows by its `table.key`, for example "data.sets": the class of its rows.
LISTS: dict[str, Any] = {
    name: get_args(field.annotation)[0]
    for name, field in _FIELDS.items()
    if get_origin(field.annotation) is list
}
# All options with a single value by their `table.key`.
OPTIONS = {name: field for name, field in _FIELDS.items() if name not in LISTS}
# `OPTIONS` and the keys of rows, for example "data.sets.name".
VALUES = OPTIONS | {
    n: f for name, row in LISTS.items() for n, f in fields_of(row, f"{name}.").items()
}

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def bounds(field: FieldInfo) -> list[tuple[str, float]]:
    """Return the bounds of a number, for example [(">=", 0), ("<", 1)]."""
    return [
        (sign, getattr(bound, name))
        for bound in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    ]


def wanted(field: FieldInfo) -> str:
    """Return the values that a field allows, in words."""
    if choices := get_args(field.annotation):
        return "one of " + ", ".join(choice or '""' for choice in choices)
    if any(hasattr(bound, "min_length") for bound in field.metadata):
        return "a non-empty string"
    kind: Any = field.annotation
    limits = " and ".join(f"{sign} {limit}" for sign, limit in bounds(field))
    return f"{_KINDS[kind]} {limits}".rstrip()


def dotted(place: Sequence[str | int]) -> str:
    """Return the place of a value as in `validation.sets[1].path`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place)[1:]


def in_recipe(place: Sequence[str | int]) -> str:
    """Return the place of a value as in `[table] key`; the place of a list or row is dotted."""
    name = dotted(place)
    return f"[{place[0]}] {place[1]}" if len(place) == 2 and name not in LISTS else name


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint for an unknown `table.key`: the most similar known name, else the same key of
    other tables."""

    def similarity(other: str) -> float:
        parts = zip(name.rpartition(".")[::2], other.rpartition(".")[::2], strict=True)
        return min(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)

    best = max(known, key=similarity)
    if similarity(best) > 0.6:
        guesses = [best]
    else:
        guesses = [n for n in OPTIONS if n.rpartition(".")[2] == name.rpartition(".")[2]]
    if not guesses:
        return "--help lists all options"
    return f"did you mean {' or '.join(prefix + guess for guess in guesses)}?"


def explain(error: ErrorDetails) -> str:
    """Return the message for a wrong value in a TOML file or on the command line."""
    kind, value = error["type"], error["input"]
    name = ".".join(part for part in error["loc"] if isinstance(part, str))
    if kind == "unexpected_keyword_argument":
        what = "table" if isinstance(value, dict) else "key"
        what += " outside of any table" if len(error["loc"]) == 1 and what == "key" else ""
        return f"unknown {what}; {did_you_mean(name, ['base', *TABLES, *LISTS, *VALUES])}"
    if kind == "dataclass_type":
        header = f"[[{name}]]" if name in LISTS else f"[{name}]"
        return f"{show(value)} is not a table; write {header}"
    if kind == "list_type":
        return f"{show(value)} is not a list of tables; write [[{name}]]"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    problem = "out of range; wanted" if kind.startswith(("greater_than", "less_than")) else "not"
    return f"{show(value)} is {problem} {wanted(VALUES[name])}"
