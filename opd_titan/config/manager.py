"""Read a configuration: TOML files, then the command line, then the rules between keys.

The command line overrides the TOML file, which overrides its parent (`base`), which overrides the
defaults. pydantic checks each of these sources against `JobConfig`. Every mistake is a
`ConfigError` of one line.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from opd_titan.config.consistency import check_consistency
from opd_titan.config.job_config import JobConfig
from opd_titan.config.options import (
    LISTS,
    OPTIONS,
    did_you_mean,
    dotted,
    explain,
    in_recipe,
    wanted,
)
from opd_titan.config.reference import help_text
from opd_titan.config.value_types import literal, show
from opd_titan.errors import ConfigError, for_a_pipe, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Document = dict[str, Any]
"""Values by table and key, as in a TOML file."""
Place = tuple[str | int, ...]
"""The place of a value: table, key and, in a list, row and the row's key."""

_JOB_CONFIG = TypeAdapter(JobConfig)
_LARGEST = 1 << 20  # bytes of a TOML file
# tomllib takes time quadratic in the parts of a dotted key. No key here has more than two.
_PART = r"""(?:[^\s.="']+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"^[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{100}}", re.MULTILINE)


def load_config(
    argv: Sequence[str],
    check: Callable[[JobConfig], None] = check_consistency,
    prog: str = "opd_titan.train",
) -> JobConfig:
    """Return the checked configuration for `argv`, the arguments without the program's name.

    `--job.config_file PATH` names the TOML file, if any; every other argument is
    `--table.key value` and overrides it. If an option is given twice, the last one counts.

    Args:
        check: the rules between keys.
        prog: the module that `--help` describes.

    Raises:
        ConfigError: the files or `argv` contain a mistake; the message is one line.
        SystemExit: `argv` contains `--help`.
    """
    if {"-h", "--help"} & set(argv):
        with for_a_pipe():
            print(help_text(prog), end="")
        sys.exit(0)
    given = _read_arguments(argv)
    merged: Document = {}
    for document in [*_read_files(given.get("job", {}).get("config_file", "")), given]:
        for table, values in document.items():
            merged.setdefault(table, {}).update(values)
    # Each document has been checked already: files without conversions, the command line with them.
    config = _JOB_CONFIG.validate_python(merged, strict=False)
    check(config)
    return config


def to_toml(config: JobConfig) -> str:
    """Return the whole configuration as TOML. Reading it gives an equal configuration.

    It omits `job.config_file`, which does not affect the run.
    """
    lines: list[str] = []
    for table, values in asdict(config).items():
        lists = {key: rows for key, rows in values.items() if f"{table}.{key}" in LISTS}
        lines += [f"[{table}]", *_pairs({k: v for k, v in values.items() if k not in lists}), ""]
        # Lists come after the table's own keys: keys below a [[header]] belong to that row.
        for key, rows in lists.items():
            for row in rows:
                lines += [f"[[{table}.{key}]]", *_pairs(row), ""]
    return "\n".join(lines)


def _pairs(values: Document) -> list[str]:
    return [f"{key} = {literal(value)}" for key, value in values.items() if key != "config_file"]


def _check(document: Document, place: Callable[[Place], str], strict: bool) -> None:
    """Raise `ConfigError` for the first value of a wrong type or out of range.

    Args:
        place: returns the name of a value in messages, given its table, key and row.
        strict: no conversion of text to other types.
    """
    try:
        _JOB_CONFIG.validate_python(document, strict=None if strict else False)
    except ValidationError as e:
        error = e.errors()[0]
        raise ConfigError(f"{place(error['loc'])}: {explain(error)}") from None


def _read_files(file: str) -> Iterable[Document]:
    """Return the checked documents of a TOML file and its `base` parents, parents first."""
    path, where = Path(file) if file else None, "--job.config_file"
    chain: dict[Path, Path] = {}  # resolved -> as written
    documents: deque[Document] = deque()
    while path is not None:
        document, resolved = _parse_file(path, where)
        if resolved in chain:
            circle = " -> ".join(str(p) for p in [*chain.values(), path])
            raise ConfigError(f"{where}: goes in a circle: {circle}")
        chain[resolved] = path
        where = f"{path}: base"
        base = document.pop("base", None)
        documents.appendleft(_check_file(path, document))
        if base is not None and (not isinstance(base, str) or not base):
            raise ConfigError(f"{where}: {show(base)} is not the path of a TOML file")
        path = path.parent / base if base else None
    return documents


def _check_file(path: Path, document: Document) -> Document:
    """Return the document of one file with short forms written out. Raise if a value is wrong."""
    if isinstance(rows := document.get("teacher"), list):
        # These teachers replace the single teacher of a parent.
        document["teacher"] = {"models": rows, "hf_path": ""}
    if isinstance(rows := document.get("data"), list):
        document["data"] = {"sets": rows}
    _check(document, lambda place: f"{path}: {in_recipe(place)}", strict=True)
    if "config_file" in document.get("job", {}):
        message = 'only for the command line; a parent is given by base = "other.toml"'
        raise ConfigError(f"{path}: [job] config_file: {message}")
    return document


def _parse_file(path: Path, where: str) -> tuple[Document, Path]:
    """Return the raw document in a TOML file, and its path without links.

    Args:
        where: the start of messages: the option or key that names the file.
    """
    try:
        with path.open("rb") as file:
            resolved, data = path.resolve(), file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"{where}: {path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{where}: {path} is a folder; wanted a TOML file") from None
    except (OSError, RuntimeError, ValueError) as e:  # unreadable, a circle of links, a NUL
        raise ConfigError(f"{where}: {path} cannot be read: {reason(e)}") from None
    if len(data) > _LARGEST:  # an endless device, or a file of weights
        size = f"{_LARGEST >> 20} MiB"
        raise ConfigError(f"{where}: {path} is larger than {size}; wanted a TOML file")
    try:
        text = data.decode("utf-8-sig")
        if found := _LONG_KEY.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise ConfigError(f"{path}: line {line}: a key of over 100 parts; wanted table.key")
        return tomllib.loads(text), resolved
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}: not UTF-8 text (byte {e.start}, line {line})") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid TOML: {e}") from None


def _read_arguments(argv: Sequence[str]) -> Document:
    """Return the checked values of `--table.key value` arguments.

    A value that starts with `--` must be written `--table.key=--value`. A switch is turned on by
    its name alone and off by `--table.no_key`.
    """
    document: Document = {}
    rest = deque(argv)
    while rest:
        name, text = _next_option(rest)
        value = _array(name, text) if name in LISTS else text
        table, _, key = name.partition(".")
        document.setdefault(table, {})[key] = value
    _check(document, _as_option, strict=False)
    return document


def _as_option(place: Place) -> str:
    return f"--{dotted(place)}"


def _next_option(rest: deque[str]) -> tuple[str, str]:
    """Take one option from the arguments. Return its name and the text of its value."""
    token = rest.popleft()
    if not token.startswith("--"):
        raise ConfigError(f"{show(token)}: not an option; options are written --table.key value")
    name, equals, text = token[2:].partition("=")
    name = name.replace("-", "_")
    if equals and (name in OPTIONS or name in LISTS):
        return name, text
    positive = name.replace(".no_", ".", 1)
    if name not in OPTIONS and _is_switch(positive) and not equals:
        return positive, "false"
    if name not in OPTIONS and name not in LISTS:
        hint = did_you_mean(name, [*OPTIONS, *LISTS], "--")
        raise ConfigError(f"--{name}: unknown option; {hint}")
    if rest and not rest[0].startswith("--"):
        return name, rest.popleft()
    if _is_switch(name):
        return name, "true"
    kind = wanted(OPTIONS[name]) if name in OPTIONS else "a TOML array of tables"
    raise ConfigError(f"--{name}: has no value; wanted {kind}")


def _is_switch(name: str) -> bool:
    return name in OPTIONS and OPTIONS[name].annotation is bool


def _array(name: str, text: str) -> list[Any]:
    """Return the checked rows of a list that is given as a TOML array of tables."""
    table, _, key = name.partition(".")
    with contextlib.suppress(ValueError, RecursionError):
        document = tomllib.loads(f"list = {text}")
        if len(document) == 1:  # no further keys after a line break
            _check({table: {key: document["list"]}}, _as_option, strict=True)
            return document["list"]
    wish = "wanted '[{key = value, ...}, ...]'"
    raise ConfigError(f"--{name}: {show(text)} is not a TOML array of tables; {wish}")
