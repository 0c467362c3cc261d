"""Read a config: TOML files, then the command line, then the checks.

Precedence is command line > TOML > parent TOML (`base`) > default. Whatever is wrong is a
`ConfigError` of one line.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_titan.config.checks import (
    LISTS,
    OPTIONS,
    TABLES,
    check_rows,
    check_value,
    config_error,
    did_you_mean,
    keys_of,
    literal,
    nearest,
    show,
    wanted,
)
from opd_titan.config.consistency import check_consistency
from opd_titan.config.job_config import JobConfig
from opd_titan.errors import for_a_pipe, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST = 1 << 20
# tomllib's time grows with the square of the parts of a dotted key; no key here has more than two.
# [[name]] -> the list that its rows are of, for a file without a table of that name.
SHORT = {"teacher": "teacher.models", "data": "data.sets"}
_PART = r"""(?:[^\s.="']+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"^[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{100}}", re.MULTILINE)


def load_config(
    argv: Sequence[str],
    check: Callable[[JobConfig], None] = check_consistency,
    prog: str = "opd_titan.train",
) -> JobConfig:
    """Resolve and check the config that `argv` (without the program's name) asks for.

    `--job.config_file PATH` names the TOML file, if any; every other argument is
    `--table.key value` and overrides it. When an option is given twice, the last one counts.

    Args:
        check: the rules between keys.
        prog: the module that `--help` is about.

    Raises:
        ConfigError: something in the files or in `argv` is wrong; the message is one line.
        SystemExit: only for `--help`.
    """
    if "--help" in argv or "-h" in argv:
        _show_help(prog)
    given = read_arguments(argv)
    config = _build({**_read_files(given.get("job.config_file", "")), **given})
    check(config)
    return config


def to_toml(config: JobConfig) -> str:
    """The whole config as TOML; read back it gives an equal config. `job.config_file` is left out,
    since it is not part of what the run does."""
    lines: list[str] = []
    for table, values in asdict(config).items():
        if table in LISTS:
            lines += _rows_as_toml(table, values)
            continue
        lines.append(f"[{table}]")
        lines += [
            f"{key} = {literal(value)}"
            for key, value in values.items()
            if f"{table}.{key}" in OPTIONS and f"{table}.{key}" != "job.config_file"
        ]
        lines.append("")
        # After the table's own keys: what follows a [[header]] belongs to that row.
        for key in values:
            if f"{table}.{key}" in LISTS:
                lines += _rows_as_toml(f"{table}.{key}", values[key])
    return "\n".join(lines)


def _rows_as_toml(name: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines += [f"[[{name}]]", *(f"{key} = {literal(value)}" for key, value in row.items()), ""]
    return lines


def _build(values: dict[str, Any]) -> JobConfig:
    """The config of these values, each under its `table.key` or the name of its list."""
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    lists = {name: value for name, value in values.items() if "." not in name}
    for name in values.keys() - lists.keys():
        table, _, key = name.partition(".")
        tables[table][key] = values[name]
    return JobConfig(**{table: cls(**tables[table]) for table, cls in TABLES.items()}, **lists)


def _read_files(file: str) -> dict[str, Any]:
    """The values of the TOML `file` and its chain of `base` parents, by `table.key`; the child's
    win, a list as a whole."""
    path, where = Path(file) if file else None, "--job.config_file"
    chain: dict[Path, Path] = {}  # resolved -> as written
    merged: dict[str, Any] = {}
    while path is not None:
        document, resolved = _parse_file(path, where)
        if resolved in chain:
            circle = " -> ".join(str(p) for p in [*chain.values(), path])
            raise config_error(where, f"goes in a circle: {circle}")
        chain[resolved] = path
        where = f"{path}: base"
        base = document.pop("base", None)
        merged = {**_check_document(str(path), document), **merged}
        if base is not None and (not isinstance(base, str) or not base):
            raise config_error(where, f"{show(base)} is not the path of a TOML file")
        path = path.parent / base if base else None
    return merged


def _parse_file(path: Path, where: str) -> tuple[dict[str, Any], Path]:
    """The raw TOML document in `path`, and the path without links. `where` asked for it."""
    try:
        with path.open("rb") as file:
            resolved, data = path.resolve(), file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise config_error(where, f"{path}: no such file") from None
    except IsADirectoryError:
        raise config_error(where, f"{path} is a folder; wanted a TOML file") from None
    except (OSError, RuntimeError, ValueError) as e:  # unreadable, a circle of links, a NUL
        raise config_error(where, f"{path} cannot be read: {reason(e)}") from None
    if len(data) > _LARGEST:  # a device without end, or weights in place of the recipe
        raise config_error(where, f"{path} is larger than {_LARGEST >> 20} MiB; wanted a TOML file")
    try:
        text = data.decode("utf-8-sig")
        if found := _LONG_KEY.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise config_error(str(path), f"line {line}: a key of over 100 parts; wanted table.key")
        return tomllib.loads(text), resolved
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise config_error(str(path), f"not UTF-8 text (byte {e.start}, line {line})") from None
    except (ValueError, RecursionError) as e:
        raise config_error(str(path), f"not valid TOML: {e}") from None


def _check_document(file: str, document: dict[str, Any]) -> dict[str, Any]:
    """The values of one file by `table.key`, each checked by itself and of its field's type."""
    found: dict[str, Any] = {}
    for table, values in document.items():
        if table in LISTS or table in SHORT and isinstance(values, list):
            name = SHORT.get(table, table)
            found[name] = check_rows(f"{file}: {table}", name, values)
            if name == "teacher.models":
                found["teacher.hf_path"] = ""  # a parent's one teacher is replaced
            continue
        if table not in TABLES:
            raise _unknown_at_top(file, table, values)
        if not isinstance(values, dict):
            raise config_error(
                f"{file}: {table}", f"{show(values)} is not a table; write [{table}]"
            )
        for key, value in values.items():
            where, name = f"{file}: [{table}] {key}", f"{table}.{key}"
            if name == "job.config_file":
                raise config_error(
                    where, 'only for the command line; a parent is base = "other.toml"'
                )
            if name in LISTS:
                found[name] = check_rows(f"{file}: {name}", name, value)
            elif name in OPTIONS:
                found[name] = check_value(where, name, value)
            else:
                guesses = [g.removeprefix(f"{table}.") for g in nearest(table, key)]
                raise config_error(where, "unknown key; " + did_you_mean(guesses, keys_of(table)))
    return found


def _unknown_at_top(file: str, name: str, value: Any) -> Exception:
    """The error for a table that does not exist, or for a key outside of any table."""
    if isinstance(value, dict):
        guesses = difflib.get_close_matches(name, TABLES, n=1)
        return config_error(
            f"{file}: [{name}]", "unknown table; " + did_you_mean(guesses, list(TABLES))
        )
    guesses = difflib.get_close_matches(name, ["base"], n=1) or nearest("", name)
    hint = did_you_mean(guesses, ["base"])
    return config_error(f"{file}: {name}", f"unknown key outside of any table; {hint}")


def read_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """Check `--table.key value` arguments one by one: the values by `table.key`.

    tyro reports in boxes of many lines, and has either `--flag/--no-flag` or `--flag True`; here
    are both, and messages of one line. A value that starts with `--` is written `--table.key=--x`.
    """
    given: dict[str, Any] = {}
    rest = deque(argv)
    while rest:
        token = rest.popleft()
        if not token.startswith("--"):
            raise config_error(show(token), "not an option; options are written --table.key value")
        name, equals, text = token[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.replace(".no_", ".", 1)
        if name not in OPTIONS and OPTIONS.get(negated) is bool and not equals:
            given[negated] = False
            continue
        if name not in OPTIONS and name not in LISTS:
            guesses = [f"--{guess}" for guess in nearest(*name.rpartition(".")[::2])]
            hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists them all"
            raise config_error(f"--{name}", f"unknown option; {hint}")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.popleft()
            elif OPTIONS.get(name) is bool:
                text = "True"
            else:
                kind = wanted(name) if name in OPTIONS else "a TOML array of tables"
                raise config_error(f"--{name}", f"has no value; wanted {kind}")
        if name in LISTS:
            given[name] = check_rows(f"--{name}", name, _array_from_text(name, text))
        else:
            given[name] = check_value(f"--{name}", name, _from_text(name, text))
    return given


def _array_from_text(name: str, text: str) -> Any:
    """A whole list on the command line, as TOML has it: '[{name = "a"}, {name = "b"}]'."""
    with contextlib.suppress(ValueError, RecursionError):
        document = tomllib.loads(f"list = {text}")
        if len(document) == 1:
            return document["list"]
    wish = "wanted '[{key = value, ...}, ...]'"
    raise config_error(f"--{name}", f"{show(text)} is not a TOML array of tables; {wish}")


def _from_text(name: str, text: str) -> Any:
    """What `text` means for the option `name`; `text` itself when it means nothing there."""
    kind = OPTIONS[name]
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _show_help(prog: str) -> None:
    import tyro  # costs more than the rest of this package, so only who asks pays for it

    with for_a_pipe():
        tyro.cli(
            JobConfig,
            prog=f"python -m {prog}",
            args=["--help"],
            default=JobConfig(),
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
